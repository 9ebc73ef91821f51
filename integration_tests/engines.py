"""Engines and numbers that the integration tests share. A start costs 20-45 s: few, reused."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures"
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # tests poison weights through collective_rpc
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
worker = os.environ.get("PYTEST_XDIST_WORKER")
if worker is not None and "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
    # Engines that run side by side would wait for each other's spinning threads.
    cores = sorted(os.sched_getaffinity(0))
    core = cores[int(worker.removeprefix("gw")) % len(cores)]
    ENVIRONMENT |= {"VLLM_CPU_OMP_THREADS_BIND": str(core), "OMP_NUM_THREADS": "1"}


def base_path(name: str) -> Path:
    return FIXTURES / "bases" / name


def make_engine(base: str | Path, **overrides: Any) -> Any:
    """An offline fp32 engine on a tiny base, LoRA on, small prefill chunks, prefix cache on."""
    os.environ.update(ENVIRONMENT)
    from vllm import LLM

    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":
        from integration_tests import forked

        forked.use()
    return LLM(**engine_options(base, **overrides))


def engine_options(base: str | Path, **overrides: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "model": str(base_path(base) if isinstance(base, str) else base),
        "skip_tokenizer_init": True, "dtype": "float32",
        "enable_lora": True, "max_loras": 4, "max_cpu_loras": 8, "max_lora_rank": 64,
        "max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 64, "block_size": 32,
        "enable_prefix_caching": True, "max_logprobs": -1, "disable_log_stats": True, "seed": 0,
    }  # fmt: skip
    return options | overrides


def close(llm: Any) -> None:
    """Ends the engine's own processes now, not at garbage collection."""
    llm.llm_engine.engine_core.shutdown()


@dataclass(frozen=True)
class Recorded:
    """A fixture: the authors' files and the authors' numbers."""

    name: str
    folder: Path
    base: str
    prompts: list[list[int]]
    logits: list[torch.Tensor]
    base_logits: list[torch.Tensor]
    greedy: list[list[int]]


def recorded(name: str) -> Recorded:
    root = FIXTURES / "routed" / name
    meta = json.loads((root / "meta.json").read_text())
    e = load_file(root / "expected.safetensors")
    n = sum(key.startswith("prompt_") for key in e)
    folder = next(d for d in (root / "adapter_safetensors", root / "adapter") if d.is_dir())
    return Recorded(
        name, folder, meta["base"],
        [e[f"prompt_{i}"].tolist() for i in range(n)],
        [e[f"logits_{i}"] for i in range(n)],
        [e[f"base_logits_{i}"] for i in range(n)],
        [e[f"greedy_{i}"].tolist() for i in range(n)],
    )  # fmt: skip


_ids: dict[tuple[str, str], int] = {}


def lora(name: str, folder: Path | str) -> Any:
    """A LoRARequest; the same name and folder always get the same id."""
    from vllm.lora.request import LoRARequest

    number = _ids.setdefault((name, str(folder)), len(_ids) + 1)
    return LoRARequest(name, number, str(folder))


def greedy(max_tokens: int = 12, **options: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, **options
    )


def run(llm: Any, requests: list[tuple[list[int], Any]], params: Any) -> list[Any]:
    """One call, so that the requests share batches. Each is (token ids, LoRARequest or None)."""
    prompts = [{"prompt_token_ids": ids} for ids, _ in requests]
    return llm.generate(prompts, params, lora_request=[a for _, a in requests], use_tqdm=False)


def tokens(output: Any) -> list[int]:
    return list(output.outputs[0].token_ids)


def prompt_logprobs(
    llm: Any, requests: list[tuple[list[int], Any]], vocab: int
) -> list[torch.Tensor]:
    """[T, vocab] log-probabilities after every prompt position, of each request."""
    outputs = run(llm, requests, greedy(1, prompt_logprobs=-1, logprobs=-1))
    return [
        torch.stack([_row(r, vocab) for r in o.prompt_logprobs[1:] + o.outputs[0].logprobs])
        for o in outputs
    ]


def last_logprobs(
    llm: Any, requests: list[tuple[list[int], Any]], vocab: int
) -> list[torch.Tensor]:
    """[vocab] log-probabilities after each request's last prompt position."""
    outputs = run(llm, requests, greedy(1, logprobs=-1))
    return [_row(o.outputs[0].logprobs[0], vocab) for o in outputs]


def _row(logprobs: Any, vocab: int) -> torch.Tensor:
    row_V = torch.full((vocab,), float("nan"))
    for token, entry in logprobs.items():
        row_V[token] = entry.logprob
    return row_V


def worst(got: torch.Tensor, logits: torch.Tensor) -> float:
    """Largest difference of any log-probability; NaN counts as infinite."""
    diff = (got.double() - torch.log_softmax(logits.double(), -1)).abs().max().item()
    return diff if diff == diff else float("inf")
