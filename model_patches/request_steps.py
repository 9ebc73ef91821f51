"""What a front end has the engine core do for a request, one step after the other.

A generator yields a step and is sent its answer; each front end drives it in its own way
(`driving`).
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import msgspec
from vllm.lora.request import LoRARequest

from vllm_lora_ext.errors import AdapterError


@dataclass(frozen=True)
class Load:
    """A step: the core holds this adapter. `source`: its tensors, for one without a folder."""

    lora: LoRARequest
    source: Any = None
    expected: str | None = None  # the only version that it may replace


@dataclass(frozen=True)
class AskGate:
    """A step: the core says the gate of an instruction, base64 of float32."""

    lora: LoRARequest
    version: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class RollBack:
    """A step: new requests for an adapter get an older version again."""

    lora: LoRARequest
    version: str
    expected: str | None = None


T = TypeVar("T")
Step: TypeAlias = Load | AskGate | RollBack
Steps: TypeAlias = Generator[Step, Any, T]


def load_first(
    loras: Iterable[LoRARequest], source: Any = None, expected: str | None = None
) -> Steps[LoRARequest]:
    """Has an adapter loaded under the first of its ids that no other adapter has.

    Args:
        source: its tensors, for one without a folder.
        expected: the only version that it may replace; None: any.
    Raises:
        AdapterError: it cannot be loaded; `id_in_use`; `version_conflict`.
    """
    *first, last = loras
    for lora in first:
        try:
            yield Load(lora, source, expected)
            return lora
        except AdapterError as error:
            if error.code != "id_in_use":
                raise
    yield Load(last, source, expected)
    return last


def roll_back(lora: LoRARequest, version: str, expected: str | None) -> Steps[LoRARequest]:
    """Has new requests get an older version; returns what they are sent with.

    Raises:
        AdapterError: `not_found`, `version_conflict`.
    """
    path = yield RollBack(lora, version, expected)
    return msgspec.structs.replace(lora, lora_path=path, load_inplace=False)
