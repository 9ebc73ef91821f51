"""What it is worth that the experts of a reward model share batches.

    python benchmarks/reward.py [--texts 32] [--tokens 64] [--pairs 5] [--out FILE.json]

A random DMoERM of five experts in each of two categories, over a random Llama of 30 M parameters in
float32 on the CPU. The same texts three times, in turn:

    one call    all texts in one call: the experts of all texts share batches
    per text    a call for each text: its five experts share a batch
    per expert  a call for each expert of each text, one after the other; the router and the
                network run in all three

Ratios of throughput (texts per second) to the last, medians over pairs. Nothing is timed before the
rewards are those of the definition in transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO)]
os.environ |= {
    "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
}  # fmt: skip

from tests.make_reward import bare, defined, make_reward_model  # noqa: E402
from vllm_lora_ext import RewardModel  # noqa: E402

POINTS = {"chat": list("abcde"), "text": list("vwxyz")}


def make(root: Path) -> tuple[Path, Path]:
    """The reward model, and its base."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=8000, hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=512,
    )  # fmt: skip
    folder = make_reward_model(root / "reward", config, POINTS, rank=32, alpha=32, middle=512)
    bare(config, 1000).save_pretrained(root / "base")
    return folder, root / "base"


def check(folder: Path, base: Path, model: RewardModel, texts: list[dict[str, list[int]]]) -> None:
    from transformers import AutoModel

    plain = AutoModel.from_pretrained(base, dtype=torch.float32).eval()
    for text, said in zip(texts, model.score(texts), strict=True):
        _, wanted = defined(folder, plain, text["router_ids"], text["inner_ids"])
        if wanted is None or said.reward is None or abs(wanted - said.reward) > 5e-3:
            raise SystemExit(f"check failed: {said.reward}, and {wanted} by the definition")


def each_expert(model: RewardModel, llm: Any, texts: Sequence[Mapping[str, list[int]]]) -> None:
    """As `model.score`, but a call for each pass."""
    from vllm_lora_ext.model_patches.rewards import TASK, params

    judge = model._judge
    for text in texts:
        readings = [judge.read(dict(text), "text")]
        probs_TC = judge.route(readings)
        passes = judge.passes(readings, probs_TC)
        hidden = [
            llm.encode(
                [{"prompt_token_ids": one.ids}], params(), pooling_task=TASK, use_tqdm=False,
                lora_request=[model._experts[one.category, one.number]],
            )[0].outputs.data
            for one in passes
        ]  # fmt: skip
        judge.rewards(probs_TC, passes, hidden)


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from vllm import LLM
    from vllm.config import PoolerConfig

    with tempfile.TemporaryDirectory() as scratch:
        folder, base = make(Path(scratch))
        llm = LLM(
            model=str(base), runner="pooling", convert="embed", dtype="float32", block_size=32,
            pooler_config=PoolerConfig(seq_pooling_type="LAST"), skip_tokenizer_init=True,
            enable_lora=True, max_loras=10, max_cpu_loras=10, max_lora_rank=32,
            enable_prefix_caching=False, disable_log_stats=True, seed=0,
        )  # fmt: skip
        model = RewardModel(folder, llm)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(8000, (args.texts, args.tokens), generator=generator).tolist()
        texts = [{"router_ids": row[:8], "inner_ids": row} for row in ids]
        check(folder, base, model, texts[:4])
        runs: dict[str, Callable[[], object]] = {
            "one call": lambda: model.score(texts),
            "per text": lambda: [model.score([text]) for text in texts],
            "per expert": lambda: each_expert(model, llm, texts),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(args.pairs + 1):
            for name in sorted(runs, reverse=bool(turn % 2)):
                taken = timed(runs[name])
                if turn:  # the first makes what is made once
                    seconds[name].append(taken)
        llm.llm_engine.engine_core.shutdown()
    ratios = {
        name: round(statistics.median(
            b / a for a, b in zip(seconds[name], seconds["per expert"], strict=True)
        ), 2) for name in ("one call", "per text")
    }  # fmt: skip
    result = {
        "cores": os.cpu_count(), "texts": args.texts, "tokens": args.tokens,
        "experts": len(POINTS["chat"]),
        "throughput over a call per expert": ratios,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
