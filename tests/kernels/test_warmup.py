"""What a step makes Triton compile is what the warm-up has compiled: counted with Triton's own
keys, on tensors without memory, over the rows that a step may have."""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
import torch

from vllm_lora_ext.kernels.gated_lora import (
    Site,
    StepMap,
    prefetch,
    prefetch_in_order,
    register_site,
)
from vllm_lora_ext.kernels.gated_lora.backends import choice
from vllm_lora_ext.kernels.gated_lora.op import (  # the ops themselves take no meta
    _activated_lora,
    _extended_linear,
)
from vllm_lora_ext.kernels.mix_mlp import BlockSite

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)
MOST = 8192
# (K, slices): Llama-3.1-8B, and sizes that no power of two divides.
LLAMA = ((4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,)))
ODD = ((2880, (4096, 512, 512)), (4096, (2880,)), (576, (1536, 1536)), (1530, (570,)))


class Counted:
    """In place of a kernel: keeps the keys under which Triton would compile its launches."""

    def __init__(self, kernel) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime.jit import create_function_from_signature

        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        self.keys: set[str] = set()

    def __getitem__(self, _grid):
        def launch(*args, **kwargs):
            _, specialization, options = self.bind(*args, **kwargs)
            self.keys.add(f"{specialization} {options}")

        return launch


@pytest.fixture
def kernels(monkeypatch):
    from vllm_lora_ext.kernels.gated_lora.backends.triton import (
        expand,
        extended,
        glu,
        shrink,
        tuning,
        warmup,
    )
    from vllm_lora_ext.kernels.gated_lora.backends.triton import prefetch as fetching
    from vllm_lora_ext.kernels.mix_mlp.backends.triton import mix

    h100 = tuning.Device("H100", 132, 227 * 1024)
    for module in (expand, extended, glu, shrink, warmup):
        monkeypatch.setattr(module, "device_of", lambda _index: h100)
    counted = {}
    for module, name in (
        (shrink, "shrink_kernel"), (expand, "expand_kernel"), (mix, "mix_kernel"),
        (extended, "extended_kernel"), (glu, "glu_kernel"), (fetching, "prefetch_kernel"),
    ):  # fmt: skip
        counted[name] = Counted(getattr(module, name))
        monkeypatch.setattr(module, name, counted[name])
    return counted


def sites_of(shapes, rank, dtype=torch.bfloat16):
    step = StepMap(MOST, "meta", tiled=True)
    sites = [Site(8, k, sizes, rank, 8, dtype, "meta", choice.triton()) for k, sizes in shapes]
    for site in sites:
        site.step = step
    return sites


def keys(kernels):
    return {(name, key) for name, kernel in kernels.items() for key in kernel.keys}


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shapes", [LLAMA, ODD])
@pytest.mark.parametrize("rank", [16, 64, 256])
def test_no_step_compiles_what_the_warm_up_has_not(shapes, rank, stored, kernels):
    from vllm_lora_ext.kernels.gated_lora.backends.triton.expand import expand_
    from vllm_lora_ext.kernels.gated_lora.backends.triton.shrink import shrink
    from vllm_lora_ext.kernels.gated_lora.backends.triton.warmup import warm

    sites = sites_of(shapes, rank, stored)
    warm(sites, MOST, torch.bfloat16)
    warmed = keys(kernels)
    assert 8 <= len(warmed) <= 100
    rows = np.unique(np.concatenate([np.arange(1, 700), np.arange(700, MOST + 1, 37), [MOST]]))
    for site in sites:
        k, n = site.a_SRK.shape[2], sum(site.slice_sizes)
        for t in rows.tolist():
            x_TK = torch.empty(t, k, dtype=torch.bfloat16, device="meta")
            u_PTR = shrink(x_TK, site)
            y_TN = torch.empty(t, n, dtype=torch.bfloat16, device="meta")
            expand_(y_TN, u_PTR, site)
            expand_(y_TN, u_PTR[:1], site)
    assert keys(kernels) == warmed


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("shapes", [LLAMA, ODD])
def test_no_step_compiles_an_extended_weights_kernel_that_the_warm_up_has_not(
    shapes, activation, kernels
):
    """With a bias and without; steps too large for it, and of the base model, take others."""
    from vllm_lora_ext.kernels.gated_lora.backends.triton.warmup import warm

    step, found = StepMap(MOST, "meta", tiled=True), []
    for k, sizes in shapes:
        base_NK = torch.empty(sum(sizes), k, dtype=torch.bfloat16, device="meta")
        site = Site(2, k, sizes, 16, 8, base_NK.dtype, "meta", choice.triton(), base_NK=base_NK)
        site.step = step
        if len(sizes) == 2:
            site.activation = activation
        found.append((register_site(site), site))
    warm([site for _, site in found], MOST, torch.bfloat16)
    warmed = keys(kernels)
    assert 1 <= len({key for name, key in warmed if name == "extended_kernel"}) <= 24
    for (handle, site), slot in itertools.product(found, (0, -1)):
        step.update(np.full(MOST, slot))
        n = sum(site.slice_sizes)
        for t in (*range(1, 130), 500, 513, MOST):
            x_TK = torch.empty(t, site.a_SRK.shape[2], dtype=torch.bfloat16, device="meta")
            for bias_N in (None, x_TK.new_empty(n)):
                out = n if site.activation is None else site.slice_sizes[0]
                assert _extended_linear(x_TK, bias_N, handle, out).shape == (t, out)
    assert keys(kernels) == warmed


@pytest.mark.parametrize("shapes", [LLAMA, ODD])
def test_no_step_compiles_an_activating_kernel_that_the_warm_up_has_not(shapes, kernels):
    from vllm_lora_ext.kernels.gated_lora.backends.triton.warmup import warm

    halves = [site for site in sites_of(shapes, 64) if len(site.slice_sizes) == 2]
    for site in halves:
        site.activation = "gelu"
    warm(halves, MOST, torch.bfloat16)
    warmed = keys(kernels)
    assert 1 <= len({key for name, key in warmed if name == "glu_kernel"}) <= 24
    for site, slot in itertools.product(halves, (0, -1)):
        handle, (inner, _) = register_site(site), site.slice_sizes
        site.step.update(np.full(MOST, slot))
        for t in (*range(1, 130), 500, 513, MOST):
            x_TK = torch.empty(t, site.a_SRK.shape[2], dtype=torch.bfloat16, device="meta")
            _activated_lora(x_TK.new_empty(t, 2 * inner), x_TK, handle, inner)
    assert keys(kernels) == warmed


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shapes", [LLAMA, ODD, LLAMA[:1]])
def test_no_step_compiles_a_fetch_that_the_warm_up_has_not(shapes, stored, kernels):
    """One is for all sites of a dtype, the last one too."""
    from vllm_lora_ext.kernels.gated_lora.backends.triton.warmup import warm

    sites = sites_of(shapes, 64, stored)
    prefetch_in_order(sites)
    warm(sites, MOST, torch.bfloat16)
    warmed = keys(kernels)
    assert len({key for name, key in warmed if name == "prefetch_kernel"}) == 1
    sites[0].step.update(np.zeros(MOST, dtype=np.int64))
    for site in sites:
        site.reserve_routers(site.most_routers)
        for t in (*range(1, 130), MOST):
            prefetch(torch.empty(t, site.a_SRK.shape[2], device="meta"), site)
    assert keys(kernels) == warmed


def test_without_the_setting_no_fetch_is_compiled(kernels):
    from vllm_lora_ext.kernels.gated_lora.backends.triton.warmup import warm

    warm(sites_of(LLAMA, 16), 64, torch.bfloat16)
    assert not kernels["prefetch_kernel"].keys and kernels["shrink_kernel"].keys


def test_no_step_compiles_a_block_that_the_warm_up_has_not(kernels):
    from vllm_lora_ext.kernels.gated_lora.backends.triton.shrink import num_parts
    from vllm_lora_ext.kernels.mix_mlp.backends.triton.mix import mix_
    from vllm_lora_ext.kernels.mix_mlp.backends.triton.warmup import warm

    first, last = sites_of(((4096, (14336, 14336)), (14336, (4096,))), 64)
    block = BlockSite(first, last, torch.relu, act_name="silu")
    warm([block], MOST, torch.bfloat16)
    warmed = keys(kernels)
    assert 1 <= len(warmed) <= 8
    for t in range(1, MOST + 1, 5):
        a_TI = torch.empty(t, 14336, dtype=torch.bfloat16, device="meta")
        base_TN = torch.empty(t, 2 * 14336, dtype=torch.bfloat16, device="meta")
        u_PTR, z_PTR = (
            torch.empty(num_parts(t, torch.bfloat16, s), t, s.num_rows, device="meta")
            for s in (first, last)
        )
        mix_(a_TI, z_PTR, base_TN, u_PTR, block)
    assert keys(kernels) == warmed


def test_a_choice_changes_only_from_tile_to_tile():
    """What `warmup.steps` counts on."""
    from vllm_lora_ext.kernels.gated_lora.backends.triton.tuning import LARGEST, TABLE
    from vllm_lora_ext.kernels.gated_lora.step import TILE_ROWS

    smallest = min(TILE_ROWS)
    assert all(rows % smallest == 0 for rows in TILE_ROWS)
    for rows in TABLE.values():
        assert all(r.max_tokens % smallest == 0 or r.max_tokens == LARGEST for r in rows)
