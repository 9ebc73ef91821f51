"""Compiles, before a user waits, each variant of the kernels that a model's steps can meet.

Triton compiles a kernel again for other block sizes and numbers of parts, other dtypes, and strides
that are no multiples of 16. What a step needs depends on its number of rows (`tuning`), and only
changes from one tile of rows to the next. Steps of up to 8,192 rows need a dozen variants or two,
most of them for prefills of some hundred rows, which no warm-up of an engine sends.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from vllm_lora_ext.kernels.gated_lora.backends.triton.expand import expand_
from vllm_lora_ext.kernels.gated_lora.backends.triton.extended import expand_extended
from vllm_lora_ext.kernels.gated_lora.backends.triton.glu import glu
from vllm_lora_ext.kernels.gated_lora.backends.triton.prefetch import prefetch
from vllm_lora_ext.kernels.gated_lora.backends.triton.shrink import num_parts, shrink
from vllm_lora_ext.kernels.gated_lora.backends.triton.tuning import blocks, device_of
from vllm_lora_ext.kernels.gated_lora.extension import MOST_ROWS
from vllm_lora_ext.kernels.gated_lora.step import TILE_ROWS

if TYPE_CHECKING:
    from vllm_lora_ext.kernels.gated_lora.site import Site


def warm(sites: Iterable[Site], max_tokens: int, dtype: torch.dtype) -> None:
    """Launches every variant once.

    Args:
        sites: those on the Triton kernels, with the engine's step map in which no row has an
            adapter yet: all that is launched leaves at once.
        max_tokens: most rows of a step.
        dtype: of the layers' inputs and outputs.
    """
    for site, t in variants(sites, max_tokens, dtype):
        x_TK, y_TN = (site.a_SRK.new_empty(t, n, dtype=dtype) for n in widths(site))
        if extends(site, t):
            assert site.extension is not None
            e_TE = y_TN.new_empty(t, site.extension.rows, dtype=torch.float32)
            _second(y_TN, e_TE, None, site)
            if site.activation is not None:  # a step of the base model has no product of that kind
                _second(y_TN, y_TN, None, site)
            continue
        if site.prefetches and t <= MOST_ROWS:
            prefetch(t, site)
        u_PTR = shrink(x_TK, site)
        _second(y_TN, y_TN, u_PTR, site)
        if len(u_PTR) > 1:  # what is reduced over ranks comes in one part
            _second(y_TN, y_TN, u_PTR[:1], site)


def _second(
    y_TN: torch.Tensor, own_TN: torch.Tensor, u_PTR: torch.Tensor | None, site: Site
) -> None:
    """The launch behind the product and the shrink, or behind an extended product."""
    if site.activation is not None:
        glu(y_TN.new_empty(len(y_TN), site.slice_sizes[0]), own_TN, u_PTR, site)
    elif u_PTR is None:
        expand_extended(y_TN, own_TN, None, site)
    else:
        expand_(y_TN, u_PTR, site)


def variants(sites: Iterable[Site], max_tokens: int, dtype: torch.dtype) -> list[tuple[Site, int]]:
    """A site and a number of rows for each choice of block sizes and parts, at each shape."""
    found: dict[object, tuple[Site, int]] = {}
    for site in sites:
        for t in steps(max_tokens):
            found.setdefault((shape(site), choice(site, t, dtype)), (site, t))
    return list(found.values())


def steps(max_tokens: int) -> range:
    """Numbers of rows at which a choice may change: the first of each tile."""
    return range(1, max_tokens + 1, min(TILE_ROWS))


def shape(site: Site) -> object:
    """What of a site the kernels are compiled for."""
    kind = site.a_SRK.dtype, site.extension is None, site.activation is None
    return widths(site), site.slice_sizes, site.num_rows, site.padded_rank, *kind


def choice(site: Site, num_tokens: int, dtype: torch.dtype) -> object:
    """What of a step they are compiled for."""
    device, a_SRK = device_of(site.a_SRK.device.index), site.a_SRK
    as_stored = dtype == a_SRK.dtype != torch.float32
    sizes = blocks(num_tokens, site.padded_rank, a_SRK.itemsize, device, as_stored)
    return sizes, None if extends(site, num_tokens) else num_parts(num_tokens, dtype, site)


def extends(site: Site, num_tokens: int) -> bool:
    """Whether a step takes the site's extended weight."""
    return site.extension is not None and num_tokens <= MOST_ROWS


def widths(site: Site) -> tuple[int, int]:
    """Columns of x and of y."""
    return site.a_SRK.shape[2], sum(site.slice_sizes)
