"""Random adapters for tests of merges."""

from __future__ import annotations

import torch

from vllm_lora_ext.merging import Factors, Pair

SHAPES = {
    "model.layers.0.self_attn.q_proj": (13, 17), "model.layers.1.self_attn.q_proj": (13, 17),
    "model.layers.0.mlp.down_proj": (29, 13),
}  # fmt: skip


def random_pair(seed, width=13, out=17, rank=3):
    draw = torch.Generator().manual_seed(seed)
    return Pair(torch.randn(rank, width, generator=draw), torch.randn(out, rank, generator=draw))


def random_factors(seed, rank=3, shapes=SHAPES, source=""):
    modules = {
        name: random_pair(97 * seed + i, *shape, rank)
        for i, (name, shape) in enumerate(shapes.items())
    }
    return Factors(modules, "tiny", source or f"adapter{seed}")


def deltas(factors):
    return {name: pair.delta() for name, pair in factors.modules.items()}


def weighted_sum(terms):
    """Σ w_i D_i, dense."""
    total = {}
    for factors, weight in terms:
        for name, pair in factors.modules.items():
            total[name] = total.get(name, 0) + weight * pair.delta()
    return total


def relative(got, wanted):
    """Largest relative Frobenius error over the modules; a missing module counts as zero."""
    worst = 0.0
    for name in set(got) | set(wanted):
        shape = (got if name in got else wanted)[name]
        a, b = got.get(name, torch.zeros_like(shape)), wanted.get(name, torch.zeros_like(shape))
        worst = max(worst, float((a - b).norm() / b.norm().clamp(min=1e-12)))
    return worst
