"""A fusion VAE over given adapters, after ICM-Fusion (arXiv 2508.04153).

No code is public. The idea: task vectors are combined in the latent space of a VAE, which decodes
one fused adapter. Architecture and arithmetic here are this project's own, and small:

1. the adapters' rank spaces are turned onto the first one's (orthogonal Procrustes), which does
   not change any delta, and each becomes one flat vector (per tensor divided by the pool's spread);
2. the vectors span few dimensions: each is written by its coordinates in that span, c [N];
3. a VAE on these coordinates is trained on random mixtures of the adapters;
4. latents are mixed with the given weights, z = sum w_i mu_i, and decoded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.factors import Factors, Pair

_EPSILON = 1e-12


@dataclass(frozen=True)
class Fused:
    """A fused adapter.

    Args:
        factors: fp32, of the largest rank given.
        reconstruction: per adapter, the relative error of decoding its own latent: what the VAE
            loses, in coordinates.
    """

    factors: Factors
    reconstruction: tuple[float, ...]


@dataclass(frozen=True)
class Training:
    """How the VAE is trained: seconds on a CPU, whatever the adapters' size.

    Args:
        latent: length of a latent.
        hidden: width of the two hidden layers.
        steps, batch, rate: of Adam.
        kl: weight of the latent's divergence from N(0, I).
        seed: of the initialisation and the mixtures.
    """

    latent: int = 16
    hidden: int = 64
    steps: int = 2000
    batch: int = 64
    rate: float = 2e-3
    kl: float = 1e-5
    seed: int = 0


def fuse(
    adapters: Sequence[Factors], weights: Sequence[float], training: Training | None = None
) -> Fused:
    """One adapter from several, by arithmetic on their latents.

    Args:
        adapters: on the same layers of the same sizes; ranks may differ.
        weights: one per adapter.
    Raises:
        AdapterError: `bad_value`, `setting_mismatch`, `shape_mismatch`.
    """
    training = training or Training()
    if not adapters or len(weights) != len(adapters):
        raise AdapterError(
            "bad_value", "every adapter needs a weight", seen=f"{len(weights)} for {len(adapters)}",
            limit="one each, of at least one adapter",
        )  # fmt: skip
    aligned = align(adapters)
    flat_ND, spread_D = _flatten(aligned)
    mean_D = flat_ND.mean(0)
    basis_DN, coordinates_NN = _span(flat_ND - mean_D)
    size = coordinates_NN.norm(dim=1).max().clamp_min(_EPSILON)
    mixed_N, errors = _through_vae(coordinates_NN / size, torch.tensor(weights).float(), training)
    vector_D = (mean_D + basis_DN @ (mixed_N * size)) * spread_D
    return Fused(_unflatten(vector_D, aligned[0]), errors)


def align(adapters: Sequence[Factors]) -> list[Factors]:
    """The same deltas, all ranks padded to one, each rank space turned onto the first adapter's.

    Q B-and-A minimise |Q A_i - A_0|² + |B_i Q^T - B_0|² over orthogonal Q. Factors are balanced
    first, since a delta fixes A and B only up to their scale.
    """
    first = adapters[0]
    for other in adapters[1:]:
        if set(other.modules) != set(first.modules):
            raise AdapterError(
                "setting_mismatch", "the adapters adapt other layers",
                seen=sorted(set(other.modules) ^ set(first.modules))[:3], limit="the same layers",
                fix="fuse adapters of one target_modules",
            )  # fmt: skip
    made: list[dict[str, Pair]] = [{} for _ in adapters]
    for name in sorted(first.modules):
        pairs = [_balance(adapter.modules[name]) for adapter in adapters]
        if len({(p.a_RK.shape[1], p.b_NR.shape[0]) for p in pairs}) > 1:
            raise AdapterError(
                "shape_mismatch", f"{name} has other sizes in the adapters",
                seen=[list(p.a_RK.shape) for p in pairs], fix="fuse adapters of one base model",
            )  # fmt: skip
        rank = max(pair.rank for pair in pairs)
        pairs = [_pad(pair, rank) for pair in pairs]
        for i, pair in enumerate(pairs):
            made[i][name] = _turn(pair, pairs[0]) if i else pair
    return [dataclasses.replace(a, modules=m) for a, m in zip(adapters, made, strict=True)]


def _balance(pair: Pair) -> Pair:
    ratio = (pair.a_RK.norm() / pair.b_NR.norm().clamp_min(_EPSILON)).clamp_min(_EPSILON).sqrt()
    return Pair(pair.a_RK / ratio, pair.b_NR * ratio)


def _pad(pair: Pair, rank: int) -> Pair:
    more = rank - pair.rank
    a = torch.cat([pair.a_RK, pair.a_RK.new_zeros(more, pair.a_RK.shape[1])])
    return Pair(a, torch.cat([pair.b_NR, pair.b_NR.new_zeros(pair.b_NR.shape[0], more)], dim=1))


def _turn(pair: Pair, onto: Pair) -> Pair:
    cross_RR = onto.a_RK @ pair.a_RK.T + onto.b_NR.T @ pair.b_NR
    u, _, vh = torch.linalg.svd(cross_RR)
    q_RR = u @ vh
    return Pair(q_RR @ pair.a_RK, pair.b_NR @ q_RR.T)


def _flatten(adapters: Sequence[Factors]) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, D] vectors, each tensor divided by the pool's spread, and that spread [D]."""
    columns, spreads = [], []
    for name in sorted(adapters[0].modules):
        for side in (0, 1):
            rows = torch.stack([adapter.modules[name][side].flatten() for adapter in adapters])
            spread = rows.std().nan_to_num(0.0).clamp_min(_EPSILON)
            columns.append(rows / spread)
            spreads.append(spread.expand(rows.shape[1]))
    return torch.cat(columns, dim=1), torch.cat(spreads)


def _unflatten(vector_D: torch.Tensor, like: Factors) -> Factors:
    modules, start = {}, 0
    for name in sorted(like.modules):
        sides = []
        for side in like.modules[name]:
            sides.append(vector_D[start : start + side.numel()].view(side.shape).clone())
            start += side.numel()
        modules[name] = Pair(*sides)
    return Factors(modules, like.base_model, "icm_fusion")


def _span(centred_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An orthonormal basis [D, N] of the vectors' span, and their coordinates [N, N]."""
    gram = (centred_ND @ centred_ND.T).double()
    values, vectors = torch.linalg.eigh(gram)
    kept = values > values.max().clamp_min(_EPSILON) * 1e-10
    values, vectors = values[kept], vectors[:, kept]
    basis = centred_ND.T @ (vectors / values.sqrt()).float()
    return basis, (vectors * values.sqrt()).float()


def _through_vae(
    points_NC: torch.Tensor, weight_N: torch.Tensor, training: Training
) -> tuple[torch.Tensor, tuple[float, ...]]:
    count, size = points_NC.shape
    if not size:  # one adapter, or equal ones: nothing to encode
        return torch.zeros(0), (0.0,) * count
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(training.seed)
        model = _Vae(size, training)
        model.fit(points_NC, training)
    with torch.no_grad():
        latent_NL = model.encode(points_NC)
        mixed = model.decode(weight_N @ latent_NL)
        error_N = (model.decode(latent_NL) - points_NC).norm(dim=1)
        error_N = error_N / points_NC.norm(dim=1).clamp_min(_EPSILON)
    return mixed, tuple(float(error) for error in error_N)


class _Vae(nn.Module):
    """Linear plus a small network on both sides, so that latents nearly keep their geometry."""

    def __init__(self, size: int, training: Training) -> None:
        super().__init__()
        latent, hidden = training.latent, training.hidden
        self.to_mean = nn.Linear(size, latent)
        self.bend_in = nn.Sequential(nn.Linear(size, hidden), nn.ELU(), nn.Linear(hidden, latent))
        self.to_spread = nn.Linear(size, latent)
        self.to_point = nn.Linear(latent, size)
        self.bend_out = nn.Sequential(nn.Linear(latent, hidden), nn.ELU(), nn.Linear(hidden, size))

    def encode(self, point_BC: torch.Tensor) -> torch.Tensor:
        mean: torch.Tensor = self.to_mean(point_BC) + self.bend_in(point_BC)
        return mean

    def decode(self, latent_BL: torch.Tensor) -> torch.Tensor:
        point: torch.Tensor = self.to_point(latent_BL) + self.bend_out(latent_BL)
        return point

    def fit(self, points_NC: torch.Tensor, training: Training) -> None:
        """Random mixtures of the adapters in, themselves out; and mixtures of latents likewise."""
        steps, batch = training.steps, training.batch
        optimizer = torch.optim.Adam(self.parameters(), lr=training.rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        dirichlet = torch.distributions.Dirichlet(torch.full((len(points_NC),), 0.5))
        for _ in range(steps):
            mix_BN = dirichlet.sample((batch,))
            point_BC = torch.cat([mix_BN @ points_NC, points_NC])
            mean_BL = self.encode(point_BC)
            log_var_BL = self.to_spread(point_BC) - 6  # starts narrow: the pool is small
            noise_BL = torch.randn_like(mean_BL) * (0.5 * log_var_BL).exp()
            decoded = self.decode(mean_BL + noise_BL)
            # Task arithmetic happens on latents, so their mixtures must decode to mixtures.
            along = self.decode(mix_BN @ self.encode(points_NC))
            loss = (decoded - point_BC).square().mean()
            loss = loss + (along - mix_BN @ points_NC).square().mean()
            divergence = 0.5 * (mean_BL.square() + log_var_BL.exp() - 1 - log_var_BL).mean()
            optimizer.zero_grad()
            (loss + training.kl * divergence).backward()
            optimizer.step()
            schedule.step()
