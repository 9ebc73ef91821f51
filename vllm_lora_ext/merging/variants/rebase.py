"""Adapters that took something out of the base weight when training began: [B, -B0] [A; A0].

PiSSA, OLoRA and their kin train on W - s B0 A0. On the plain W the delta is s (B A - B0 A0), of
twice the rank. The initial adapter must be given, or recomputed where the base weight fixes it.
"""

from __future__ import annotations

import dataclasses

import torch

from vllm_lora_ext.adapters.readers import plain
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.factors import Factors, Pair, fold
from vllm_lora_ext.merging.ops.concat import concat
from vllm_lora_ext.merging.variants.conversion import Conversion
from vllm_lora_ext.merging.variants.files import Artefact, as_folder


def rebase(conversion: Conversion) -> Factors:
    """The delta to the plain base. Raises AdapterError `missing_setting`, `setting_mismatch`."""
    kind = str(conversion.folder.config.get("init_lora_weights")).lower()
    trained = _read(conversion.folder)
    if conversion.init is not None:
        with as_folder(conversion.init, conversion.allow_pickle) as where:
            first = Artefact(where)
            begun = _read(first)
            first.finish()
    elif conversion.base is not None and kind in ("pissa", "olora"):
        begun = Factors({
            name: initial(conversion.weight(name), pair.rank, kind, trained.scales[name])
            for name, pair in trained.modules.items()
        })  # fmt: skip
        conversion.notes.append(f"the initial {kind} factors were recomputed from the base weights")
    else:
        raise AdapterError(
            "missing_setting", f"init_lora_weights '{kind}' changed the base when training began,"
            " and what it took out is not in this folder", seen="no initial adapter",
            limit="its folder; or the base model, for 'pissa' and 'olora'",
            fix="give the adapter that was saved before training",
        )  # fmt: skip
    if kind.startswith("loftq"):
        conversion.notes.append(
            "LoftQ trained over a quantised base; what rounding took from the plain one is in no"
            " file of the adapter, and left out"
        )
    return subtract(trained, begun)


def subtract(trained: Factors, begun: Factors) -> Factors:
    """trained - begun, by concatenation. Raises AdapterError `setting_mismatch`."""
    if set(trained.modules) != set(begun.modules):
        odd = sorted(set(trained.modules) ^ set(begun.modules))
        raise AdapterError(
            "setting_mismatch", "the adapter and its initial one adapt other layers", seen=odd[:3],
            limit="the same layers", fix="give the adapter that this training began with",
        )  # fmt: skip
    modules = {}
    for name, now in trained.modules.items():
        then = begun.modules[name]
        if now.a_RK.shape[1] != then.a_RK.shape[1] or now.b_NR.shape[0] != then.b_NR.shape[0]:
            raise AdapterError(
                "shape_mismatch", f"{name} has other sizes in the initial adapter",
                seen=[list(then.a_RK.shape), list(then.b_NR.shape)],
                limit=[list(now.a_RK.shape), list(now.b_NR.shape)],
                fix="give the adapter that this training began with",
            )  # fmt: skip
        modules[name] = concat([now, Pair(then.a_RK, -then.b_NR)])
    return dataclasses.replace(trained, modules=modules, scales={}, rslora=False)


def initial(weight_NK: torch.Tensor, rank: int, kind: str, scale: float) -> Pair:
    """What PEFT took out of W, scale included.

    PiSSA: the top singular part of W, which is divided by the scale first, so the scale drops out.
    OLoRA: scale · Q_r R_r of W's QR.
    """
    if kind == "pissa":
        u, s, vh = torch.linalg.svd(weight_NK.double(), full_matrices=False)
        root = s[:rank].sqrt()
        return Pair((root[:, None] * vh[:rank]).float(), (u[:, :rank] * root).float())
    q, r = torch.linalg.qr(weight_NK.double())
    return Pair(r[:rank].float(), (scale * q[:, :rank]).float())


def _read(folder: Artefact) -> Factors:
    folder.config = {**folder.config, "init_lora_weights": True}
    return fold(plain.read(folder), folder.config)
