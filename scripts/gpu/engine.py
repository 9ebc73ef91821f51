"""Routed and plain adapters in vLLM engines on a GPU, against the numbers of the systems' authors.

    python scripts/gpu/engine.py --out FILE.json [--seconds 540] [--only NAME,...|all] [--list]

Reads the checkout's fixtures. Each engine is a process of its own; one that fails or hangs does not
stop the next, and what FILE already holds is not run again, if card, driver, versions and sources
are the same. Every engine gets

    mixed    all adapters and base rows in one call: every prompt, cut at many lengths, and the
             log-probabilities of all tokens after the cut
    again    the same prompts once more, from the prefix cache: 12 greedy tokens each
    single   one adapter's longest prompt by itself: decode steps of one row
    base     base rows only: steps without an adapter
    asleep   (the engine `sleep`) all of it again after a sleep of level 2 and a wake-up

fp32: a log-probability may be off by 2e-3 (or by three times what base rows are off: then it is
the machine's arithmetic, not the adapters'), and greedy tokens must be equal. bf16: off by 0.5 at
the median position at most; equal tokens are counted only. A router whose two best scores nearly
tie may decide differently there, and that is no error.

Exit code: 0 all are right, 1 one is not, 75 none is wrong and some had no time left: run it again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
sys.path.append(str(HERE))

from bounded import INCOMPLETE, TIME_LIMIT, run  # noqa: E402
from facts import exit_code, kept, key, of_engine  # noqa: E402

ROUTED = ("plain-a", "hydralora-a", "loramoe-a", "smora-a", "flylora-a", "moram-a", "mola-a",
          "loramoe_moepeft-a", "mola_moepeft-a", "moelora-a")  # fmt: skip
BLOCKS = ("mixlora-a", "mixlora_moepeft-a")  # whole MLP blocks
SLEEPERS = ("plain-a", "hydralora-a", "moram-a", "mixlora-a")  # one for each of the slots
RIGHT = "right"
STARTS = 20.0  # seconds under which no engine is started


@dataclass(frozen=True)
class Engine:
    """One engine: its adapters, what differs from the usual arguments of `LLM`, its environment.

    Args:
        whole_prompts: ask for the log-probabilities of prompts, not of their last position.
        sleeps: ask, sleep on level 2, wake up, and ask again. With no more adapters than slots:
            one that has to come in again would hide a slot that was lost.
    """

    adapters: tuple[str, ...] = ROUTED + BLOCKS
    options: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    whole_prompts: bool = False
    sleeps: bool = False


EAGER: dict[str, Any] = {"enforce_eager": True}
FLASH = {"dtype": "bfloat16", "attention_backend": "FLASH_ATTN"}
V1 = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
TORCH = {"additional_config": {"lora_ext": {"triton": False}}}
# Layers of these models are small: any number of rows may stand below their weights.
EXTENDED = {"additional_config": {"lora_ext": {"extend_weights": 1e6}}}
DUAL = {"VLLM_LORA_ENABLE_DUAL_STREAM": "1"}
PREFETCHED = {"additional_config": {"lora_ext": {"prefetch_weights": True}}}
# The first ones tell most.
ENGINES = {
    # Stock's own kernels know no fp32.
    "stock": Engine(("plain-a",), EAGER | {"dtype": "bfloat16"}, {"VLLM_LORA_EXT_DISABLE": "1"}),
    "eager": Engine(options=EAGER),
    "graphs": Engine(),
    "graphs-v1": Engine(env=V1),
    "bf16": Engine(options=FLASH),
    "torch": Engine(options=EAGER | TORCH),
    "dual": Engine(env=DUAL),
    "extended": Engine(ROUTED, EXTENDED),
    "fused": Engine(ROUTED, {"additional_config": {"lora_ext": {"fuse_activation": True}}}),
    "prefetched": Engine(options=PREFETCHED, env=DUAL),
    "sleep": Engine(SLEEPERS, {"enable_sleep_mode": True}, sleeps=True),
    "qwen2": Engine(("meteora-a",)),
    "eager-v1": Engine(options=EAGER, env=V1),
    "bf16-eager": Engine(options=EAGER | {"dtype": "bfloat16"}),
    "per-count": Engine(options={"specialize_active_lora": True}),
    "prompts": Engine(options=EAGER, whole_prompts=True),
}
USUAL = {
    "dtype": "float32", "attention_backend": "TRITON_ATTN", "gpu_memory_utilization": 0.3,
    "max_num_seqs": 32, "max_num_batched_tokens": 256,
}  # fmt: skip
# Where there is no GPU this file can be tried: `--on-cpu`.
ON_CPU = {"max_num_seqs": 8, "max_num_batched_tokens": 64}
# fp32 means fp32: Triton's default would be TF32, also in vLLM's attention.
ENVIRONMENT = {"TRITON_F32_DEFAULT": "ieee", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}


def one(name: str, on_cpu: bool) -> dict[str, Any]:
    """Starts the engine `name`, asks it, and says how far off it was."""
    sys.path.insert(0, str(REPO))
    from integration_tests import engines as e

    sys.path.pop(0)
    engine = ENGINES[name]
    options = USUAL | engine.options
    names = engine.adapters
    if on_cpu:
        options = {k: v for k, v in engine.options.items() if k not in TORCH} | ON_CPU
        options.pop("attention_backend", None)
        names = names[:2]
    fixtures = [e.recorded(adapter) for adapter in names]
    start = time.monotonic()
    llm = e.make_engine(fixtures[0].base, **options)
    answer: dict[str, Any] = {"start_s": time.monotonic() - start, "facts": of_engine(llm)}
    start = time.monotonic()
    exact = options.get("dtype", "float32") == "float32"
    answer |= ask(e, llm, fixtures, exact, engine.whole_prompts)
    if engine.sleeps and answer["state"] == RIGHT:
        llm.collective_rpc(_keep)
        llm.sleep(level=2)
        llm.wake_up()
        llm.collective_rpc(_put_back)
        answer["asleep"] = ask(e, llm, fixtures, exact, engine.whole_prompts)
        answer["state"] = answer["asleep"]["state"]
    answer["run_s"] = time.monotonic() - start
    e.close(llm)
    return answer


def _keep(worker: Any) -> None:
    parameters = worker.get_model().named_parameters()
    worker.kept_weights = {name: weight.detach().cpu() for name, weight in parameters}


def _put_back(worker: Any) -> None:
    """What a trainer does after a sleep of level 2: the base model's weights anew."""
    for name, weight in worker.get_model().named_parameters():
        weight.data.copy_(worker.kept_weights[name])


def ask(e: Any, llm: Any, fixtures: list[Any], exact: bool, whole: bool) -> dict[str, Any]:
    """Everything that one engine is asked: the worst and the median errors, equal tokens, a state.

    Args:
        e: the helpers of the integration tests.
        exact: fp32.
    """
    requests, wanted, owners = [], [], []
    for i, prompt in enumerate(fixtures[0].prompts):
        lengths = range(1, len(prompt) + 1, 1 if len(prompt) < 20 else 5)
        for length in (len(prompt),) if whole else (*lengths, len(prompt)):
            for fx in fixtures:
                requests.append((fx.prompts[i][:length], e.lora(fx.name, fx.folder)))
                wanted.append(fx.logits[i][:length])
                owners.append(fx.name)
            requests.append((prompt[:length], None))
            wanted.append(fixtures[0].base_logits[i][:length])
            owners.append("base")
    vocab = wanted[0].shape[1]
    logprobs = e.prompt_logprobs if whole else e.last_logprobs
    per: dict[str, list[float]] = {}
    for owner, got, want in zip(owners, logprobs(llm, requests, vocab), wanted, strict=True):
        got = got.reshape(-1, vocab)
        per.setdefault(owner, []).extend(position_errors(got, want[-len(got) :]))
    base = [(p, None) for p in fixtures[0].prompts]
    alone = [max(position_errors(g.reshape(-1, vocab)[-1:], w[-1:])) for g, w in
             zip(logprobs(llm, base, vocab), fixtures[0].base_logits, strict=True)]  # fmt: skip
    same = equal_tokens(e, llm, fixtures)
    answer: dict[str, Any] = {
        "worst": {owner: max(values) for owner, values in per.items()},
        "median": {owner: statistics.median(values) for owner, values in per.items()},
        "greedy": {owner: f"{sum(s)}/{len(s)}" for owner, s in same.items()},
        "base_only": max(alone),
    }
    answer["state"] = RIGHT if is_right(answer, exact) else "wrong"
    return answer


def equal_tokens(e: Any, llm: Any, fixtures: list[Any]) -> dict[str, list[bool]]:
    """Whether the greedy tokens are the authors', by adapter: twice together, once alone."""
    same: dict[str, list[bool]] = {}
    for _ in range(2):
        outputs = e.run(llm, [(p, e.lora(fx.name, fx.folder)) for fx in fixtures
                              for p in fx.prompts], e.greedy())  # fmt: skip
        greedy = [(fx.name, g) for fx in fixtures for g in fx.greedy]
        for (owner, want), got in zip(greedy, outputs, strict=True):
            same.setdefault(owner, []).append(e.tokens(got) == want)
    for fx in fixtures:
        (got,) = e.run(llm, [(fx.prompts[-1], e.lora(fx.name, fx.folder))], e.greedy())
        same[fx.name].append(e.tokens(got) == fx.greedy[-1])
    return same


def is_right(answer: dict[str, Any], exact: bool) -> bool:
    """Whether an engine's errors are within the bounds of its dtype."""
    base = max(answer["worst"]["base"], answer["base_only"])
    if not exact:
        return max(answer["median"].values()) < 0.5 and base < 2
    mine = max(error for owner, error in answer["worst"].items() if owner != "base")
    equal = all(len(set(counts.split("/"))) == 1 for counts in answer["greedy"].values())
    return mine < max(2e-3, 3 * base) and base < 2e-2 and equal


def position_errors(got: Any, logits: Any) -> list[float]:
    """Largest difference of a log-probability at each position; NaN counts as infinite."""
    import torch

    off = (got.double() - torch.log_softmax(logits.double(), -1)).abs().amax(dim=1)
    errors: list[float] = torch.nan_to_num(off, nan=float("inf")).tolist()
    return errors


def line(name: str, a: dict[str, Any]) -> str:
    if "worst" not in a:
        return f"{name:11} {a['state']}"
    mine = {k: v for k, v in a["worst"].items() if k != "base"}
    which = max(mine, key=mine.__getitem__)
    good, total = (sum(int(g.split("/")[i]) for g in a["greedy"].values()) for i in (0, 1))
    return (
        f"{name:11} {a['state']:6} start {a['start_s']:4.0f} s, run {a['run_s']:4.0f} s; off by"
        f" {mine[which]:.1e} ({which}), base rows {a['worst']['base']:.1e}; greedy {good}/{total};"
        f" {a['facts']['graph_mode']}, {a['facts']['attention_backend']}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--each", type=float, default=150, help="most seconds of one engine")
    parser.add_argument("--only", default="all")
    parser.add_argument("--on-cpu", action="store_true", help="to try this without a GPU")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    if args.list:
        print("\n".join(ENGINES))
        return 0
    if args.out is None:
        parser.error("--out is missing")
    if args.one:
        args.out.write_text(json.dumps(one(args.one, args.on_cpu)))
        return 0
    wanted = list(ENGINES) if args.only == "all" else args.only.split(",")
    if unknown := set(wanted) - set(ENGINES):
        parser.error(f"no engine {', '.join(sorted(unknown))}; --list names them")
    found, own = kept(args.out), key()
    end = time.monotonic() + args.seconds - 10
    for name in wanted:
        if found.get(name, {}).get("state") == RIGHT:
            continue
        found[name] = {**_bounded(name, args, end - time.monotonic()), "key": own}
        print(line(name, found[name]), flush=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    print("\n" + "\n".join(line(name, a) for name, a in found.items()))
    return exit_code([found[name]["state"] for name in wanted], RIGHT)


def _bounded(name: str, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """One engine in a process of its own, for `seconds` at most: what is left of all."""
    if seconds < STARTS:
        return {"state": INCOMPLETE}
    print(f"--- {name}", flush=True)
    part = args.out.with_suffix(f".{name}.tmp")
    command = [sys.executable, "-P", __file__, "--one", name, "--out", str(part)]
    command += ["--on-cpu"] if args.on_cpu else []
    part.unlink(missing_ok=True)
    ended = run(command, min(args.each, seconds), {**ENVIRONMENT, **ENGINES[name].env})
    state = ended.state
    if state == TIME_LIMIT and seconds < args.each:  # the next call gives it more
        state = INCOMPLETE
    found = json.loads(part.read_text()) if part.exists() else {"state": state}
    part.unlink(missing_ok=True)
    return found


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    sys.exit(main())
