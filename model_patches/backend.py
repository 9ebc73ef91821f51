"""Which backend an engine runs, and what it then allows. Decided once, before layers are built."""

from __future__ import annotations

import logging
from collections.abc import Callable

from vllm_lora_ext.errors import AdapterError

logger = logging.getLogger("vllm.lora_ext")


def choose_kernels(wanted: bool | None, device_type: str, check: Callable[[], str | None]) -> bool:
    """Whether the Triton kernels run.

    Args:
        wanted: the setting `triton`; None: on a GPU, when their check passes.
        device_type: the engine's, as vLLM names it.
        check: runs the kernels, and says what is wrong, or None.
    Raises:
        AdapterError: `bad_settings`, they are asked for and cannot be.
    """
    if wanted is False:
        return False
    if device_type != "cuda":
        if wanted:
            raise AdapterError(
                "bad_settings", "the setting triton is true, and this engine runs on no GPU",
                seen=device_type, limit="null or false", fix="leave the setting triton out",
            )  # fmt: skip
        return False
    wrong = check()
    if wrong is None:
        return True
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
    return False


def check_graphs(graphs: str | None, device_type: str, kernels: bool) -> bool:
    """Whether the engine captures CUDA graphs.

    Args:
        graphs: the name of vLLM's `cudagraph_mode`; None or NONE: it captures none.
    Raises:
        AdapterError: `bad_settings`, it does and the PyTorch path runs, which loops over the
            step's adapters: a graph would freeze them.
    """
    if device_type == "cpu" or graphs in (None, "NONE"):
        return False
    if not kernels:
        raise AdapterError(
            "bad_settings", "CUDA graphs need the Triton kernels, and the PyTorch path runs here",
            seen=f"cudagraph_mode {graphs}", limit="NONE",
            fix="start with --enforce-eager, or VLLM_LORA_EXT_DISABLE=1 for stock LoRA",
        )  # fmt: skip
    return True
