"""What `trans_lora.py` asks of vLLM: made-up questions, which of them look real, and answers.

A model that sees a few questions of a task writes another one; nothing tells it what the task is.
A discriminator, a LoRA adapter that answers "yes" to the task's real questions and "no" to made-up
ones, is an adapter like any other: the engine serves it beside the one that does the task.
"""

from __future__ import annotations

import math
import os
import random
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tasks import Item

YES, NO = "yes", "no"
SHOTS = 5  # questions in a prompt
LONGEST = 400  # characters of a question
PER_ROUND, PER_PROMPT = 256, 4
_LABEL = re.compile(r"^(?:question\s*:|[-*•]|\d+[.)])\s+", re.IGNORECASE)


def few_shot(seeds: list[str], order: random.Random) -> str:
    """A prompt that ends where the next question begins."""
    shown = order.sample(seeds, min(SHOTS, len(seeds)))
    return "Questions of one kind:\n" + "".join(f"Question: {q}\n" for q in shown) + "Question:"


def parse(text: str) -> str | None:
    """The question in a completion: its first line, without a list's mark; None if it is empty."""
    line = text.strip().split("\n")[0].strip()
    line = _LABEL.sub("", line).strip()
    return line if 0 < len(line) <= LONGEST else None


def fresh(questions: Iterable[str | None], seen: set[str]) -> list[str]:
    """Those that are not in `seen`, which grows by them. Case and blanks make no difference."""
    found = []
    for question in questions:
        key = same(question or "")
        if key and key not in seen:
            seen.add(key)
            found.append(question)
    return found


def same(question: str) -> str:
    return " ".join(question.split()).casefold()


def judged(real: Iterable[str], made_up: Iterable[str]) -> list[Item]:
    """What the discriminator learns."""
    return [Item(q, YES) for q in real] + [Item(q, NO) for q in made_up]


def probability_of_real(logprobs: Mapping[int, float], yes: int, no: int) -> float:
    """From the log-probabilities of the answer's first token; 0 where neither is among them."""
    missing = -math.inf
    a, b = logprobs.get(yes, missing), logprobs.get(no, missing)
    return 0.0 if a == missing else 1 / (1 + math.exp(min(b - a, 700.0)))


def split(questions: list[str], real: list[float]) -> tuple[list[str], list[str]]:
    """Those that the discriminator takes as real, and the others."""
    kept = [q for q, p in zip(questions, real, strict=True) if p >= 0.5]
    return kept, [q for q, p in zip(questions, real, strict=True) if p < 0.5]


class Engine:
    """A base model in vLLM, with any adapters that fit it. A context manager."""

    def __init__(self, base: Path, rank: int, seed: int) -> None:
        os.environ |= {
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false",
            "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",  # this process has run torch threads
            # The same batches in every run, and so the same questions from one seed.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }  # fmt: skip
        from transformers import AutoTokenizer
        from vllm import LLM

        self.base, self.tokenizer = base, AutoTokenizer.from_pretrained(base)
        self.order = random.Random(seed)
        self.numbers: dict[Path, int] = {}
        self.llm = LLM(
            model=str(base), dtype="bfloat16", max_model_len=512, max_num_seqs=64, seed=seed,
            block_size=32, enable_lora=True, max_loras=2, max_lora_rank=rank,
            enforce_eager=True,  # compiling takes longer than it saves here
            disable_log_stats=True,
        )  # fmt: skip

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.llm.llm_engine.engine_core.shutdown()

    def synthesise(self, seeds: list[str]) -> list[str | None]:
        """New questions by the base model alone; repetitions are still among them."""
        from vllm import SamplingParams

        prompts = [few_shot(seeds, self.order) for _ in range(PER_ROUND // PER_PROMPT)]
        longest = max(len(self.tokenizer(q)["input_ids"]) for q in seeds)
        # No seed per request: on a CPU, vLLM 0.32 ends when a seeded prompt is read in two chunks.
        # The engine has one.
        params = SamplingParams(n=PER_PROMPT, temperature=1.0, max_tokens=2 * longest, stop=["\n"])
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [parse(c.text) if _ended(c) else None for o in outputs for c in o.outputs]

    def answers(
        self, questions: list[str], adapter: Path | None = None, max_tokens: int = 32
    ) -> list[str | None]:
        """Greedy answers; None where one was not finished after `max_tokens`."""
        outputs = self._ask(questions, adapter, max_tokens=max_tokens)
        return [o.outputs[0].text.strip() if _ended(o.outputs[0]) else None for o in outputs]

    def real(self, questions: list[str], discriminator: Path) -> list[float]:
        """How sure the discriminator is that each question is a real one."""
        words = self.tokenizer([YES, NO], add_special_tokens=False)["input_ids"]
        yes, no = (ids[0] for ids in words)
        found = []
        for output in self._ask(questions, discriminator, max_tokens=1, logprobs=20):
            first = output.outputs[0].logprobs[0]
            found.append(probability_of_real({t: e.logprob for t, e in first.items()}, yes, no))
        return found

    def _ask(self, questions: list[str], adapter: Path | None, **options: Any) -> list[Any]:
        from smollm import prompt_ids
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        request = None
        if adapter is not None:
            if adapter not in self.numbers:
                check_fits(self.base, adapter)
            number = self.numbers.setdefault(adapter, len(self.numbers) + 1)
            request = LoRARequest(f"adapter-{number}", number, str(adapter))
        prompts = [{"prompt_token_ids": prompt_ids(self.tokenizer, q)} for q in questions]
        params = SamplingParams(temperature=0, **options)
        return self.llm.generate(prompts, params, lora_request=request, use_tqdm=False)


def check_fits(base: Path, adapter: Path) -> None:
    """Raises the AdapterError that vLLM would, which would log much more about it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from vllm_lora_ext.adapters import load_adapter
    from vllm_lora_ext.adapters.hf import apply_adapter

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    apply_adapter(model, load_adapter(adapter)).remove()


def _ended(completion: Any) -> bool:
    return completion.finish_reason == "stop"
