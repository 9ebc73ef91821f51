"""Gates that are computed from an instruction by the base model itself: the engine core's part.

An instruction goes through the engine as a request of its own, without an adapter, that reads
nothing from the prefix cache. When it is done the workers hold its gate. Gates are remembered by
the adapter's content and the instruction's ids.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest, FinishReason

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.instruction import MARK

GATE = "lora_ext_gate"
"""Method of the core: the gate of an instruction, `{"gate": text, "computed": bool}` or `{"error":
text}`; text is fp32 little-endian in base64."""
FINISH = "lora_ext_finish_gate"
"""Method of the worker (`worker_rpc`)."""

_REMEMBERED = 1024
_Key = tuple[str, tuple[int, ...]]
Answer = dict[str, Any]


@dataclass
class _Asked:
    lora_id: int
    key: _Key
    waiting: list[Future[Answer]] = field(default_factory=list)


class GatePasses:
    """Of one engine core.

    Args:
        rpc: calls a method of every worker and returns all answers.
    """

    def __init__(self, core: Any, rpc: Callable[..., list[Any]]) -> None:
        self._core, self._rpc = core, rpc
        self._known: OrderedDict[_Key, str] = OrderedDict()
        self._asked: dict[str, _Asked] = {}
        self._count = 0

    @property
    def pending(self) -> bool:
        """Whether an instruction is on its way."""
        return bool(self._asked)

    @property
    def adapters(self) -> set[int]:
        """Ids of those whose gates are on their way: the workers must still hold them."""
        return {asked.lora_id for asked in self._asked.values()}

    def ask(self, lora_id: int, version: str, ids: list[int]) -> Future[Answer]:
        """The gate of an instruction for an adapter that the workers hold.

        Raises:
            AdapterError: `bad_value`, `unsupported_feature`.
        """
        self._check(ids)
        key, answer = (version, tuple(ids)), Future[Answer]()
        known = self._known.get(key)
        if known is not None:
            self._known.move_to_end(key)
            answer.set_result({"gate": known, "computed": False})
            return answer
        for asked in self._asked.values():
            if asked.key == key:
                asked.waiting.append(answer)
                return answer
        self._count += 1
        request_id = f"{GATE}-{self._count}"
        params = SamplingParams(
            max_tokens=1, temperature=0.0, detokenize=False, ignore_eos=True,
            skip_reading_prefix_cache=True, extra_args={MARK: lora_id},
        )  # fmt: skip
        made = self._core.preprocess_add_request(EngineCoreRequest(
            request_id=request_id, prompt_token_ids=list(ids), mm_features=None,
            sampling_params=params, pooling_params=None, arrival_time=time.time(),
            lora_request=None, cache_salt=None, data_parallel_rank=None,
        ))  # fmt: skip
        self._core.add_request(*made)
        self._asked[request_id] = _Asked(lora_id, key, [answer])
        return answer

    def take(self, outputs: dict[int, Any] | None) -> None:
        """Takes the outputs of instructions out of a step's, and answers who waits for them."""
        if not self._asked:
            return
        for mine in (outputs or {}).values():
            if mine.finished_requests:
                mine.finished_requests -= self._asked.keys()
            for output in [o for o in mine.outputs if o.request_id in self._asked]:
                mine.outputs.remove(output)
                if output.finish_reason is not None:
                    self._end(output.request_id, output.finish_reason is FinishReason.LENGTH)
        there = self._core.scheduler.requests
        for request_id in [r for r in self._asked if r not in there]:
            self._end(request_id, False)

    def _end(self, request_id: str, whole: bool) -> None:
        asked = self._asked.pop(request_id)
        answer = self._collect(request_id)
        if not whole:
            answer = {"error": str(AdapterError(
                "cancelled", "the pass over the instruction was called off",
                fix="send the request again",
            ))}  # fmt: skip
        elif "gate" in answer:
            self._known[asked.key] = answer["gate"]
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        for i, waiting in enumerate(asked.waiting):
            waiting.set_result(answer if "error" in answer else answer | {"computed": i == 0})

    def _collect(self, request_id: str) -> Answer:
        """What the workers say, each `{"gate": text or None}` or `{"error": text}`."""
        answers: list[Answer] = self._rpc(FINISH, request_id)
        errors = [answer for answer in answers if "error" in answer]
        gates = [answer for answer in answers if answer.get("gate") is not None]
        return (errors or gates)[0]

    def _check(self, ids: list[int]) -> None:
        model = self._core.vllm_config.model_config
        if model.runner_type != "generate":
            raise AdapterError(
                "unsupported_feature", "the adapter's gate is computed by a model that generates",
                seen=model.runner_type, limit="generate", fix="serve it without --runner pooling",
            )  # fmt: skip
        vocabulary, most = model.get_vocab_size(), model.max_model_len - 1
        fine = all(type(i) is int and 0 <= i < vocabulary for i in ids)
        if not fine or not 1 <= len(ids) <= most:
            raise AdapterError(
                "bad_value", "'instruction' cannot be computed by this model",
                seen=f"{len(ids)} tokens, {min(ids, default=0)} to {max(ids, default=0)}",
                limit=f"1 to {most} tokens, each below {vocabulary}", fix="mend 'instruction'",
            )  # fmt: skip
