"""What requests that say something of their adapters cost, and what they cost the others.

    python benchmarks/conditioned_requests.py [--batches 1,8,32] [--pairs 9] [--out FILE.json]

Two engines with the plugin on SmolLM2-135M (CPU, bf16), each in a process of its own, take turns:
one of them has never seen a request that says anything, the other has. Three ratios of decode time,
the median over pairs of a pair's own ratio:

    base    requests of the base model: in the second engine over the first
    plain   the same of a plain adapter of rank 8 on all seven linears
    spans   two such adapters on spans of prompt and answer, over the same two everywhere, which is
            one composed slot without numbers for its rows; both in the second engine

And what a user costs who was never seen before (RecLoRA on q and v, 8 experts of rank 8), whose
adapter the worker makes: the time to the first token over that of the same request again, and the
difference in steps of decoding one request.

Nothing is timed before spans that hold everywhere gave the composed slot's greedy tokens, and the
base requests and the users' transformers'.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "examples")]

from benchmarks.engine import Engine, check_greedy  # noqa: E402

PROMPT, DECODE = 16, 32
USER, EXPERTS, RANK, INNER = 64, 8, 8, 32
MIX = {"adapters": [{"name": "one"}, {"name": "two"}]}
SPANS = {"adapters": [
    {"name": "one", "spans": [[0, 8], [12, None]]}, {"name": "two", "spans": [[4, 40]]},
]}  # fmt: skip
EVERYWHERE = {"adapters": [{"name": n, "spans": [[0, None]]} for n in ("one", "two")]}


def make_adapters(base: str, root: Path) -> dict[str, Path]:
    """Two plain adapters of rank 8 on all seven linears."""
    from transformers import AutoConfig

    from tests.make_adapters import random_adapter
    from vllm_lora_ext.adapters.readers.native import write_native
    from vllm_lora_ext.routing import GateSpec

    config, folders = AutoConfig.from_pretrained(base), {}
    for seed, name in enumerate(("one", "two")):
        adapter = random_adapter(config, seed, GateSpec(), rank=8, strength=0.02)
        folders[name] = Path(write_native(adapter, root / name))
    return folders


def make_template(base: str, folder: Path) -> Path:
    """A random RecLoRA, as its authors' program writes it."""
    from safetensors.torch import save_file
    from transformers import AutoConfig

    config, draw, tensors = AutoConfig.from_pretrained(base), torch.Generator().manual_seed(2), {}
    width = config.hidden_size
    outs = {"q": width, "v": width // config.num_attention_heads * config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        for kind, out in outs.items():
            for name, rows, columns, size in (
                ("lora_A_adapter", RANK * width, EXPERTS, width**-0.5),
                ("lora_B_adapter", RANK * out, EXPERTS, 0.02),
                ("ctr_final_layer.1", INNER, USER, USER**-0.5),
                ("ctr_final_layer.4", EXPERTS, INNER, INNER**-0.5),
            ):
                stem = f"lorec_layers.{kind}.{layer}.{name}"
                tensors[f"{stem}.weight"] = torch.randn(rows, columns, generator=draw) * size
                if name.startswith("ctr"):
                    tensors[f"{stem}.bias"] = torch.zeros(rows)
            norm = f"lorec_layers.{kind}.{layer}.ctr_final_layer.0"
            tensors |= {f"{norm}.weight": torch.ones(USER), f"{norm}.bias": torch.zeros(USER)}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    settings = {
        "mode": "ctr", "layers": list(outs), "lora_r": RANK, "lora_alpha": 16,
        "lora_assemble_num": EXPERTS, "ctr_hidden_size": USER, "enable_softmax": True,
        "enable_sqrt_after_softmax": False, "temperature": 1.0, "which_in_gate": "None",
        "routing_mode": "soft",
    }  # fmt: skip
    (folder / "routing.json").write_text(json.dumps(settings))
    return folder


def users(rng: np.random.Generator, count: int) -> list[dict[str, Any]]:
    return [{"user": row} for row in rng.normal(size=(count, USER)).astype(np.float32).tolist()]


def check(used: Engine, model: str, template: Path) -> None:
    from transformers import AutoModelForCausalLM

    from vllm_lora_ext.adapters import load_adapter
    from vllm_lora_ext.adapters.hf import apply_adapter

    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    for prompt in np.random.default_rng(1).integers(1000, 20000, (3, PROMPT)).tolist():
        check_greedy(plain, prompt, used.ask("base", [prompt], 8)[1][0], "base")
        mix, spans = (used.ask("base", [prompt], 4, says)[1] for says in (MIX, EVERYWHERE))
        if mix != spans:
            raise SystemExit(f"check failed: spans that hold everywhere, {mix} and {spans}")
    rng, made = np.random.default_rng(2), load_adapter(template).template
    assert made is not None
    for says in users(rng, 3):
        (prompt,) = rng.integers(1000, 20000, (1, PROMPT)).tolist()
        tokens = used.ask("reclora", [prompt], 8, says)[1][0]
        with apply_adapter(plain, made.derive(torch.tensor(says["user"]), None)):
            check_greedy(plain, prompt, tokens, "a user")


def measure(quiet: Engine, used: Engine, batch: int, pairs: int) -> dict[str, float]:
    """Ratios by what was asked for."""
    jobs: dict[str, tuple[tuple[Engine, str, Any], tuple[Engine, str, Any]]] = {
        "base": ((quiet, "base", None), (used, "base", None)),
        "plain": ((quiet, "one", None), (used, "one", None)),
        "spans": ((used, "base", MIX), (used, "base", SPANS)),
    }
    rng, ratios = np.random.default_rng(batch), {}
    for turn in range(pairs + 1):
        prompts = rng.integers(1000, 20000, (batch, PROMPT)).tolist()
        for name, pair in jobs.items():
            seconds = [0.0, 0.0]
            for i in (0, 1) if turn % 2 else (1, 0):
                engine, what, says = pair[i]
                engine.wake()
                seconds[i] = engine.ask(what, prompts, DECODE, says)[0]
            if turn:  # the first pair makes what is made once
                ratios.setdefault(name, []).append(seconds[1] / seconds[0])
    return {name: statistics.median(found) for name, found in ratios.items()}


def measure_users(used: Engine, pairs: int) -> dict[str, float]:
    """What a new user costs: over a known one's first token, and in steps of decoding."""
    rng, ratios, steps = np.random.default_rng(3), [], []
    for turn, says in enumerate(users(rng, pairs + 1)):
        prompts = rng.integers(1000, 20000, (1, PROMPT)).tolist()
        new, known, long = (
            used.ask("reclora", prompts, count, says)[0] for count in (1, 1, 1 + DECODE)
        )
        if turn:
            ratios.append(new / known)
            steps.append((new - known) / (long - known) * DECODE)
    return {"first token": statistics.median(ratios), "decode steps": statistics.median(steps)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from base_model import ensure_base

    model = str(ensure_base())
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "pairs": args.pairs,
        "prompt": PROMPT, "decode": DECODE, "user": {"numbers": USER, "experts": EXPERTS},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        adapters = make_adapters(model, Path(folder))
        adapters["reclora"] = template = make_template(model, Path(folder) / "reclora")
        cores = f"0-{(os.cpu_count() or 1) - 1}"
        quiet, used = (Engine("plugin", model, adapters, cores) for _ in range(2))
        try:
            check(used, model, template)
            found = measure_users(used, 3 * args.pairs)
            result["user"] |= found
            print("user", found)
            for batch in map(int, args.batches.split(",")):
                result[f"batch {batch}"] = found = measure(quiet, used, batch, args.pairs)
                print(batch, {name: f"{ratio - 1:+.1%}" for name, ratio in found.items()})
        finally:
            quiet.stop()
            used.stop()
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
