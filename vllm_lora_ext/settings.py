"""What an operator can set, and the switch that turns the plugin off.

Settings come through vLLM's own flag, so they are part of its compile-cache key:

    vllm serve BASE --enable-lora --additional-config '{"lora_ext": {"host_cache_mb": 4096}}'
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vllm_lora_ext.errors import AdapterError

KEY = "lora_ext"
DISABLE_ENV = "VLLM_LORA_EXT_DISABLE"
ROUTER_ROWS_LIMIT = 512
ROUTER_ROWS_DEFAULT = 64

_EXAMPLE = f'--additional-config \'{{"{KEY}": {{"host_cache_mb": 4096}}}}\''
_ALLOWED = {
    "adapter_roots": "a list of existing folders, or null for no limit",
    "max_router_rows": f"a whole number from 1 to {ROUTER_ROWS_LIMIT}, or null",
    "host_cache_mb": "a whole number, 0 or more",
    "triton": "true, false, or null",
    "trace": "true or false",
}
_ON = {"1", "true", "yes"}
_OFF = {"", "0", "false", "no"}


class LoraExtSettings(BaseModel):
    """Everything under the key `lora_ext` of vLLM's `--additional-config`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    adapter_roots: tuple[Path, ...] | None = None
    """Adapters are only read from below these folders. None: from anywhere vLLM can read."""

    max_router_rows: int | None = Field(default=None, ge=1, le=ROUTER_ROWS_LIMIT)
    """Router rows reserved per adapter slot and layer. None: `min(max_lora_rank, 64)`."""

    host_cache_mb: int = Field(default=2048, ge=0)
    """Host memory for adapters that vLLM's own cache has dropped."""

    triton: bool | None = None
    """On a GPU: the fused Triton kernels in place of the PyTorch path. None: when they pass a
    check at start; true: the engine does not start when they fail it."""

    trace: bool = False
    """Whether a request may ask what its adapter's gates decided. Needs an engine without CUDA
    graphs; off, nothing of it is there."""

    @field_validator("adapter_roots", mode="before")
    @classmethod
    def _real_folders(cls, value: object) -> object:
        if value is None:
            return None
        if not isinstance(value, list | tuple):
            raise ValueError("not a list")
        return tuple(_real_folder(item) for item in value)

    def router_rows(self, max_lora_rank: int) -> int:
        """Router rows per slot for an engine started with this `--max-lora-rank`."""
        if self.max_router_rows is not None:
            return self.max_router_rows
        return min(max_lora_rank, ROUTER_ROWS_DEFAULT)

    @classmethod
    def from_additional_config(cls, additional_config: Mapping[str, Any] | None) -> LoraExtSettings:
        """The settings inside vLLM's additional config; defaults where it has none."""
        section = dict(additional_config or {}).get(KEY)
        if section is None:
            return cls()
        if not isinstance(section, Mapping):
            raise AdapterError(
                "bad_settings",
                f"{KEY} in --additional-config is not an object",
                seen=section,
                limit=f"an object with any of {', '.join(_ALLOWED)}",
                fix=_EXAMPLE,
            )
        try:
            return cls(**section)
        except ValidationError as error:
            raise _as_adapter_error(error) from None


def disabled(environ: Mapping[str, str] = os.environ) -> bool:
    """True when the off switch is set: vLLM then runs as if the plugin were not installed."""
    value = environ.get(DISABLE_ENV, "").strip().lower()
    if value in _ON:
        return True
    if value in _OFF:
        return False
    raise AdapterError(
        "bad_settings",
        f"the environment variable {DISABLE_ENV} has an unknown value",
        seen=value,
        limit="1, true or yes to turn the plugin off; 0, false, no or unset to keep it on",
        fix=f"{DISABLE_ENV}=1, or unset it",
    )


def _real_folder(item: object) -> Path:
    if not isinstance(item, str | Path):
        raise ValueError("not a path")
    path = Path(item).expanduser()
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder")
    return path.resolve()


def _as_adapter_error(error: ValidationError) -> AdapterError:
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else KEY
    if first["type"] == "extra_forbidden":
        return AdapterError(
            "bad_settings",
            f"{KEY} has no setting named {name}",
            seen=name,
            limit=", ".join(_ALLOWED),
            fix=f"remove or rename it, for example {_EXAMPLE}",
        )
    reason = first["msg"].removeprefix("Value error, ")
    return AdapterError(
        "bad_settings",
        f"setting {KEY}.{name} is wrong ({reason})",
        seen=first["input"],
        limit=_ALLOWED.get(name),
        fix=f"correct {name} in --additional-config, or leave it out to get the default",
    )
