"""The C++ kernels of `cpu.cpp` on a site: its tables as C structures, and the calls.

A site's tables are made at the first call after one of its slots has changed. They hold addresses
of the site's buffers, which never move.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
from ctypes import Structure, c_float, c_int64, c_void_p
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from vllm_lora_ext.kernels.gated_lora.backends.native import build as cpu_build
from vllm_lora_ext.kernels.gated_lora.codes import SCORES, SELECTS, WEIGHTS
from vllm_lora_ext.kernels.gated_lora.plan import SlicePlan, SlotPlan
from vllm_lora_ext.routing import GateSpec, InputNorm
from vllm_lora_ext.routing.spec import GIVEN

if TYPE_CHECKING:
    from vllm_lora_ext.kernels.gated_lora.backends.native.backend import NativeStore
    from vllm_lora_ext.kernels.gated_lora.site import Site

logger = logging.getLogger("vllm.lora_ext")

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Gate(Structure):
    _fields_ = (
        *((name, c_int64) for name in (
            "gated", "self", "given", "score", "bias", "bias_value", "select", "key_abs", "k",
            "threshold_head", "subtract_threshold", "weight", "masked", "num_gates", "product",
        )),
        *((name, c_float) for name in (
            "score_temperature", "threshold", "top_p", "temperature", "mask_below", "constant",
            "head_bias", "width", "tail_sum", "tail_squares", "normalise_eps", "unused",
        )),
        *((name, c_void_p) for name in ("bias_G", "logit_bias_G", "row_sums_G", "tail_G")),
        ("block_start", ctypes.POINTER(c_int64)),
    )  # fmt: skip


class _Slice(Structure):
    _fields_ = (
        ("gate", _Gate),
        *((name, c_void_p) for name in ("bt_RN", "scale_N", "shift_N")),
        *((name, c_int64) for name in (
            "index", "ranks", "a_start", "a_rows", "router_start", "head_at", "y_start", "n",
            "h_start", "row_start", "factor_at", "parts",
        )),
    )  # fmt: skip


class _Slot(Structure):
    _fields_ = (
        ("a_RK", c_void_p),
        ("router_GK", c_void_p),
        *((name, c_int64) for name in (
            "k", "num_rows", "num_ranks", "h_width", "num_slices", "stats_at",
        )),
        ("slices", ctypes.POINTER(_Slice)),
    )  # fmt: skip


class Tables(NamedTuple):
    """What a call takes: the entry point, an array of `_Slot*`, and what those point to."""

    call: Any
    types: dict[torch.dtype, int]
    slots: Any
    num_slots: int
    kept: list[_Slot | None]

    def put(self, slot: int, plan: SlotPlan | None) -> bool:
        """Puts another plan into a slot, in place. False, and nothing done, where its gates are
        none that C++ knows."""
        try:
            found = None if plan is None else _known(plan)
        except KeyError:
            return False
        self.kept[slot] = found
        self.slots[slot] = None if found is None else ctypes.addressof(found)
        return True

    def given(self, site: Site) -> tuple[int | None, int]:
        """Address and stride of the numbers that come with each row, where a slot reads them."""
        rows_TC = site.rows_TC
        return (None, 0) if rows_TC is None else (rows_TC.data_ptr(), rows_TC.stride(0))


def tables(site: Site, *tensors: torch.Tensor) -> Tables | None:
    """The site's tables when the kernels can work on these tensors, else None."""
    store = cast("NativeStore", site.store)
    if store.tables is None:
        store.tables = _make(site)
        store.given = store.tables.given(site) if store.tables else (None, 0)
    found: Tables | None = store.tables or None
    if found is not None:
        for tensor in tensors:
            if tensor.dtype not in found.types or tensor.stride(-1) != 1:
                return None
    return found


def gated_lora_(y_TN: torch.Tensor, x_TK: torch.Tensor, site: Site, t: Tables) -> None:
    slots_T = site.step.token_slots_T
    t.call(
        t.slots, t.num_slots, slots_T.data_ptr(), min(len(x_TK), len(slots_T)),
        x_TK.data_ptr(), x_TK.stride(0), t.types[x_TK.dtype], None, None, 0, *t.given(site),
        y_TN.data_ptr(), y_TN.stride(0), t.types[y_TN.dtype],
    )  # fmt: skip


def shrink(u_TR: torch.Tensor, x_TK: torch.Tensor, site: Site, t: Tables) -> None:
    """Fills the columns of u that a row's slot has; the others stay."""
    slots_T = site.step.token_slots_T
    t.call(
        t.slots, t.num_slots, slots_T.data_ptr(), min(len(x_TK), len(slots_T)),
        x_TK.data_ptr(), x_TK.stride(0), t.types[x_TK.dtype],
        u_TR.data_ptr(), None, u_TR.stride(0), None, 0, None, 0, 0,
    )  # fmt: skip


def gate_expand_(
    y_TN: torch.Tensor, u_TR: torch.Tensor, v_TR: torch.Tensor, site: Site, t: Tables
) -> None:
    """From u; gates read v, which has its strides."""
    slots_T = site.step.token_slots_T
    t.call(
        t.slots, t.num_slots, slots_T.data_ptr(), min(len(u_TR), len(slots_T)),
        None, 0, 0, u_TR.data_ptr(), v_TR.data_ptr(), u_TR.stride(0), *t.given(site),
        y_TN.data_ptr(), y_TN.stride(0), t.types[y_TN.dtype],
    )  # fmt: skip


def _make(site: Site) -> Tables | tuple[()]:
    """Empty where there is a gate that the kernels do not know, so that nobody asks again."""
    library = cpu_build.library()
    assert library is not None, "else this backend is not chosen"
    call = library.gated_lora
    call.argtypes = (
        c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_void_p,
        c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64, c_int64,
    )  # fmt: skip
    call.restype = None
    types = {t: n for t, n in _TYPES.items() if t is not torch.float16 or library.has_float16()}
    try:
        kept = [None if plan is None else _known(plan) for plan in site.plans]
    except KeyError as unknown:
        _say_unknown(str(unknown))
        return ()
    pointers = [None if slot is None else ctypes.addressof(slot) for slot in kept]
    return Tables(call, types, (c_void_p * len(kept))(*pointers), len(kept), kept)


@functools.cache
def _say_unknown(name: str) -> None:
    logger.warning(
        "vllm-lora-ext: the C++ kernels do not know the gate %s; layers with it run on PyTorch",
        name,
    )


@functools.cache
def known_codes() -> tuple[int, int, int]:
    """How many scores, selections and weights C++ knows: the first so many of `codes`."""
    library, counts = cpu_build.library(), (c_int64 * 3)()
    assert library is not None
    library.known_codes(counts)
    return tuple(counts)


def _code(kind: int, names: tuple[str, ...], name: str) -> int:
    """The number of a gate's step; KeyError where C++ does not know it."""
    code = names.index(name)
    if code >= known_codes()[kind]:
        raise KeyError(name)
    return code


def _known(plan: SlotPlan) -> _Slot:
    """A plan as C++ reads it, made once."""
    found: _Slot | None = plan.__dict__.get("native")
    if found is None:
        found = plan.__dict__["native"] = _slot(plan)
    return found


def _slot(plan: SlotPlan) -> _Slot:
    slices = (_Slice * len(plan.slices))()
    h_start = first = 0
    for i, p in enumerate(plan.slices):
        slices[i] = _slice(i, p, h_start)
        h_start += slices[i].ranks
        if p.y_start != plan.slices[first].y_start:
            first = i
        slices[first].parts += 1
    a_RK = plan.a_RK
    return _Slot(
        a_RK.data_ptr(), plan.router_GK.data_ptr(), a_RK.shape[1],
        plan.num_rows, plan.num_ranks, h_start, len(slices),
        plan.stats_at if plan.normalised else -1, slices,
    )  # fmt: skip


def _slice(index: int, p: SlicePlan, h_start: int) -> _Slice:
    return _Slice(
        gate=_gate(p), bt_RN=p.bt_RN.data_ptr(), index=index, ranks=p.bt_RN.shape[0],
        a_start=p.a_start, a_rows=p.a_stop - p.a_start, router_start=p.router_start,
        head_at=p.head_at, y_start=p.y_start, n=p.bt_RN.shape[1], h_start=h_start,
        row_start=p.row_start, factor_at=p.factor_at,
        **({} if p.rescale is None else {n: t.data_ptr() for n, t in p.rescale._asdict().items()}),
    )  # fmt: skip


def _gate(p: SlicePlan) -> _Gate:
    s: GateSpec = p.gate
    starts = (c_int64 * (s.num_gates + 1))(*itertools.accumulate(s.blocks, initial=0))
    return _Gate(
        gated=s.source != "none", self=s.source == "self", given=s.source in GIVEN,
        score=_code(0, SCORES, s.score),
        bias=s.bias != "none", bias_value=s.bias == "value",
        select=_code(1, SELECTS, s.select),
        key_abs=s.key == "abs", k=s.k, threshold_head=s.threshold_head,
        subtract_threshold=s.subtract_threshold, weight=_code(2, WEIGHTS, s.weight),
        masked=s.mask_below is not None, num_gates=s.num_gates, product=s.product,
        score_temperature=s.score_temperature, threshold=s.threshold, top_p=s.top_p,
        temperature=s.temperature, mask_below=s.mask_below or 0.0, constant=s.constant,
        head_bias=p.head_bias, bias_G=_address(p.bias_G), logit_bias_G=_address(p.logit_bias_G),
        block_start=starts, **({} if p.norm is None else _norm(p.norm, s.normalise_eps)),
    )  # fmt: skip


def _norm(norm: InputNorm, eps: float) -> dict[str, Any]:
    return {
        "width": norm.width, "tail_sum": norm.tail_sum, "tail_squares": norm.tail_squares,
        "normalise_eps": eps, "row_sums_G": _address(norm.row_sums_G),
        "tail_G": _address(norm.tail_G),
    }  # fmt: skip


def _address(t: torch.Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()
