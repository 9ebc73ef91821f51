"""Deltas that multiply the base weight: DoRA, IA3, HiRA, HRA, and MiSS's flavour `bat`.

DoRA and IA3 are exact with a multiplier on the layer's output or input, HRA as a LoRA; the others,
and these without a multiplier, have full rank and are approximated.
"""

from __future__ import annotations

import re

import torch

from vllm_lora_ext.adapters.readers import plain
from vllm_lora_ext.adapters.readers.names import group, part
from vllm_lora_ext.adapters.readers.tuners import (
    bad_shape,
    check_shape,
    read_tuner_config,
    take_shaped,
    whole,
)
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.factors import Factors, Pair, fold
from vllm_lora_ext.merging.variants.conversion import Conversion

_MAGNITUDE = re.compile(r"(?P<module>.+)\.(?P<part>lora_magnitude_vector)(\.\w+)?")
_IA3 = re.compile(r"(?P<module>.+)\.(?P<part>ia3_l)")
_HIRA = re.compile(r"(?P<module>.+)\.(?P<part>hira_[AB])")
_HRA = re.compile(r"(?P<module>.+)\.(?P<part>hra_u)")
_BAT = re.compile(r"(?P<module>.+)\.(?P<part>miss_block)")


def dora(conversion: Conversion) -> Factors:
    """DoRA (arXiv 2402.09353): y = g ⊙ (W x + s B A x), g = magnitude / row norm of (W + s B A).

    `D = g ⊙ sBA + (g - 1) ⊙ W`: the first part is a LoRA, the second has full rank.
    """
    folder = conversion.folder
    magnitudes = {
        name: take_shaped(folder, parts["lora_magnitude_vector"], None)
        for name, parts in group(folder.names, _MAGNITUDE).items()
    }
    factors = _plain_part(conversion, use_dora=False)
    modules = {}
    for name, pair in factors.modules.items():
        if name not in magnitudes:
            modules[name] = pair
            continue
        weight_NK = conversion.weight(name)
        if weight_NK.shape != (pair.b_NR.shape[0], pair.a_RK.shape[1]):
            raise bad_shape(f"{name}.weight", tuple(weight_NK.shape), "the adapter's sizes")
        tuned_NK = weight_NK + pair.delta()
        check_shape(f"{name}.lora_magnitude_vector", magnitudes[name].shape, len(weight_NK))
        g_N = magnitudes[name] / tuned_NK.norm(dim=1)
        if conversion.multipliers:
            conversion.out_scale[name], modules[name] = g_N, pair
        else:
            modules[name] = conversion.dense(name, g_N[:, None] * tuned_NK - weight_NK)
    return Factors(modules, factors.base_model, factors.source)


def _plain_part(conversion: Conversion, **changed: object) -> Factors:
    """The ordinary LoRA in a folder that the plain reader would refuse for one feature."""
    folder, config = conversion.folder, conversion.folder.config
    names = folder.names
    folder.config = {**config, **changed}
    folder.hide(name for name in names if "lora_magnitude_vector" in name)
    try:
        return fold(plain.read(folder), folder.config)
    finally:
        folder.config = config


def ia3(conversion: Conversion) -> Factors:
    """IA3 (arXiv 2205.05638): y = l ⊙ (W x), in feed-forward layers y = W (l ⊙ x). No LoRA at all.

    A layer with a bias scales the bias too, which only the output multiplier can do.
    """
    keys = ("feedforward_modules", "init_ia3_weights")
    base_model = read_tuner_config(conversion.folder, keys)
    modules = {}
    for name, parts in group(conversion.folder.names, _IA3).items():
        tensor = part(parts, "ia3_l", name)
        shape = conversion.folder.shape(tensor)
        if len(shape) != 2 or 1 not in shape:
            raise bad_shape(tensor, shape, "[out, 1], or [1, in] in a feed-forward layer")
        l_X, weight_NK = conversion.folder.take(tensor).flatten(), conversion.weight(name)
        out, width = weight_NK.shape
        on_input = shape[0] == 1 and not (shape[1] == 1 and out == 1)
        if len(l_X) != (width if on_input else out):
            raise bad_shape(tensor, shape, f"[{out}, 1] or [1, {width}]")
        if conversion.multipliers:
            (conversion.in_scale if on_input else conversion.out_scale)[name] = l_X
            modules[name] = Pair(torch.zeros(0, width), torch.zeros(out, 0))
            continue
        if not on_input and conversion.base is not None and f"{name}.bias" in conversion.base.names:
            raise AdapterError(
                "unsupported_feature", f"IA3 scales the bias of {name}, which no LoRA can do",
                fix="serve it where output multipliers are applied",
            )  # fmt: skip
        delta = weight_NK * (l_X - 1 if on_input else (l_X - 1)[:, None])
        modules[name] = conversion.dense(name, delta)
    return Factors(modules, base_model)


def hira(conversion: Conversion) -> Factors:
    """HiRA (ICLR 2025): delta = W ⊙ (B A), of full rank."""
    base_model = read_tuner_config(conversion.folder, ("hira_dropout", "r", "rank_pattern"))
    modules = {}
    for name, parts in group(conversion.folder.names, _HIRA).items():
        weight_NK = conversion.weight(name)
        out, width = weight_NK.shape
        a_RK = take_shaped(conversion.folder, part(parts, "hira_A", name), None, width)
        b_NR = take_shaped(conversion.folder, part(parts, "hira_B", name), out, len(a_RK))
        modules[name] = conversion.dense(name, weight_NK * (b_NR @ a_RK))
    return Factors(modules, base_model)


def hra(conversion: Conversion) -> Factors:
    """HRA (arXiv 2405.17484): W H, H a product of Householder reflections. Exact at rank r.

    H_i = H_{i-1} (I - 2 u_i u_i^T), so H - I = sum_i c_i u_i^T with c_i = -2 H_{i-1} u_i, and the
    delta is (W c_i) u_i^T summed. With Gram-Schmidt, c_i = -2 u_i.
    """
    base_model = read_tuner_config(conversion.folder, ("apply_GS", "r"))
    rank = whole(conversion.folder.config, "r")
    orthogonal = bool(conversion.folder.config.get("apply_GS"))
    modules = {}
    for name, parts in group(conversion.folder.names, _HRA).items():
        tensor = part(parts, "hra_u", name)
        weight_NK = conversion.weight(name)
        u_KR = take_shaped(conversion.folder, tensor, weight_NK.shape[1], rank)
        rows_RK, columns_KR = reflections(u_KR, orthogonal)
        modules[name] = Pair(rows_RK, weight_NK @ columns_KR)
    return Factors(modules, base_model)


def reflections(u_KR: torch.Tensor, orthogonal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(V [R, K], C [K, R]) with H - I = C V."""
    u = u_KR.double()
    if orthogonal:
        rows: list[torch.Tensor] = []
        for column in u.T:
            for row in rows:
                column = column - (row @ column) * row
            rows.append(column / column.norm())
        v = torch.stack(rows)
        return v.float(), (-2 * v.T).float()
    v = (u / u.norm(dim=0)).T
    columns: list[torch.Tensor] = []
    for i, row in enumerate(v):
        moved = row.clone()
        for j in range(i):
            moved = moved + columns[j] * (v[j] @ row)
        columns.append(-2 * moved)
    return v.float(), torch.stack(columns, dim=1).float()


def bat(conversion: Conversion) -> Factors:
    """MiSS `bat`: per r × r block of W (block row i), delta = W_block M_i + M_i. Of full rank."""
    base_model = read_tuner_config(conversion.folder, ("mini_r", "miss_dropout", "r"))
    modules = {}
    for name, parts in group(conversion.folder.names, _BAT).items():
        tensor = part(parts, "miss_block", name)
        weight_NK = conversion.weight(name)
        out, width = weight_NK.shape
        shape = conversion.folder.shape(tensor)
        rank = shape[-1] if shape and shape[-1] else 1
        if shape != (out // rank, rank, rank) or out % rank or width % rank:
            raise bad_shape(tensor, shape, f"[{out} / r, r, r], r a divisor of {out} and {width}")
        m_GRR = conversion.folder.take(tensor)
        w = weight_NK.reshape(out // rank, rank, width // rank, rank).transpose(1, 2)
        delta = w @ m_GRR[:, None] + m_GRR[:, None]
        modules[name] = conversion.dense(name, delta.transpose(1, 2).reshape(out, width))
    return Factors(modules, base_model)
