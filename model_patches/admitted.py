"""What the engine core holds, as far as a front end knows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from vllm.lora.request import LoRARequest

from vllm_lora_ext.conditions.column import Column
from vllm_lora_ext.conditions.recipe import is_recipe

_GATES = 1024


@dataclass(frozen=True)
class Understands:
    """What a request may say to one adapter.

    Args:
        columns: its own; user: length of the vector that it needs, None: none.
        instruction: whether it needs one.
    """

    columns: tuple[Column, ...] = ()
    user: int | None = None
    instruction: bool = False

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Understands:
        """From the core's answer."""
        columns = tuple(map(Column.from_dict, said["columns"]))
        return cls(columns, said["user"], said["instruction"])

    @property
    def experts(self) -> tuple[str, ...]:
        """Names by which a request gives gates."""
        return tuple(column.expert for column in self.columns if column.expert)

    @property
    def template(self) -> bool:
        """Whether it is made for each request anew."""
        return self.user is not None or self.instruction

    @property
    def needs(self) -> bool:
        """Whether a request that says nothing is wrong."""
        return self.template or bool(self.experts)


@dataclass(frozen=True)
class _Known:
    request: LoRARequest
    version: str
    understands: Understands


class Admitted:
    """Adapters that the core holds."""

    def __init__(self) -> None:
        self._held: set[int] = set()
        self._known: dict[int, _Known] = {}  # what was loaded last, held or evicted since
        self._named: dict[str, LoRARequest] = {}
        self._models: Mapping[str, LoRARequest] | None = None
        self._gates: OrderedDict[tuple[str, tuple[int, ...]], str] = OrderedDict()

    @classmethod
    def of(cls, engine: Any) -> Admitted:
        """Those of an `LLMEngine` or `AsyncLLM`."""
        found: Admitted | None = getattr(engine, "_lora_ext_admitted", None)
        if found is None:
            found = engine._lora_ext_admitted = cls()
            processor = getattr(engine, "output_processor", None)
            if processor is not None:  # it hears when the core knows better
                processor._lora_ext_admitted = found
        return found

    def needs_load(self, request: LoRARequest) -> bool:
        """Whether the core must be asked before a request with it is sent."""
        if request.load_inplace or request.lora_int_id not in self._held:
            return True
        known = self._known[request.lora_int_id].request
        return (known.lora_name, known.lora_path) != (request.lora_name, request.lora_path)

    def loaded(self, request: LoRARequest, reply: Mapping[str, Any]) -> None:
        """Takes the core's answer."""
        for lora_id in reply["evicted"]:
            self._held.discard(lora_id)
            known = self._known.get(lora_id)
            if known is not None and is_recipe(known.request.lora_path):
                del self._known[lora_id]
        request = msgspec.structs.replace(request, load_inplace=False)
        understands = Understands.of(reply["understands"])
        self._held.add(request.lora_int_id)
        self._known[request.lora_int_id] = _Known(request, reply["version"], understands)
        if not is_recipe(request.lora_path):
            self._named[request.lora_name] = request

    def remove(self, lora_id: int) -> None:
        """Of an adapter that its user removes."""
        self._held.discard(lora_id)
        known = self._known.pop(lora_id, None)
        name = "" if known is None else known.request.lora_name
        if name in self._named and self._named[name].lora_int_id == lora_id:
            del self._named[name]

    def doubt(self, lora_id: int) -> None:
        """The core has refused a request for an adapter: ask it before the next one is sent."""
        self._held.discard(lora_id)

    def doubt_all(self) -> None:
        """Somebody calls the workers, and may change what they hold."""
        self._held.clear()

    def list_by(self, models: Mapping[str, LoRARequest]) -> None:
        """From now on a name is what a server's list of models says, which unloads without a word
        to its engine."""
        self._models = models

    def named(self, name: str) -> LoRARequest | None:
        """The adapter that was loaded by a name, and not removed since."""
        return (self._named if self._models is None else self._models).get(name)

    def version(self, lora_id: int) -> str:
        """The digest of what was loaded last under an id; empty for one that never was."""
        known = self._known.get(lora_id)
        return "" if known is None else known.version

    def understands(self, lora_id: int) -> Understands:
        """Of what was loaded last under an id."""
        return self._known[lora_id].understands

    def gate(self, version: str, ids: tuple[int, ...]) -> str | None:
        """The gate of an instruction, if it was computed before."""
        found = self._gates.get((version, ids))
        if found is not None:
            self._gates.move_to_end((version, ids))
        return found

    def keep_gate(self, version: str, ids: tuple[int, ...], gate: str) -> None:
        """Remembers the gate of an instruction."""
        self._gates[version, ids] = gate
        if len(self._gates) > _GATES:
            self._gates.popitem(last=False)
