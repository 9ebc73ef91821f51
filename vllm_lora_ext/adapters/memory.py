"""An adapter that somebody hands over as tensors, in place of a folder."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from vllm_lora_ext.adapters.folder import CONFIG, WEIGHTS
from vllm_lora_ext.adapters.model import RoutedAdapter
from vllm_lora_ext.adapters.registry import load_adapter
from vllm_lora_ext.errors import AdapterError


@dataclass(frozen=True)
class MemorySource:
    """What an adapter's folder would hold, as plain values that cross every wire.

    Args:
        tensors: a safetensors file.
        config: `adapter_config.json`; None for a format without one.
        settings: what the files leave out, as the sidecar `routing.json` would say it.
    """

    tensors: bytes
    config: dict[str, Any] | None
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, torch.Tensor],
        config: Mapping[str, Any] | None,
        settings: Mapping[str, Any] | None = None,
    ) -> MemorySource:
        """Of tensors by name, on any device.

        Raises:
            AdapterError: `bad_value`, something is no tensor or no JSON.
        """
        for name, tensor in tensors.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise AdapterError(
                    "bad_value", "the adapter's tensors are not tensors by name",
                    seen=f"{name}: {type(tensor).__name__}", limit="str: torch.Tensor",
                    fix="hand over a state dict",
                )  # fmt: skip
        own = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in tensors.items()}
        return cls(save(own), _plain("config", config), _plain("settings", settings) or {})


def _plain(what: str, values: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if values is None:
        return None
    try:
        plain = json.loads(json.dumps(dict(values), default=_plainly))
    except (TypeError, ValueError) as error:
        raise AdapterError(
            "bad_value", f"the adapter's {what} cannot be written as JSON: {error}",
            fix="hand over what adapter_config.json would hold",
        ) from error  # fmt: skip
    assert isinstance(plain, dict)
    return plain


def _plainly(value: Any) -> Any:
    """PEFT's `to_dict` leaves sets and enums."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} is no JSON")


def load_memory_adapter(
    source: MemorySource, *, accept_config_keys: Collection[str] = (), head_size: int | None = None
) -> RoutedAdapter:
    """Read and check an adapter that came as tensors.

    It passes through a folder that lives as long as this call: the readers, the checks and the
    errors are those of every other adapter by construction.

    Args:
        accept_config_keys, head_size: as for `load_adapter`.
    Raises:
        AdapterError: as `load_adapter`.
    """
    with tempfile.TemporaryDirectory(prefix="lora-ext-") as folder:
        Path(folder, WEIGHTS[0]).write_bytes(source.tensors)
        if source.config is not None:
            Path(folder, CONFIG).write_text(json.dumps(source.config, sort_keys=True))
        adapter = load_adapter(
            folder, None, source.settings,
            accept_config_keys=accept_config_keys, head_size=head_size, parts=True,
        )  # fmt: skip
    return dataclasses.replace(adapter, source="")
