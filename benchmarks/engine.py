"""An engine in a process of its own, for benchmarks that let several take turns on one machine."""

from __future__ import annotations

import multiprocessing as mp
import os
import time
from pathlib import Path
from typing import Any

import torch

Prompts = list[list[int]]
_context = mp.get_context("spawn")


class Engine:
    """vLLM with a base model in bf16 on the CPU, and optionally LoRA.

    Args:
        kind: `base` (stock vLLM without LoRA), `stock` (with LoRA) or `plugin` (with LoRA, and
            with the plugin).
        base: the base model's folder.
        adapters: name and folder of every adapter that will be asked for.
        cores: `VLLM_CPU_OMP_THREADS_BIND`.
    """

    def __init__(self, kind: str, base: str, adapters: dict[str, Path], cores: str) -> None:
        self._pipe, far = _context.Pipe()
        args = (kind, base, adapters, far, cores)
        self._process = _context.Process(target=_serve, args=args)
        self._process.start()
        far.close()  # so that an engine that ends is an EOFError here, not a wait without end
        if self._pipe.recv() != "ready":
            raise RuntimeError(f"engine {kind} did not start")

    def ask(
        self, what: str, prompts: Prompts, count: int, says: dict[str, Any] | None = None
    ) -> tuple[float, Prompts]:
        """Seconds, and `count` greedy tokens for each prompt, of adapter `what` or of `base`.

        Args:
            says: the requests' field `lora_ext`; adapters that it names are loaded before.
        """
        self._pipe.send((what, prompts, count, says))
        answer: tuple[float, Prompts] = self._pipe.recv()
        return answer

    def wake(self) -> None:
        """A request that is not timed: after another engine's turn, the first one finds its
        threads asleep and the caches full of the other's weights."""
        self.ask("base", [list(range(1000, 1064))], 2)

    def stop(self) -> None:
        self._pipe.send(None)
        self._process.join(20)


def _serve(kind: str, base: str, adapters: dict[str, Path], pipe: Any, cores: str) -> None:
    os.environ |= {
        "VLLM_LORA_EXT_DISABLE": "0" if kind == "plugin" else "1", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }  # fmt: skip
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    lora = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 64} if kind != "base" else {}
    llm = LLM(
        model=base, dtype="bfloat16", max_model_len=512, max_num_seqs=32, seed=0,
        max_num_batched_tokens=2048, enable_prefix_caching=False, disable_log_stats=True, **lora,
    )  # fmt: skip
    requests = {
        name: LoRARequest(name, i, str(f)) for i, (name, f) in enumerate(adapters.items(), 1)
    }
    pipe.send("ready")
    while (job := pipe.recv()) is not None:
        what, prompts, count, says = job
        params = SamplingParams(
            temperature=0, max_tokens=count, ignore_eos=True,
            extra_args={"lora_ext": says} if says else None,
        )  # fmt: skip
        for named in (says or {}).get("adapters", ()):
            llm.llm_engine.add_lora(requests[named["name"]])
        start = time.perf_counter()
        outputs = llm.generate(
            [{"prompt_token_ids": p} for p in prompts], params,
            lora_request=requests.get(what), use_tqdm=False,
        )  # fmt: skip
        pipe.send((time.perf_counter() - start, [list(o.outputs[0].token_ids) for o in outputs]))


def check_greedy(model: Any, prompt: list[int], tokens: list[int], what: str) -> None:
    """Ends the benchmark where `tokens` are not what transformers would choose.

    Up to the first near tie (0.25 in a logit, in bf16), behind which the texts part.
    """
    ids = list(prompt)
    for step, token in enumerate(tokens):
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, -1].float()
        if (gap := float(logits.max() - logits[token])) > 0.25:
            raise SystemExit(f"check failed: {what}, token {step}, logit gap {gap:.2f}")
        if gap > 0:
            break
        ids.append(token)
