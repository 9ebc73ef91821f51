"""Deltas written in a transformed space: FourierFT, C3A, RandLoRA, and PVeRA's mean."""

from __future__ import annotations

import re

import torch

from vllm_lora_ext.adapters.readers.names import group, part
from vllm_lora_ext.adapters.readers.peft_config import bad_value
from vllm_lora_ext.adapters.readers.tuners import (
    bad_shape,
    layer_sizes,
    number,
    read_tuner_config,
    take_shaped,
    whole,
)
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.factors import Factors, Pair
from vllm_lora_ext.merging.variants.conversion import Conversion
from vllm_lora_ext.merging.variants.lowrank import drop_zeros

_FOURIER = re.compile(r"(?P<module>.+)\.(?P<part>fourierft_spectrum)")
_C3A = re.compile(r"(?P<module>.+)\.(?P<part>c3a_kernel)")
_RANDLORA = re.compile(r"(?P<module>.+)\.(?P<part>randlora_(lambda|gamma))")
_PVERA = re.compile(r"(?P<module>.+)\.(?P<part>pvera_lambda_[bd])")
_SEEDS = (1 << 63) - 1
_SERVED = 512  # vLLM's largest rank: what is above must be cut anyway


def fourierft(conversion: Conversion) -> Factors:
    """FourierFT (arXiv 2405.03003): scaling · Re(ifft2(S)), S sparse. Exact, never dense.

    The places of S's entries are not stored: torch's CPU generator draws them from
    `random_loc_seed` for the layer's size.
    """
    folder = conversion.folder
    keys = ("n_frequency", "n_frequency_pattern", "random_loc_seed", "scaling")
    base_model = read_tuner_config(folder, keys)
    scaling = number(folder.config, "scaling")
    seed = whole(folder.config, "random_loc_seed", 0, _SEEDS)
    modules = {}
    for name, parts in group(folder.names, _FOURIER).items():
        spectrum_F = take_shaped(folder, part(parts, "fourierft_spectrum", name), None)
        width, out = layer_sizes(folder, name)
        if len(spectrum_F) > out * width:
            raise bad_shape(name, tuple(spectrum_F.shape), f"up to {out * width} frequencies")
        drawn = torch.randperm(out * width, generator=torch.Generator().manual_seed(seed))
        place_F = drawn[: len(spectrum_F)]
        pair = fourier_factors(spectrum_F, place_F // width, place_F % width, out, width)
        if not bool(spectrum_F.isfinite().all()):
            raise AdapterError("not_finite", f"the spectrum of {name} is not finite")
        if pair.rank <= _SERVED:
            pair = drop_zeros(pair)
        modules[name] = Pair(pair.a_RK, pair.b_NR * scaling)
    return Factors(modules, base_model)


def fourier_factors(
    value_F: torch.Tensor, row_F: torch.Tensor, column_F: torch.Tensor, out: int, width: int
) -> Pair:
    """Re(ifft2(S)) as factors, S holding `value` at (row, column).

    With S's distinct rows p, ifft2(S) = sum_p f_p (ifft of S's row p), f_p a column of the inverse
    DFT: Re(f g^T) = Re f Re g^T - Im f Im g^T is two ranks a row. Whichever of rows and columns are
    fewer are used.
    """
    by_row = len(row_F.unique()) <= len(column_F.unique())
    along, across = (row_F, column_F) if by_row else (column_F, row_F)
    size, other = (out, width) if by_row else (width, out)
    lines, line_F = along.unique(return_inverse=True)
    s = torch.zeros(len(lines), other, dtype=torch.float64)
    s.index_put_((line_F, across), value_F.double(), accumulate=True)
    g = torch.fft.ifft(s, dim=1)
    one_hot = torch.zeros(len(lines), size, dtype=torch.float64)
    one_hot[torch.arange(len(lines)), lines] = 1
    f = torch.fft.ifft(one_hot, dim=1)
    left = torch.cat([f.real, -f.imag]).float()
    right = torch.cat([g.real, g.imag]).float()
    return Pair(right, left.T) if by_row else Pair(left, right.T)


def c3a(conversion: Conversion) -> Factors:
    """C3A (arXiv 2407.19342): blocks w of b values, block[j, l] = w[(l - j) mod b] / in."""
    folder = conversion.folder
    base_model = read_tuner_config(folder, ("block_size", "block_size_pattern"))
    modules = {}
    for name, parts in group(folder.names, _C3A).items():
        tensor = part(parts, "c3a_kernel", name)
        kernel_MNB = take_shaped(folder, tensor, None, None, None)
        rows, columns, size = kernel_MNB.shape
        steps = torch.arange(size)
        block = kernel_MNB[:, :, (steps[None] - steps[:, None]) % size]
        delta = block.transpose(1, 2).reshape(rows * size, columns * size)
        modules[name] = conversion.dense(name, delta / (columns * size))
    return Factors(modules, base_model)


def randlora(conversion: Conversion) -> Factors:
    """RandLoRA (arXiv 2502.00987), with stored projections: full rank, so approximated.

    delta = alpha/r · sum_b B_b diag(λ_b) A diag(γ_b), A on the layer's smaller side.
    """
    folder = conversion.folder
    keys = (
        "projection_prng_key", "r", "randlora_alpha", "randlora_dropout", "save_projection",
        "sparse", "very_sparse",
    )  # fmt: skip
    base_model = read_tuner_config(folder, keys)
    rank = whole(folder.config, "r")
    scale = number(folder.config, "randlora_alpha") / rank
    shared = [f"base_model.randlora_{p}" for p in "AB"]
    if shared[0] not in folder.names:
        raise AdapterError(
            "unsupported_feature", "RandLoRA without stored projections: they are drawn in a dtype"
            " that depends on the trainer's device", seen="save_projection false",
            limit="save_projection true", fix="save it with save_projection",
        )  # fmt: skip
    folder.skip(name for name in folder.names if name.endswith((".randlora_A", ".randlora_B")))
    a_R1K = take_shaped(folder, shared[0], rank, 1, None)
    b_NGR = take_shaped(folder, shared[1], None, None, rank)
    modules = {}
    for name, parts in group(folder.names, _RANDLORA).items():
        width, out = layer_sizes(folder, name)
        small, large = min(width, out), max(width, out)
        lambda_RG = take_shaped(folder, part(parts, "randlora_lambda", name), rank, None)
        bases = lambda_RG.shape[1]
        gamma_GK = take_shaped(folder, part(parts, "randlora_gamma", name), bases, small)
        if b_NGR.shape[0] < large or b_NGR.shape[1] < bases or a_R1K.shape[2] < small:
            raise bad_shape(shared[1], tuple(b_NGR.shape), f"[{large}, {bases}, {rank}] or more")
        scaled = lambda_RG[:, :, None] * a_R1K[:, :, :small] * gamma_GK[None]
        # PEFT flattens A rank by rank and B base by base, and trains with that pairing.
        a_XK = scaled.reshape(rank * bases, small)
        b_NX = b_NGR[:large, :bases].reshape(large, bases * rank)
        delta = b_NX @ a_XK if small == width else a_XK.T @ b_NX.T
        modules[name] = conversion.dense(name, delta * scale)
    return Factors(modules, base_model)


def pvera(conversion: Conversion) -> Factors:
    """PVeRA (arXiv 2512.07703) without sampling: VeRA with the first half of A and λ_d, the mean.

    Exact; with `sample_at_inference` the answer is drawn anew for each token, which is refused.
    """
    folder = conversion.folder
    keys = (
        "d_initial", "generator_seed", "projection_prng_key", "pvera_dropout", "r",
        "save_projection",
    )  # fmt: skip
    if folder.config.get("sample_at_inference"):
        raise bad_value("sample_at_inference in adapter_config.json", True, "false")
    base_model = read_tuner_config(folder, keys)
    rank = whole(folder.config, "r")
    shared = [f"base_model.pvera_{p}" for p in "AB"]
    a_RK = take_shaped(folder, shared[0], 2 * rank, None)
    b_NR = take_shaped(folder, shared[1], None, rank)
    modules = {}
    for name, parts in group(folder.names, _PVERA).items():
        width, out = layer_sizes(folder, name)
        d_R = take_shaped(folder, part(parts, "pvera_lambda_d", name), 2 * rank)[:rank]
        b_N = take_shaped(folder, part(parts, "pvera_lambda_b", name), out)
        if a_RK.shape[1] < width or b_NR.shape[0] < out:
            raise bad_shape(shared[0], tuple(a_RK.shape), f"[{2 * rank}, {width} or more]")
        modules[name] = Pair(a_RK[:rank, :width] * d_R[:, None], b_NR[:out] * b_N[:, None])
    return Factors(modules, base_model)
