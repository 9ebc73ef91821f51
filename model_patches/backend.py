"""Which backend an engine runs, and what it then allows. Decided once, before layers are built."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.kernels.gated_lora.backends import choice
from vllm_lora_ext.kernels.gated_lora.backends.base import Backend

logger = logging.getLogger("vllm.lora_ext")


@dataclass(frozen=True)
class Building:
    """What an engine's layers are built with.

    Args:
        router_rows: most router rows per slice.
        backend: what they run on.
        graphs: whether the engine captures CUDA graphs.
        extend: A and routers stand below base weights where that adds up to so many of its rows.
    """

    router_rows: int
    backend: Backend
    graphs: bool
    extend: float = 0.0


_building: ContextVar[Building] = ContextVar("building")
building = _building.get
"""What the layers that vLLM makes at the moment are built with."""


@contextmanager
def build_with(made: Building) -> Iterator[None]:
    """vLLM makes an engine's layers inside."""
    token = _building.set(made)
    try:
        yield
    finally:
        _building.reset(token)


def asks_for_triton(wanted: bool | None, device_type: str) -> bool:
    """Whether the Triton kernels run, if they pass their check.

    Args:
        wanted: the setting `triton`; None: on a GPU.
        device_type: the engine's, as vLLM names it.
    Raises:
        AdapterError: `bad_settings`, they are asked for and cannot be.
    """
    if wanted and device_type != "cuda":
        raise AdapterError(
            "bad_settings", "the setting triton is true, and this engine runs on no GPU",
            seen=device_type, limit="null or false", fix="leave the setting triton out",
        )  # fmt: skip
    return wanted is not False and device_type == "cuda"


def check_kernels(wanted: Mapping[str, object], triton: bool, device_type: str) -> None:
    """Raises AdapterError `bad_settings` where a setting changes what kernels do, and none runs.

    Args:
        wanted: such settings; triton: whether the Triton kernels are asked for.
    """
    for name, value in wanted.items():
        if value and not triton:
            raise AdapterError(
                "bad_settings", f"the setting {name} is {value}, and no Triton kernels run here",
                seen=device_type, limit="a GPU whose setting triton is not false",
                fix=f"leave the setting {name} out",
            )  # fmt: skip


def choose_backend(
    wanted: bool | None, device_type: str, check: Callable[[], str | None]
) -> Backend:
    """What an engine runs on.

    Args:
        wanted, device_type: as for `asks_for_triton`.
        check: runs the Triton kernels, and says what is wrong, or None.
    Raises:
        AdapterError: `bad_settings`, they are asked for and cannot be.
    """
    if not asks_for_triton(wanted, device_type):
        return choice.without_triton(device_type)
    wrong = check()
    if wrong is None:
        return choice.triton()
    if wanted:
        raise AdapterError(
            "bad_settings", "the setting triton is true, and the kernels fail their check here",
            seen=wrong, limit="a GPU and a Triton that compute what the reference does",
            fix="leave the setting triton out and start with --enforce-eager: PyTorch then serves",
        )  # fmt: skip
    logger.warning(
        "vllm-lora-ext: the Triton kernels fail their check here, the slower PyTorch path is used:"
        " %s", wrong,
    )  # fmt: skip
    return choice.without_triton(device_type)


def check_graphs(graphs: str | None, device_type: str, on_device: bool) -> bool:
    """Whether the engine captures CUDA graphs.

    Args:
        graphs: the name of vLLM's `cudagraph_mode`; None or NONE: it captures none.
        on_device: as of the engine's backend.
    Raises:
        AdapterError: `bad_settings`, it does and the backend loops over the step's adapters on
            the host: a graph would freeze them.
    """
    if device_type == "cpu" or graphs in (None, "NONE"):
        return False
    if not on_device:
        raise AdapterError(
            "bad_settings", "CUDA graphs need the Triton kernels, and the PyTorch path runs here",
            seen=f"cudagraph_mode {graphs}", limit="NONE",
            fix="start with --enforce-eager, or VLLM_LORA_EXT_DISABLE=1 for stock LoRA",
        )  # fmt: skip
    return True
