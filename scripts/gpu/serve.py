"""What LoRA costs a server on a GPU: a model of Llama-3.1-8B's shape, random weights, bf16.

    python scripts/gpu/serve.py --out FILE.json [--seconds 540] [--only NAME,...]
        [--batches 1,8,32,64] [--prefills 2048,8192] [--rounds 5] [--model llama-3.1-8b|tiny]

Engines, each in a process of its own, one after the other on the same GPU, all with torch.compile
and CUDA graphs:

    base      vLLM, LoRA off
    plugin    the plugin: base requests, plain LoRA of rank 16 and 32, routed 8/2/16 (8 experts of
              rank 16, 2 per token, in every linear), at --max-lora-rank 128
    base-2    `base` again: how far two starts of one engine differ, and how long a second one takes
    plugin-2  `plugin` again, with base requests only: the same of the plugin
    stock     the plugin off: base requests, the same plain adapters, at --max-lora-rank 32
    plugin32  the plugin with plain adapters only, at --max-lora-rank 32: like against like
    extended  as `plugin32`, with A and routers below the base weights (`extend_weights`)
    fused     as `plugin`, with the settings `fuse_activation` and `extend_weights`
    dual      as `plugin`, with the shrink on a second stream (VLLM_LORA_ENABLE_DUAL_STREAM)
    prefetched  as `dual`, with the setting `prefetch_weights`

`base` and `plugin` start with caches of their own that are empty, the second ones with what these
have left.

A decode step's time is that of a long generation less that of one token, over the steps; prefill
is one prompt and one token. Medians over rounds. Tokens are random and ignore_eos is set, so every
step does the same work. Ratios are over `base`. Engines that FILE already holds are not run again,
if card, driver, versions and sources are the same.

Exit code: 0 all are measured, 1 one failed, 75 none failed and some had no time left: run it again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))

from bounded import INCOMPLETE, TIME_LIMIT, run  # noqa: E402
from facts import exit_code, kept, key, of_engine  # noqa: E402

EXPERTS, TOP_K, RANK = 8, 2, 16
DECODE = 65
MEASURED = "measured"
STARTS = 45.0  # seconds under which no engine is started


@dataclass(frozen=True)
class Shape:
    """A model of Llama's kind."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    vocab: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """Name → in and out features of every adapted linear."""
        q, kv = self.heads * self.head, self.kv_heads * self.head
        sizes = {
            "self_attn.q_proj": (self.hidden, q), "self_attn.k_proj": (self.hidden, kv),
            "self_attn.v_proj": (self.hidden, kv), "self_attn.o_proj": (q, self.hidden),
            "mlp.gate_proj": (self.hidden, self.inner), "mlp.up_proj": (self.hidden, self.inner),
            "mlp.down_proj": (self.inner, self.hidden),
        }  # fmt: skip
        return {f"model.layers.{i}.{n}": s for i in range(self.layers) for n, s in sizes.items()}


SHAPES = {
    "llama-3.1-8b": Shape(4096, 14336, 32, 32, 8, 128, 128256),
    "tiny": Shape(256, 512, 2, 4, 2, 64, 512),
}


@dataclass(frozen=True)
class Server:
    """One engine.

    Args:
        kinds: of request; lora: its options for LoRA; plugin: whether it is on.
        dual: the shrink on a second stream.
    """

    kinds: tuple[str, ...]
    lora: dict[str, Any]
    plugin: bool
    dual: bool = False


PLAIN, KINDS = ("base", "plain16", "plain32"), ("base", "plain16", "routed")
WIDE = {"max_lora_rank": EXPERTS * RANK}
PREFETCHED = {"lora_ext": {"prefetch_weights": True}}
EXTENDED = {"lora_ext": {"extend_weights": 0.1, "max_router_rows": 1}}
FUSED = {"lora_ext": {"extend_weights": 0.1, "fuse_activation": True, "max_router_rows": EXPERTS}}
SERVERS = {
    "base": Server(("base",), {}, False),
    "plugin": Server((*PLAIN, "routed"), WIDE, True),
    "base-2": Server(("base",), {}, False),  # soon after the first: what they share is still there
    "plugin-2": Server(("base",), WIDE, True),
    "stock": Server(PLAIN, {"max_lora_rank": 32}, False),
    "plugin32": Server(PLAIN, {"max_lora_rank": 32}, True),
    "extended": Server(PLAIN, {"max_lora_rank": 32, "additional_config": EXTENDED}, True),
    "fused": Server(
        KINDS,
        {**WIDE, "max_loras": 1, "additional_config": FUSED},
        True,
    ),
    "dual": Server(KINDS, WIDE, True, dual=True),
    "prefetched": Server(KINDS, {**WIDE, "additional_config": PREFETCHED}, True, dual=True),
}
AGAIN = "-2"  # ends the name of a second start


def make_model(folder: Path, shape: Shape) -> Path:
    """A folder that vLLM reads as a model; weights are vLLM's dummies."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape.hidden,
        "intermediate_size": shape.inner, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head, "vocab_size": shape.vocab, "dtype": "bfloat16",
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_adapters(root: Path, shape: Shape) -> dict[str, Path]:
    """Random adapters, once: plain ones as PEFT writes them, the routed one in the own format."""
    import torch
    from safetensors.torch import save_file

    from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
    from vllm_lora_ext.adapters.readers.native import write_native
    from vllm_lora_ext.routing import GateSpec

    folders = {name: root / name for name in ("plain16", "plain32", "routed")}
    if (root / "done").exists():
        return folders
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    def normal(n: int, k: int, scale: float, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return (torch.randn(n, k, device=device) * scale).to(dtype).cpu()

    names = shape.linears()
    for rank in (16, 32):
        folder = folders[f"plain{rank}"]
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, (k, n) in names.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = normal(rank, k, k**-0.5)
            tensors[f"base_model.model.{name}.lora_B.weight"] = normal(n, rank, 0.02)
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none",
                  "target_modules": sorted({n.rpartition(".")[2] for n in names}),
                  "base_model_name_or_path": "random"}  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(config))
    gate = GateSpec(source="router", blocks=(RANK,) * EXPERTS, score="softmax", select="top_k",
                    k=TOP_K, weight="renormalise")  # fmt: skip
    total = EXPERTS * RANK
    modules = {
        name: RoutedModule(
            normal(total, k, k**-0.5), normal(n, total, 0.02), gate,
            normal(EXPERTS, k, k**-0.5, torch.float32),
        )
        for name, (k, n) in names.items()
    }  # fmt: skip
    write_native(RoutedAdapter(modules, "routed"), folders["routed"])
    (root / "done").touch()
    return folders


def one(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Starts the engine `name` and times it: seconds by kind of request and phase."""
    server, shape = SERVERS[name], SHAPES[args.model]
    batches, prefills = numbers(args.batches), numbers(args.prefills)
    model = make_model(args.work / args.model / "model", shape)
    folders = make_adapters(args.work / args.model / "adapters", shape)
    import torch
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    longest = max(*prefills, 512)
    options: dict[str, Any] = {"enable_lora": True, "max_loras": 2, **server.lora}
    options = options if server.lora else {}
    if torch.cuda.is_available():
        sizes = sorted({1, 2, 4, *batches})
        options |= {"gpu_memory_utilization": 0.8, "attention_backend": args.attention,
                    "compilation_config": {"cudagraph_capture_sizes": sizes}}  # fmt: skip
    else:  # to try this file where there is no GPU
        options["enforce_eager"] = True
    start = time.monotonic()
    llm = LLM(
        model=str(model), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", seed=0,
        max_model_len=longest + 256, max_num_batched_tokens=longest, max_num_seqs=max(batches),
        enable_prefix_caching=False, disable_log_stats=True, **options,
    )  # fmt: skip
    answer: dict[str, Any] = {"start_s": time.monotonic() - start, "facts": of_engine(llm)}
    requests = {kind: LoRARequest(kind, i, str(folders[kind]))
                for i, kind in enumerate(server.kinds, 1) if kind != "base"}  # fmt: skip
    asked = Asked(llm, requests, shape.vocab)
    fixed = asked.prompts(1, 64)  # different tokens say that an adapter does something
    answer["tokens"] = {kind: asked.ask(kind, fixed, 16)[1] for kind in server.kinds}
    answer["seconds"] = measure(asked, server.kinds, batches, prefills, args.rounds)
    answer["state"] = MEASURED
    return answer


class Asked:
    """An engine that is asked for random tokens, and how long it takes."""

    def __init__(self, llm: Any, requests: dict[str, Any], vocab: int) -> None:
        import numpy as np

        self._llm, self._requests, self._vocab = llm, requests, vocab
        self._rng = np.random.default_rng(0)

    def prompts(self, batch: int, length: int) -> list[list[int]]:
        """Random prompts, none like another."""
        found: list[list[int]] = self._rng.integers(3, self._vocab, (batch, length)).tolist()
        return found

    def ask(self, kind: str, prompts: list[list[int]], count: int) -> tuple[float, list[int]]:
        """Seconds for `count` tokens of each prompt, and those of the first."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        outputs = self._llm.generate(
            [{"prompt_token_ids": p} for p in prompts], params,
            lora_request=self._requests.get(kind), use_tqdm=False,
        )  # fmt: skip
        return time.perf_counter() - start, list(outputs[0].outputs[0].token_ids)


def measure(
    asked: Asked, kinds: tuple[str, ...], batches: list[int], prefills: list[int], rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds of a decode step and of a prefill, by kind, phase and round; all kinds take turns."""
    seconds: dict[str, dict[str, list[float]]] = {}
    for turn in range(rounds + 1):  # the first round warms up
        for kind in kinds:
            found = {}
            for batch in batches:
                sent = asked.prompts(batch, 16)
                short, long = asked.ask(kind, sent, 1)[0], asked.ask(kind, sent, DECODE)[0]
                found[f"decode {batch}"] = (long - short) / (DECODE - 1)
            for length in prefills:
                found[f"prefill {length}"] = asked.ask(kind, asked.prompts(1, length), 1)[0]
            for phase, value in found.items() if turn else ():
                seconds.setdefault(kind, {}).setdefault(phase, []).append(value)
    return seconds


def numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def table(found: dict[str, Any]) -> list[str]:
    """A line per engine and kind of request: times, and what they add to `base`."""
    base = found.get("base", {}).get("seconds", {}).get("base")
    lines: list[str] = []
    for name, answer in found.items():
        if "seconds" not in answer:
            lines.append(f"{name:9} {answer['state']}")
        for kind, phases in answer.get("seconds", {}).items():
            cells = []
            for phase, values in phases.items():
                middle = statistics.median(values)
                cell = f"{phase} {middle * 1e3:.2f} ms"
                if base and phase in base:
                    cell += f" {middle / statistics.median(base[phase]) - 1:+.1%}"
                cells.append(cell)
            lines.append(f"{name:9} {kind:9}" + "; ".join(cells))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lora-ext-serve")
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--each", type=float, default=240, help="most seconds of one engine")
    parser.add_argument("--only", default=",".join(SERVERS))
    parser.add_argument("--batches", default="1,8,32,64")
    parser.add_argument("--prefills", default="2048,8192")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="llama-3.1-8b", choices=SHAPES)
    parser.add_argument("--attention", default="FLASH_ATTN")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        args.out.write_text(json.dumps(one(args.one, args)))
        return 0
    wanted = args.only.split(",")
    if unknown := set(wanted) - set(SERVERS):
        parser.error(f"no engine {', '.join(sorted(unknown))}; there are {', '.join(SERVERS)}")
    found, own = kept(args.out), key()
    end = time.monotonic() + args.seconds - 10
    for name in wanted:
        if found.get(name, {}).get("state") == MEASURED:
            continue
        found[name] = {**_bounded(name, args, end - time.monotonic()), "key": own}
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        started = found[name].get("start_s", 0)
        print(f"{name}: {found[name]['state']}, started in {started:.0f} s", flush=True)
    print("\n" + "\n".join(table(found)))
    return exit_code([found[name]["state"] for name in wanted], MEASURED)


def caches(name: str, work: Path) -> dict[str, str]:
    """Where an engine that is started twice keeps what it compiles; empty before its first."""
    first = name.removesuffix(AGAIN)
    if first + AGAIN not in SERVERS:
        return {}
    folder = work / f"cache-{first}"
    if name == first:
        shutil.rmtree(folder, ignore_errors=True)
    names = ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    return {variable: str(folder / variable.lower()) for variable in names}


def _bounded(name: str, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """One engine in a process of its own, for `seconds` at most: what is left of all."""
    if seconds < STARTS:
        return {"state": INCOMPLETE}
    print(f"--- {name}", flush=True)
    part = args.out.with_suffix(f".{name}.tmp")
    same = [f"--{key}={getattr(args, key)}" for key in
            ("work", "batches", "prefills", "rounds", "model", "attention")]  # fmt: skip
    command = [sys.executable, "-P", __file__, "--one", name, "--out", str(part), *same]
    env = {
        "VLLM_LORA_EXT_DISABLE": "0" if SERVERS[name].plugin else "1",
        "VLLM_LORA_ENABLE_DUAL_STREAM": "1" if SERVERS[name].dual else "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1", **caches(name, args.work / args.model),
    }  # fmt: skip
    part.unlink(missing_ok=True)
    ended = run(command, min(args.each, seconds), env)
    state = ended.state
    if state == TIME_LIMIT and seconds < args.each:  # the next call gives it more
        state = INCOMPLETE
    found = json.loads(part.read_text()) if part.exists() else {"state": state}
    part.unlink(missing_ok=True)
    return found


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    sys.exit(main())
