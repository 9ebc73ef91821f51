"""What X-LoRA costs: decode steps of its rows against the base model's, and PEFT's own beside them.

    python benchmarks/two_pass.py [--batches 1,8] [--rounds 5] [--no-peft] [--out FILE.json]

SmolLM2-135M on a CPU, fp32, four experts of rank 8 on all seven linears of every layer, a
classifier of two layers with gates for each adapted layer. One engine with `two_pass`; the same
prompts go in turns to the base model, to X-LoRA and to X-LoRA with frozen gates (an approximation,
one pass a decode step), so that a ratio is of neighbours in time:

    engine  seconds of decode steps of an adapter's rows over those of base rows, the median over
            rounds
    peft    seconds for as many tokens in transformers, X-LoRA (which forbids a KV cache) over the
            base model with its KV cache; batch 1

Nothing is timed before the engine's greedy tokens were those of PEFT. About four minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "examples")]

PROMPT, DECODE, EXPERTS, RANK, SIZE = 16, 24, 4, 8, 64
KINDS = ("base", "exact", "frozen")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def peft_model(base: str, root: Path) -> Any:
    """PEFT's X-LoRA model with random weights, and the same as a folder `root`, whole."""
    from peft import LoraConfig, XLoraConfig, get_peft_model
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    def fresh() -> Any:
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    torch.manual_seed(0)
    for expert in range(EXPERTS):
        config = LoraConfig(
            task_type="CAUSAL_LM", r=RANK, lora_alpha=RANK, target_modules=list(LINEARS)
        )
        model = get_peft_model(fresh(), config)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.3)
        model.save_pretrained(root / str(expert))
    model = fresh()
    model.config.use_cache = False
    config = XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=model.config.hidden_size, xlora_depth=2,
        xlora_size=SIZE, layerwise_scalings=True,
        adapters={str(e): str(root / str(e)) for e in range(EXPERTS)},
    )  # fmt: skip
    model = get_peft_model(model, config).eval()
    classifier = model.base_model.internal_xlora_classifier.layers
    torch.nn.init.normal_(classifier[-1].weight, std=2 / SIZE**0.5)
    prefix = "base_model.internal_xlora_classifier.layers."
    state = {prefix + name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    save_file(state, root / "adapter_model.safetensors")
    # `save_pretrained` would lose layers of the classifier.
    (root / "adapter_config.json").write_text(json.dumps(config.to_dict(), default=str))
    return model


def make_engine(base: str) -> Any:
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
    }  # fmt: skip
    from vllm import LLM

    return LLM(
        model=base, dtype="float32", max_model_len=128, max_num_seqs=32, seed=0, enable_lora=True,
        max_num_batched_tokens=512, max_lora_rank=32, enable_prefix_caching=False,
        disable_log_stats=True, additional_config={"lora_ext": {"two_pass": True}},
    )  # fmt: skip


def decode(llm: Any, lora: Any, prompts: list[list[int]], count: int) -> tuple[float, Any]:
    """Seconds for all steps but the first, which prefills; greedy tokens."""
    from vllm import SamplingParams

    def ask(tokens: int) -> tuple[float, Any]:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        start = time.perf_counter()
        outputs = llm.generate(
            [{"prompt_token_ids": p} for p in prompts], params, lora_request=lora, use_tqdm=False
        )
        return time.perf_counter() - start, [list(o.outputs[0].token_ids) for o in outputs]

    whole, tokens = ask(count)
    return whole - ask(1)[0], tokens


def continued(
    model: Any, prompt: list[int], count: int, cache: bool = False
) -> tuple[float, list[int]]:
    """Seconds for all tokens but the first, and greedy tokens, in transformers."""

    def run(tokens: int) -> tuple[float, list[int]]:
        start = time.perf_counter()
        with torch.inference_mode():
            ids = model.generate(
                input_ids=torch.tensor([prompt]), max_new_tokens=tokens, min_new_tokens=tokens,
                do_sample=False, use_cache=cache,
            )  # fmt: skip
        return time.perf_counter() - start, ids[0, len(prompt) :].tolist()

    whole, tokens = run(count)
    return whole - run(1)[0], tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-peft", action="store_true", help="time the engine only")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from base_model import ensure_base

    base = str(ensure_base())
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "prompt": PROMPT,
        "decode": DECODE, "experts": EXPERTS, "rank": RANK, "rounds": args.rounds,
    }  # fmt: skip
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as root:
        exact = Path(root) / "exact"
        theirs = peft_model(base, exact)
        frozen = Path(shutil.copytree(exact, Path(root) / "frozen"))
        (frozen / "routing.json").write_text('{"gates": "frozen"}')
        llm = make_engine(base)
        from vllm.lora.request import LoRARequest

        loras = {
            "base": None, "exact": LoRARequest("exact", 1, str(exact)),
            "frozen": LoRARequest("frozen", 2, str(frozen)),
        }  # fmt: skip
        check(llm, loras["exact"], theirs, rng)
        for batch in map(int, args.batches.split(",")):
            found = compare(llm, loras, batch, args.rounds, rng)
            result[f"engine, batch {batch}"] = found
            print(f"engine, batch {batch}: {found}", flush=True)
        if not args.no_peft:
            result["peft, batch 1"] = found = compare_peft(base, theirs, rng)
            print(f"peft, batch 1: {found}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def check(llm: Any, lora: Any, theirs: Any, rng: Any) -> None:
    """Ends the benchmark where the engine's greedy tokens are not PEFT's, or all the base's."""
    prompts, changed = rng.integers(1000, 20000, (3, PROMPT)).tolist(), False
    base = decode(llm, None, prompts, 8)[1]
    for prompt, got, without in zip(prompts, decode(llm, lora, prompts, 8)[1], base, strict=True):
        changed |= got != without
        want = continued(theirs, prompt, 8)[1]
        if got != want:
            raise SystemExit(f"check failed: {got}, PEFT {want}")
    if not changed:
        raise SystemExit("check failed: the adapter changes no token")


def compare(llm: Any, loras: dict[str, Any], batch: int, rounds: int, rng: Any) -> dict[str, Any]:
    """Ratios of decode steps to the base model's, medians and ranges over rounds."""
    ratios: dict[str, list[float]] = {kind: [] for kind in KINDS[1:]}
    steps = []
    for number in range(rounds + 1):
        prompts = rng.integers(1000, 20000, (batch, PROMPT)).tolist()
        first = number % len(KINDS)
        seconds = {
            kind: decode(llm, loras[kind], prompts, DECODE)[0]
            for kind in KINDS[first:] + KINDS[:first]
        }
        if number:  # the first round makes what is made once
            steps.append(1e3 * seconds["base"] / (DECODE - 1))
            for kind, of_kind in ratios.items():
                of_kind.append(seconds[kind] / seconds["base"])
    found: dict[str, Any] = {"base_step_ms": round(statistics.median(steps), 2)}
    for kind, of_kind in ratios.items():
        found[kind] = round(statistics.median(of_kind), 2)
        found[f"{kind}, least and most"] = [round(min(of_kind), 2), round(max(of_kind), 2)]
    return found


def compare_peft(base: str, theirs: Any, rng: Any) -> dict[str, float]:
    """The ratio that PEFT has to transformers' base model, the median of three prompts."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ratios = []
    for _ in range(3):
        prompt = rng.integers(1000, 20000, PROMPT).tolist()
        slow = continued(theirs, prompt, DECODE)[0]
        ratios.append(slow / continued(plain, prompt, DECODE, cache=True)[0])
    return {"exact": round(statistics.median(ratios), 2)}


if __name__ == "__main__":
    main()
