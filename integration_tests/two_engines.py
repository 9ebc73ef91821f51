"""Three engines of one configuration in one process, for `test_two_engines`.

    python -m integration_tests.two_engines RESULT.json

Each has one slot, and its own adapter in it. The first compiles; the others load what it saved.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from vllm.compilation.counter import compilation_counter
from vllm.v1.engine import core

from integration_tests.engines import close, lora, make_engine, prompt_logprobs, recorded, worst

# In the first engine, in the second, in the third.
ADAPTERS = ("plain-a", "loramoe-a", "plain-a")


def main(result_file: str) -> None:
    # With any engine of a process vLLM ends the process's groups, and so every other engine: kept,
    # since what is asked here is what the plugin and the compiled code leave to the others.
    core.cleanup_dist_env_and_memory = lambda *_, **__: None
    starts: list[dict[str, int]] = []
    errors: dict[str, Any] = {}
    first = start(starts)
    errors["the first alone"] = {"first": ask(first, ADAPTERS[0])}
    second = start(starts)
    errors["both"] = {"second": ask(second, ADAPTERS[1]), "first": ask(first, ADAPTERS[0])}
    close(first)
    del first
    gc.collect()
    errors["the first dropped"] = {"second": ask(second, ADAPTERS[1])}
    third = start(starts)
    errors["a third"] = {"third": ask(third, ADAPTERS[2]), "second": ask(second, ADAPTERS[1])}
    close(third)
    del third
    gc.collect()
    errors["the third dropped"] = {"second": ask(second, ADAPTERS[1])}
    close(second)
    Path(result_file).write_text(json.dumps({"starts": starts, "errors": errors}))


def start(starts: list[dict[str, int]]) -> Any:
    before = counts()
    torch._dynamo.reset()
    llm = make_engine("base_llama", max_loras=1, max_cpu_loras=1, enable_prefix_caching=False)
    starts.append({name: n - before[name] for name, n in counts().items()})
    return llm


def counts() -> dict[str, int]:
    return {
        "compiled": compilation_counter.num_aot_compiles,
        "loaded": compilation_counter.num_aot_artifacts_loaded,
    }


def ask(llm: Any, name: str) -> dict[str, float]:
    """Largest error of any log-probability, with the adapter and of the base, in one batch."""
    known = recorded(name)
    vocabulary = known.logits[0].shape[-1]
    requests = [(ids, a) for a in (lora(name, known.folder), None) for ids in known.prompts]
    got = prompt_logprobs(llm, requests, vocabulary)
    wanted = [*known.logits, *known.base_logits]
    errors = [worst(g, w) for g, w in zip(got, wanted, strict=True)]
    half = len(known.prompts)
    return {name: max(errors[:half]), "base": max(errors[half:])}


if __name__ == "__main__":
    main(sys.argv[1])
