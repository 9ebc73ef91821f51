"""Torch ops: opaque to the compiler, which sees only that y changes.

A site is passed as its handle, a 0-d tensor on the CPU that holds the number under which the ops
find it. The handle is an attribute of the layer, so it is an *input* of the compiled graph: nothing
in compiled code tells one layer or one engine from another, and equal layers share one piece of
it. The site itself is no input, or a 32-layer model would carry two thousand tensors through every
call.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch

from vllm_lora_ext.kernels.gated_lora import sharded
from vllm_lora_ext.kernels.gated_lora.backends.native import inductor
from vllm_lora_ext.kernels.gated_lora.backends.native import op as cpu_op
from vllm_lora_ext.kernels.gated_lora.extension import MOST_ROWS
from vllm_lora_ext.kernels.gated_lora.factors import Factors
from vllm_lora_ext.kernels.gated_lora.site import Site
from vllm_lora_ext.kernels.gated_lora.step import StepMap


@dataclass(eq=False)
class EmbeddingSite:
    """LoRA of a token embedding: `y += B A[:, token]`.

    Args:
        a_SVR: [slots, V, R]; b_SNR: [slots, N, R], on a device best a view of [N, slots, R];
            used: slots that hold an adapter here.
        factors: what multiplies a slot's ranks, row by row; a captured graph knows of none.
    """

    a_SVR: torch.Tensor
    b_SNR: torch.Tensor
    step: StepMap
    used: set[int] = field(default_factory=set)
    factors: Factors | None = None


_sites: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = itertools.count(1)


def register_site(site: Site | EmbeddingSite) -> torch.Tensor:
    """The site's handle: int64, 0-d, on the CPU. Valid while the site lives; its number is no
    other site's, also not later in the same process."""
    number = next(_numbers)
    _sites[number] = site
    return torch.tensor(number, dtype=torch.int64, device="cpu")


def begin(x: torch.Tensor, site: Site, memory: torch.Tensor | None = None) -> torch.Tensor | None:
    """The first launch of `gated_lora_`, for callers that run it beside the base product, which
    it does not need. None where there is none: no adapter in the step, or a backend whose launches
    are the host's.

    `memory` is where its result goes (`triton.shrink.parts_in`), by default new memory.
    """
    if not site.step.active or not site.backend.on_device:
        return None
    return site.backend.shrink(site.own_x(x), site, memory)


def prefetch_in_order(sites: Sequence[Site]) -> None:
    """Has each site fetch what is read after its product: its own B, and what the one that follows
    shrinks with.

    Args:
        sites: in the order in which they run; where one has another, only time is lost.
    """
    for site in sites:
        site.prefetches = True
    for site, after in itertools.pairwise(sites):
        # An extended weight is read by a product, and another step's slots are not these.
        if after.extension is None and after.step is site.step:
            site.following = after


def prefetch(x: torch.Tensor, site: Site) -> None:
    """For callers that run it behind `begin`, beside the base product: what is read after that, on
    its way into L2 (`triton.prefetch`). Only a small step waits for its weights."""
    if not site.step.active or len(x) > MOST_ROWS:
        return
    # Only these kernels have such sites, and a CPU does not import them.
    from vllm_lora_ext.kernels.gated_lora.backends.triton import prefetch as kernel

    kernel.prefetch(len(x), site)


def finish_(y: torch.Tensor, x: torch.Tensor, u_PTR: torch.Tensor | None, site: Site) -> None:
    """The rest of `gated_lora_` after `begin`, which returned `u_PTR`."""
    # What runs must not depend on the step's slots, only on whether it has any: an engine that
    # captures graphs keeps those of base batches apart, as it does for its own LoRA kernels.
    if not site.step.active:
        return
    own_y, own_x = site.own_y(y), site.own_x(x)
    v_TR = None if site.reduce is None else sharded.gated_lora_(own_y, own_x, u_PTR, site)
    if v_TR is not None:
        u_PTR = v_TR
    elif u_PTR is None:
        site.backend.gated_lora_(own_y, own_x, site)
    else:
        site.backend.expand_(own_y, u_PTR, site)
    for after in site.after:
        after(y, x, u_PTR)


def _gated_lora(y: torch.Tensor, x: torch.Tensor, site: torch.Tensor) -> None:
    found = _sites[int(site)]
    if found.step.active:  # asked first: a base batch passes here at every layer
        finish_(y, x, begin(x, found), found)


def _gated_lora_python(y: torch.Tensor, x: torch.Tensor, site: torch.Tensor) -> None:
    """Where the op in C++ turns to when it does not know the site, or not all of it."""
    _gated_lora(y, x, site)
    number = int(site)
    found = _sites[number]
    found.store.asked(number, found)


def _gated_lora_into(
    y: torch.Tensor, memory: torch.Tensor, x: torch.Tensor, site: torch.Tensor
) -> None:
    """`gated_lora_` whose first launch leaves its result in `memory`, for who reads it later, or
    finds some rows there, from who wrote them before."""
    found = _sites[int(site)]
    if found.step.active:
        finish_(y, x, begin(x, found, memory), found)


def _extended_linear(
    x: torch.Tensor, bias: torch.Tensor | None, site: torch.Tensor, n: int
) -> torch.Tensor:
    """The base layer's product with what the adapters add, [T, n], activated if the site does that:
    of a site with an extension. Large steps, and those of the base model, take the weight as it
    is."""
    found = _sites[int(site)]
    if not found.step.active or len(x) > MOST_ROWS:
        y = torch.nn.functional.linear(x, found.extension.base_NK, bias)
        if found.activation is not None:
            return _activated_lora(y, x, site, n)
        finish_(y, x, begin(x, found), found)
        return y
    # Only these kernels have such sites, and a CPU does not import them.
    from vllm_lora_ext.kernels.gated_lora.backends.triton import extended, glu

    e, y = found.extension.product(x), x.new_empty(len(x), n)
    if found.activation is None:
        extended.expand_extended(y, e, bias, found)
    else:
        glu.glu(y, e, None, found, bias)
    for after in found.after:
        after(y, x, None)
    return y


def _activated_lora(y: torch.Tensor, x: torch.Tensor, site: torch.Tensor, n: int) -> torch.Tensor:
    """`gated_lora_`, and then the site's activation: [T, n] of y, [T, gate | up], which stays as it
    is."""
    from vllm_lora_ext.kernels.gated_lora.backends.triton import glu

    found = _sites[int(site)]
    u, a = begin(x, found), y.new_empty(len(y), n)
    glu.glu(a, y, u, found)
    for after in found.after if found.step.active else ():
        after(a, x, u)
    return a


def _embedding_lora(y: torch.Tensor, ids: torch.Tensor, site: torch.Tensor) -> None:
    found = _sites[int(site)]
    for slot, start, stop, index_T in found.step.groups:
        if slot in found.used:
            rows_T = torch.arange(start, stop, device=y.device) if index_T is None else index_T
            a_TR = found.a_SVR[slot][ids[rows_T]].float()
            if found.factors is not None and slot in found.factors.slots:
                a_TR *= found.factors.of(slot, found.step.rows_TC[rows_T])
            y.index_add_(0, rows_T, (a_TR @ found.b_SNR[slot].float().t()).to(y.dtype))


def embedding_lora_static_(y: torch.Tensor, ids: torch.Tensor, found: EmbeddingSite) -> None:
    """The same for a device: the same few launches whatever the step holds, so that a captured
    graph serves every step; each row's product is with all slots' B, zeros but for its own."""
    if not found.step.active:  # a graph of base steps is captured apart
        return
    slots, width, rank = found.a_SVR.shape
    slots_T = found.step.token_slots_T[: len(ids)]
    a_TR = found.a_SVR.view(slots * width, rank)[slots_T.clamp(min=0).long() * width + ids]
    if found.factors is not None and found.factors.slots & found.step.slots:
        a_TR = a_TR * found.factors.of_rows(slots_T, found.step.rows_TC[: len(ids)])
    mine_TS1 = (slots_T[:, None] == torch.arange(slots, device=ids.device))[:, :, None]
    h_TP = torch.where(mine_TS1, a_TR[:, None], 0).view(len(ids), slots * rank).to(y.dtype)
    b_NP = found.b_SNR.permute(1, 0, 2).reshape(y.shape[1], slots * rank)
    y.addmm_(h_TP, b_NP.t().to(y.dtype))


def _embedding_lora_cuda(y: torch.Tensor, ids: torch.Tensor, site: torch.Tensor) -> None:
    embedding_lora_static_(y, ids, _sites[int(site)])


_lib = torch.library.Library("vllm_lora_ext", "DEF")
for _name in ("gated_lora_", "gated_lora_python_"):
    _lib.define(f"{_name}(Tensor(a!) y, Tensor x, Tensor site) -> ()")
_lib.define("gated_lora_into_(Tensor(a!) y, Tensor(b!) memory, Tensor x, Tensor site) -> ()")
_lib.define("extended_linear(Tensor x, Tensor? bias, Tensor site, int n) -> Tensor")
_lib.define("activated_lora(Tensor y, Tensor x, Tensor site, int n) -> Tensor")
_lib.define("embedding_lora_(Tensor(a!) y, Tensor ids, Tensor site) -> ()")
cpu_op.python_op("gated_lora_", _gated_lora)
_lib.impl("gated_lora_", _gated_lora, "CUDA")
_lib.impl("gated_lora_python_", _gated_lora_python, "CPU")
for _key in ("CPU", "CUDA"):
    _lib.impl("gated_lora_into_", _gated_lora_into, _key)
    _lib.impl("extended_linear", _extended_linear, _key)
    _lib.impl("activated_lora", _activated_lora, _key)
_lib.impl("embedding_lora_", _embedding_lora, "CPU")
_lib.impl("embedding_lora_", _embedding_lora_cuda, "CUDA")
for _name in ("gated_lora_", "embedding_lora_"):
    inductor.call_when_active(_name)
    torch.library.register_fake(f"vllm_lora_ext::{_name}", lambda *_: None, lib=_lib)
torch.library.register_fake("vllm_lora_ext::gated_lora_into_", lambda *_: None, lib=_lib)

for _name in ("extended_linear", "activated_lora"):
    torch.library.register_fake(
        f"vllm_lora_ext::{_name}", lambda x, _other, _site, n: x.new_empty(x.shape[0], n), lib=_lib
    )

gated_lora_ = torch.ops.vllm_lora_ext.gated_lora_.default
gated_lora_into_ = torch.ops.vllm_lora_ext.gated_lora_into_.default
extended_linear = torch.ops.vllm_lora_ext.extended_linear.default
activated_lora = torch.ops.vllm_lora_ext.activated_lora.default
embedding_lora_ = torch.ops.vllm_lora_ext.embedding_lora_.default
