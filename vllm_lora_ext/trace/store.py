"""TraceStore: the traces that an engine's process holds, within bounds."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.trace.data import MAX_BYTES, Trace, natural


@dataclass
class _Record:
    """One request: pieces of [n, E] gates and of n token ids, each with its first position."""

    prompt: list[int]
    adapter: str
    system: str
    base: str
    owner: str
    ids: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    gates: dict[str, list[tuple[int, torch.Tensor]]] = field(default_factory=dict)
    stop: int = 0
    num_bytes: int = 0
    too_large: bool = False


class TraceStore:
    """Traces by the engine's request ids; the least recently started goes first.

    Attributes:
        max_requests: traces that are kept.
        max_bytes: of gates, all traces together. One that needs more alone is not kept.
        max_untraced: ids of other requests that are remembered, for a better message.
    """

    max_requests, max_bytes, max_untraced = 64, MAX_BYTES, 4096

    def __init__(self) -> None:
        self._records: OrderedDict[str, _Record] = OrderedDict()
        self._untraced: OrderedDict[str, None] = OrderedDict()
        self._bytes = 0

    def start(
        self, key: str, prompt: Sequence[int], adapter: str = "", system: str = "",
        base: str = "", owner: str = "",
    ) -> None:  # fmt: skip
        """Begins a trace; one that goes on after a preemption keeps what it has.

        Args:
            owner: who alone may have it.
        """
        if key in self._records:
            return
        self._records[key] = _Record(list(prompt), adapter, system, base, owner)
        while len(self._records) > self.max_requests:
            self._drop_oldest()

    def pass_by(self, key: str) -> None:
        """Remembers a request that asked for no trace."""
        self._untraced[key] = None
        while len(self._untraced) > self.max_untraced:
            self._untraced.popitem(last=False)

    def put_ids(self, key: str, at: int, ids_T: torch.Tensor) -> None:
        """The tokens of positions `at`, `at + 1`, ..."""
        record = self._records.get(key)
        if record is not None and not record.too_large:
            record.ids.append((at, ids_T))
            record.stop = max(record.stop, at + len(ids_T))
            self._count(record, ids_T)

    def put_gates(self, key: str, at: int, module: str, gates_TE: torch.Tensor) -> None:
        """The gates of one module at positions `at`, `at + 1`, ...: [n, E] fp32."""
        record = self._records.get(key)
        if record is not None and not record.too_large:
            record.gates.setdefault(module, []).append((at, gates_TE))
            record.stop = max(record.stop, at + len(gates_TE))
            self._count(record, gates_TE)

    def get(self, request_id: str, prompt: int = 0, choice: int = 0, owner: str = "") -> Trace:
        """The trace of a request, or of what has been computed of it so far.

        Args:
            owner: who asks; a trace of somebody else's is not there.
            request_id: as in the answer. The engine adds the number of the prompt behind it, the
                number of the choice before it where several were asked for, and random digits.
        Raises:
            AdapterError: `not_found`, `not_traced`, `too_large`.
        """
        pattern = _pattern(request_id, prompt, choice)
        for key, record in reversed(self._records.items()):
            if record.owner == owner and pattern.fullmatch(key):
                return self._trace(request_id, record)
        if any(pattern.fullmatch(key) for key in reversed(self._untraced)):
            raise AdapterError(
                "not_traced", "the request did not ask for a trace", seen=request_id,
                fix='send it with "vllm_xargs": {"lora_ext_trace": 1}',
            )  # fmt: skip
        raise AdapterError(
            "not_found", "no trace of such a request is kept", seen=request_id,
            limit=f"the last {self.max_requests} traced requests",
            fix="use the id in the answer, and fetch the trace soon after",
        )  # fmt: skip

    def _trace(self, request_id: str, record: _Record) -> Trace:
        if record.too_large:
            raise AdapterError(
                "too_large", "the trace needs more memory than is given to traces",
                seen=request_id, limit=f"{self.max_bytes >> 20} MB", fix="trace a shorter request",
            )  # fmt: skip
        ids = record.prompt[: record.stop] + [-1] * (record.stop - len(record.prompt))
        for at, ids_T in record.ids:
            ids[at : at + len(ids_T)] = ids_T.tolist()
        weights = {}
        for module in sorted(record.gates, key=natural):
            pieces = record.gates[module]
            width = pieces[0][1].shape[1]
            weights[module] = torch.full((record.stop, width), float("nan"))
            for at, gates_TE in pieces:
                weights[module][at : at + len(gates_TE)] = gates_TE
        return Trace(
            ids, weights, min(len(record.prompt), record.stop), adapter=record.adapter,
            system=record.system, base=record.base,
        )  # fmt: skip

    def _count(self, record: _Record, more: torch.Tensor) -> None:
        record.num_bytes += more.nbytes
        self._bytes += more.nbytes
        if record.num_bytes > self.max_bytes:
            self._bytes -= record.num_bytes
            record.num_bytes, record.too_large = 0, True
            record.ids.clear()
            record.gates.clear()
        while self._bytes > self.max_bytes:
            self._drop_oldest(but=record)

    def _drop_oldest(self, but: _Record | None = None) -> None:
        key = next(k for k, r in self._records.items() if r is not but)
        self._bytes -= self._records.pop(key).num_bytes


def _pattern(request_id: str, prompt: int, choice: int) -> re.Pattern[str]:
    several = f"{choice}_" if choice else "(?:0_)?"
    number = f"[-_]{prompt}" if prompt else "(?:[-_]0)?"
    return re.compile(f"{several}{re.escape(request_id)}{number}(?:-[0-9a-f]{{8}})?")
