"""The CPU backend: C++ (`cpu.cpp`) wherever it knows the tensors and the gates, else PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from vllm_lora_ext.kernels.gated_lora.backends import eager
from vllm_lora_ext.kernels.gated_lora.backends.native import build as cpu_build
from vllm_lora_ext.kernels.gated_lora.backends.native import op as cpu_op
from vllm_lora_ext.kernels.gated_lora.backends.native import tables as cpu_native

if TYPE_CHECKING:
    from vllm_lora_ext.kernels.gated_lora.site import Site

on_device = False
warm = eager.warm


def install() -> bool:
    """Puts the ops in C++ in the place of Python's; False where there is no compiler."""
    if cpu_build.library() is None:
        return False
    cpu_op.install()
    return True


class NativeStore(eager.SliceStore):
    """As PyTorch's, and what C++ knows of the site.

    Attributes:
        tables: the plans as C++ reads them; empty: it does not know them; None: to be made (again).
        given: where they find the numbers that come with each row.
        shut: ends calls of the op that stay in C++, if any do.
    """

    tables: cpu_native.Tables | tuple[()] | None = None
    given: tuple[int | None, int] = (None, 0)
    shut: Callable[[], None] | None = None

    def changed(self) -> None:
        if self.shut is not None:
            self.shut()
        self.tables = None

    def slot_changed(self, site: Site, slot: int) -> None:
        # A swap of adapters changes one address; making all tables anew at every layer would take
        # longer than a step.
        tables = self.tables
        if not tables or tables.given(site) != self.given or not tables.put(slot, site.plans[slot]):
            self.changed()

    def asked(self, number: int, site: Site) -> None:
        cpu_op.open_door(number, site, self)


make_store = NativeStore


def gated_lora_(y_TN: torch.Tensor, x_TK: torch.Tensor, site: Site) -> None:
    tables = cpu_native.tables(site, y_TN, x_TK)
    if tables is None:
        eager.gated_lora_(y_TN, x_TK, site)
    else:
        cpu_native.gated_lora_(y_TN, x_TK, site, tables)


def shrink(x_TK: torch.Tensor, site: Site, memory: torch.Tensor | None = None) -> torch.Tensor:
    tables = cpu_native.tables(site, x_TK)
    if tables is None:
        return eager.shrink(x_TK, site)
    u_TR = eager.new_shrink(x_TK, site)
    cpu_native.shrink(u_TR, x_TK, site, tables)
    return u_TR[None]


def expand_(
    y_TN: torch.Tensor, u_PTR: torch.Tensor, site: Site, v_PTR: torch.Tensor | None = None
) -> None:
    v_PTR = u_PTR if v_PTR is None else v_PTR
    tables = cpu_native.tables(site, y_TN, u_PTR, v_PTR)
    if tables is None:
        eager.expand_(y_TN, u_PTR, site, v_PTR)
    else:
        cpu_native.gate_expand_(y_TN, u_PTR[0], v_PTR[0], site, tables)
