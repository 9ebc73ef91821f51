"""`gated_lora_` and `mix_act_` on a CPU as torch ops in C++ (`cpu_op.h`), without Python.

A site's door in C++ is opened by a call that went through Python, and shut by the site itself as
soon as something of it changes.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import weakref
from collections.abc import Callable
from ctypes import Structure, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_lora_ext.kernels.gated_lora.backends.native import build as cpu_build

if TYPE_CHECKING:
    from vllm_lora_ext.kernels.gated_lora.backends.native.backend import NativeStore
    from vllm_lora_ext.kernels.gated_lora.site import Site

logger = logging.getLogger("vllm.lora_ext")

# As `Torch` in cpu_op.h has them; each with the prefix `aoti_torch_`.
_FUNCTIONS = (
    "library_init_impl", "library_impl", "call_dispatcher", "delete_tensor_object",
    "get_data_ptr", "get_size", "get_stride", "get_dtype",
)  # fmt: skip
_TYPES = ("float32", "bfloat16", "float16")


class _Torch(Structure):
    _fields_ = (*((name, c_void_p) for name in _FUNCTIONS), ("types", c_int32 * 3))


class _Door(Structure):
    _fields_ = (
        ("active", c_void_p), ("slots", c_void_p), ("num_slots", c_int64),
        ("slots_T", c_void_p), ("max_tokens", c_int64),
        ("given", c_void_p), ("given_stride", c_int64),
    )  # fmt: skip


# Apart from all other ops, so that these can give way to C++.
_python: torch.library.Library | None = torch.library.Library("vllm_lora_ext", "FRAGMENT")
_installed: Any = None


def python_op(name: str, run: Callable[..., None]) -> None:
    """Lets `run` be the op on a CPU until C++ is."""
    if _python is not None:
        _python.impl(name, run, "CPU")


@functools.cache
def install() -> Any:
    """Puts the ops in C++ in the place of Python's; once a process.

    Returns: the library, or None where it cannot be: Python's ops stay.
    """
    global _python, _installed
    library = cpu_build.library()
    if library is None or _python is None:
        return None
    try:
        api = _api(library)
    except (OSError, AttributeError) as error:  # a PyTorch without the stable interface
        logger.info("vllm-lora-ext: the op stays in Python (%s)", error)
        return None
    _python._destroy()
    _python = None
    if library.install_ops(ctypes.byref(api)):
        raise RuntimeError("PyTorch did not take the ops of vllm-lora-ext")
    _installed = library
    return library


def _api(library: Any) -> _Torch:
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    of_torch = ctypes.CDLL(str(path))
    numbers = [getattr(of_torch, f"aoti_torch_dtype_{name}")() for name in _TYPES]
    if not library.has_float16():
        numbers[2] = -1
    pointers = [
        ctypes.cast(getattr(of_torch, f"aoti_torch_{name}"), c_void_p) for name in _FUNCTIONS
    ]
    return _Torch(*pointers, (c_int32 * 3)(*numbers))


def open_door(number: int, site: Site, store: NativeStore) -> None:
    """From now on calls of the op at site `number` stay in C++, until the site changes.

    Those of steps with an adapter do so once one has been at work there (`store.tables`), and
    where nothing in Python wants to hear of them, or sums over ranks.
    """
    slots_T, door = site.step.token_slots_T, _Door(active=site.step.active_1.ctypes.data)
    tables = store.tables
    if tables and not site.after and site.reduce is None:
        door.slots, door.num_slots = ctypes.addressof(tables.slots), tables.num_slots
        door.slots_T, door.max_tokens = slots_T.data_ptr(), len(slots_T)
        door.given, door.given_stride = tables.given(site)
    library = _installed
    library.set_door(c_int64(number), ctypes.byref(door))
    if store.shut is None:
        store.shut = functools.partial(_shut, library, number)
        # The addresses die with the site.
        weakref.finalize(site, store.shut)


def watch_block(number: int, owner: object, busy_1: np.ndarray) -> None:
    """Calls of `mix_act_` at this block stay in C++ while `busy_1[0]` is 0, where it is in C++.

    Args:
        number: the block's.
        owner: the block, with which the address dies.
    """
    if _installed is not None:
        _installed.set_block(c_int64(number), c_void_p(busy_1.ctypes.data))
        weakref.finalize(owner, _installed.set_block, c_int64(number), None)


def _shut(library: Any, number: int) -> None:
    library.set_door(c_int64(number), ctypes.byref(_Door()))
