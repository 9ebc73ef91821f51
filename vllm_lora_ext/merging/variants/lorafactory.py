"""LoRAFactory's checkpoints (github.com/hhnqqq/MyTransformers): `weight_a`, `weight_b` and more.

    delta = scale · B A,   scale = lora_scaler / rank unless the variant says otherwise

Neither the variant nor lora_scaler stands in the files: settings `lora_variant`, `lora_scaler`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import torch

from vllm_lora_ext.adapters.readers.names import group, part
from vllm_lora_ext.adapters.readers.peft_config import bad_value
from vllm_lora_ext.adapters.readers.tuners import bad_shape
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.factors import Factors, Pair
from vllm_lora_ext.merging.ops.scale import number
from vllm_lora_ext.merging.variants.conversion import Conversion
from vllm_lora_ext.merging.variants.files import Artefact, as_folder
from vllm_lora_ext.merging.variants.rebase import subtract

_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>(init_)?weight_[ab](\.\d+)?|weight_(ab|a|b)_mixer|weight_e"
    r"|structure_gate|ranknum)"
)
Parts = Mapping[str, torch.Tensor]

SAME = ("lora", "lora_plus", "lora_fa", "lora_pro", "eva", "lora_da")
# The base weight loses the initial product when training begins: always, or where asked for.
REBASED = ("pissa", "milora", "olora", "nora")
MAYBE_REBASED = ("lora_ga", "lora_one", "lora_sb", "nzlora")
REFUSED = {
    "delta_lora": "the base weight itself was trained",
    "plora": "the base weight itself was trained",
    "relora": "earlier stages were merged into the base weight",
    "dora": "convert it as PEFT's DoRA: the magnitudes' names are not fixed here",
    "dude": "it depends on the base weight's norms",
    "hira": "it multiplies the base weight: full rank",
    "delora": "it depends on the base weight's norms",
    "lora_dash": "it depends on singular directions of the base weight",
    "ridgelora": "it multiplies the base weight: full rank",
    "sinelora": "it is not linear: sin stands between A, B and the output",
    "loran": "it is not linear in its factors' product, and its forward is not its merge",
    "aurora": "it is not linear: a spline stands between A and B",
    "denselora": "it is not linear: an activation stands between A and B",
    "loda": "it is not linear: an activation stands between A and B",
    "mora": "its square matrix has high rank",
    "randlora": "its delta has full rank; PEFT's RandLoRA is converted",
    "loha": "its forward is not linear and is not its own merge; PEFT's LoHa is converted",
    "lokr": "PEFT's LoKr is converted",
    "vera": "PEFT's VeRA is converted",
    "rasa": "its shared matrices are stored under names of the trainer's model",
    "bslora": "its shared matrices are stored under names of the trainer's model",
    "sharelora": "its shared matrices are stored under names of the trainer's model",
    "prolora": "its shared chunks are rotated by offsets that are not stored",
    "lora_ga_pro": "its scale depends on the average rank, which is not stored",
    "gora": "its scale depends on the average rank, which is not stored",
    "ralora": "its scale depends on the average rank, which is not stored",
    "increlora": "its ranks were grown during training under names that are not fixed",
    "goat": "it is routed: serve it, do not merge it",
    "lora_moe": "it is routed: serve it, do not merge it",
    "mola": "it is routed: serve it, do not merge it",
}


def lorafactory(conversion: Conversion) -> Factors:
    """The factors of a LoRAFactory checkpoint; base weights saved along are skipped.

    Raises:
        AdapterError: `missing_setting`, `unsupported_feature`, `bad_value`, `bad_shape`.
    """
    names = sorted({*SAME, "rslora", *_FORMULAS, *REBASED, *MAYBE_REBASED})
    variant = conversion.folder.setting("lora_variant", f"which variant it is: {', '.join(names)}")
    if not isinstance(variant, str):  # nor can it be looked up
        raise bad_value("lora_variant", variant, ", ".join(names))
    if variant in REFUSED:
        raise AdapterError(
            "unsupported_feature", f"LoRAFactory's {variant}: {REFUSED[variant]}", seen=variant,
            limit=names, fix="merge it into the base model with the program that made it",
        )  # fmt: skip
    if variant not in names:
        raise bad_value("lora_variant", variant, ", ".join(names))
    scaler = conversion.folder.setting("lora_scaler", "lora_scaler of the training arguments")
    scaler = number(scaler, "lora_scaler")
    trained, kept = _read(conversion.folder, variant, scaler, "weight")
    if not _rebased(conversion, variant):
        return trained
    if kept:
        return subtract(trained, _read(conversion.folder, variant, scaler, "init_weight")[0])
    if conversion.init is None:
        raise AdapterError(
            "missing_setting", f"LoRAFactory's {variant} changed the base when training began",
            seen="no initial adapter", limit="its checkpoint from before training",
            fix="give the initial adapter",
        )  # fmt: skip
    with as_folder(conversion.init, conversion.allow_pickle) as where:
        first = Artefact(where)
        return subtract(trained, _read(first, variant, scaler, "weight")[0])


def _rebased(conversion: Conversion, variant: str) -> bool:
    if variant not in MAYBE_REBASED:
        return variant in REBASED
    meaning = "whether training began by taking B A out of the base weight"
    return bool(conversion.folder.setting("lora_reset_weight", meaning))


def _read(folder: Artefact, variant: str, scaler: float, stem: str) -> tuple[Factors, bool]:
    """The factors, and whether the file also keeps the initial ones."""
    modules, kept = {}, False
    for name, names in group(folder.names, _PART).items():
        parts = {key: folder.take(tensor) for key, tensor in names.items()}
        kept = kept or "init_weight_a" in parts
        if variant == "melora":
            modules[name] = _melora(name, parts, scaler)
            continue
        for side in "ab":
            part(names, f"{stem}_{side}", name)
        a, b = parts[f"{stem}_a"], parts[f"{stem}_b"]
        if a.ndim != 2 or b.ndim != 2 or b.shape[1] != a.shape[0]:
            raise bad_shape(f"{name}.{stem}_b", tuple(b.shape), "[out, r]; weight_a [r, in]")
        made, scale = _FORMULAS.get(variant, _same)(a, parts)
        if variant == "rslora":
            scale = 1 / math.sqrt(a.shape[0])
        modules[name] = Pair(made, b * (scaler * scale))
    folder.skip(name for name in folder.names if name.endswith((".weight", ".bias")))
    return Factors(modules), kept


def _same(a_RK: torch.Tensor, parts: Parts) -> tuple[torch.Tensor, float]:
    return a_RK, 1 / a_RK.shape[0]


def _mixed(a_RK: torch.Tensor, parts: Parts) -> tuple[torch.Tensor, float]:
    """MosLoRA, NLoRA, LoRA-SB, LoRA-XS: B M A."""
    return _need(parts, "weight_ab_mixer") @ a_RK, 1 / a_RK.shape[0]


def _nora(a_RK: torch.Tensor, parts: Parts) -> tuple[torch.Tensor, float]:
    """NoRA: the mixer is itself a product of two."""
    mixer = _need(parts, "weight_a_mixer") @ _need(parts, "weight_b_mixer")
    return mixer @ a_RK, 1 / a_RK.shape[0]


def _adalora(a_RK: torch.Tensor, parts: Parts) -> tuple[torch.Tensor, float]:
    """AdaLoRA: A times E; the divisor is ranknum, or 1 when that is 0."""
    ranknum = float(_need(parts, "ranknum"))
    return a_RK * _need(parts, "weight_e"), 1 / (ranknum or 1.0)


def _salora(a_RK: torch.Tensor, parts: Parts) -> tuple[torch.Tensor, float]:
    """SALoRA: A times its gate, as it stands after training; the divisor is ranknum + 1."""
    return a_RK * _need(parts, "structure_gate"), 1 / (float(_need(parts, "ranknum")) + 1)


_FORMULAS: dict[str, Callable[[torch.Tensor, Parts], tuple[torch.Tensor, float]]] = {
    "moslora": _mixed, "nlora": _mixed, "lora_sb": _mixed, "lora_xs": _mixed, "nora": _nora,
    "adalora": _adalora, "salora": _salora, "melora": _same,
}  # fmt: skip


def _melora(name: str, parts: Parts, scaler: float) -> Pair:
    """MELoRA: small LoRAs along the diagonal; scale lora_scaler / (sum of their ranks)."""
    count = sum(key.startswith("weight_a.") for key in parts)
    try:
        a = torch.block_diag(*(parts[f"weight_a.{i}"] for i in range(count)))
        b = torch.block_diag(*(parts[f"weight_b.{i}"] for i in range(count)))
    except KeyError as error:
        raise AdapterError("missing_tensor", f"{name} lacks {error}", fix="save it again") from None
    if not count or a.shape[0] != b.shape[1]:
        raise bad_shape(f"{name}.weight_b", tuple(b.shape), f"[out, {a.shape[0]}]")
    return Pair(a, b * (scaler / a.shape[0]))


def _need(parts: Parts, name: str) -> torch.Tensor:
    if name not in parts:
        raise AdapterError(
            "missing_tensor", f"tensor '{name}' is missing beside {sorted(parts)}",
            fix="check lora_variant",
        )  # fmt: skip
    return parts[name]
