"""Stock vLLM's numbers for plain adapters: run in a process with VLLM_LORA_EXT_DISABLE=1.

    python -m integration_tests.stock_numbers JOB.json OUT.pt

JOB holds `base`, `adapters` [name, folder] and `prompts`; OUT gets the log-probabilities after the
last position of each prompt with each adapter (stock CPU workers crash on prompt_logprobs).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from integration_tests.engines import greedy, last_logprobs, lora, make_engine, run, tokens


def numbers(llm, adapters, prompts):
    """Per adapter: last-position log-probabilities and greedy tokens, one adapter to a batch."""
    found = {}
    for name, folder in adapters:
        requests = [(p, lora(name, folder)) for p in prompts]
        steps = [tokens(o) for o in run(llm, requests, greedy())]
        found[name] = (last_logprobs(llm, requests, 512), steps)
    return found


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    engine = make_engine(job["base"], enforce_eager=True)
    torch.save(numbers(engine, job["adapters"], job["prompts"]), sys.argv[2])
