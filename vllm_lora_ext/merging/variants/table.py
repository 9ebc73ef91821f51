"""The table of variants: what each is called, how it is told apart, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from vllm_lora_ext.adapters.registry import READERS
from vllm_lora_ext.merging.factors import Factors
from vllm_lora_ext.merging.variants import (
    curriculum,
    lorafactory,
    pruned,
    rebase,
    scaled,
    seeded,
    spectral,
)
from vllm_lora_ext.merging.variants.files import Artefact
from vllm_lora_ext.merging.variants.source import Source

Result = Literal["exact", "approximate", "multiplier", "refused"]
Need = Literal["base", "sizes", "init", "index", "rank", "settings"]


@dataclass(frozen=True)
class Variant:
    """One family of artefacts.

    Args:
        name: `Converted.system`.
        title: how its authors call it.
        paper: where it is described; a repository where there is no paper.
        marks: what tells it apart, for documentation.
        result: what becomes of it. `multiplier`: exact with a multiplier, else approximate.
        needs: what must be given beside the folder (`sizes`: the base model's shapes only).
        detect: whether an artefact is of this family. Must raise nothing.
        convert: the factors; None where the reader of the same name does it all, and for what is
            refused.
        reason: why it is refused.
    """

    name: str
    title: str
    paper: str
    marks: str
    result: Result
    needs: tuple[Need, ...] = ()
    detect: Callable[[Artefact], bool] = lambda folder: False
    convert: Callable[[Source], Factors] | None = None
    reason: str = ""


def _type(*names: str) -> Callable[[Artefact], bool]:
    return lambda folder: folder.config.get("peft_type") in names


def _tensor(mark: str) -> Callable[[Artefact], bool]:
    return lambda folder: any(mark in name for name in folder.names)


def _begun(folder: Artefact) -> bool:
    kind = folder.config.get("init_lora_weights")
    starts = ("pissa", "olora", "corda", "loftq", "lora_ga")
    return isinstance(kind, str) and kind.lower().startswith(starts)


def _bat(folder: Artefact) -> bool:
    config = folder.config
    return config.get("peft_type") == "MISS" and config.get("init_weights") == "bat"


def _served(name: str, needs: tuple[Need, ...] = ()) -> Variant:
    reader = next(reader for reader in READERS if reader.name == name)
    return Variant(
        name, reader.title, reader.paper or reader.url, reader.files, "exact", needs, reader.detect
    )


def _refused(peft_type: str, title: str, reason: str) -> Variant:
    return Variant(
        peft_type.lower(), title, "https://github.com/huggingface/peft", f"peft_type {peft_type}",
        "refused", detect=_type(peft_type), reason=reason,
    )  # fmt: skip


_ROTATES = "it rotates the base weight: the delta has full rank and no low-rank part"
_NOT_A_DELTA = "it changes no linear layer's weight"

VARIANTS: tuple[Variant, ...] = (
    Variant(
        "miss_bat", "MiSS bat", "https://arxiv.org/abs/2409.15371",
        "peft_type MISS, init_weights bat", "approximate", ("base", "rank"), _bat, scaled.bat,
    ),
    _served("adalora"),
    _served("loha"),
    _served("lokr"),
    _served("vera", ("sizes",)),
    _served("vblora"),
    _served("delora"),
    _served("miss", ("sizes",)),
    _served("gralora"),
    Variant(
        "fourierft", "FourierFT", "https://arxiv.org/abs/2405.03003", "peft_type FOURIERFT",
        "exact", ("sizes",), _type("FOURIERFT"), spectral.fourierft,
    ),
    Variant(
        "c3a", "C3A", "https://arxiv.org/abs/2407.19342", "peft_type C3A", "approximate", ("rank",),
        _type("C3A"), spectral.c3a,
    ),
    Variant(
        "randlora", "RandLoRA", "https://arxiv.org/abs/2502.00987",
        "peft_type RANDLORA, stored projections", "approximate", ("sizes", "rank"),
        _type("RANDLORA"), spectral.randlora,
    ),
    Variant(
        "pvera", "PVeRA", "https://arxiv.org/abs/2512.07703",
        "peft_type PVERA, stored projections, no sampling", "exact", ("sizes",), _type("PVERA"),
        spectral.pvera,
    ),
    _served("unilora"),
    Variant(
        "nola", "NOLA", "https://arxiv.org/abs/2310.02556",
        "<module>.lora_A.coefficients and <module>.lora_A.seed", "exact", (),
        _tensor(".lora_A.coefficients"), seeded.nola,
    ),
    Variant(
        "hra", "HRA", "https://arxiv.org/abs/2405.17484", "peft_type HRA", "exact", ("base",),
        _type("HRA"), scaled.hra,
    ),
    Variant(
        "hira", "HiRA", "https://github.com/hqsiswiliam/hira", "peft_type HIRA", "approximate",
        ("base", "rank"), _type("HIRA"), scaled.hira,
    ),
    Variant(
        "dora", "DoRA", "https://arxiv.org/abs/2402.09353", "<module>.lora_magnitude_vector",
        "multiplier", ("base", "rank"), _tensor("lora_magnitude_vector"), scaled.dora,
    ),
    Variant(
        "ia3", "IA3", "https://arxiv.org/abs/2205.05638", "peft_type IA3", "multiplier",
        ("base", "rank"), _type("IA3"), scaled.ia3,
    ),
    Variant(
        "rebase", "PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA", "https://arxiv.org/abs/2404.02948",
        "init_lora_weights names one of them", "exact", ("init",), _begun, rebase.rebase,
    ),
    Variant(
        "scalezero", "ScaleZero (dynamic parameter scaling)",
        "https://github.com/opendilab/LightZero",
        "<module>.base_weight_scale.logit and <module>.adapters.<j>.lora_A", "multiplier",
        ("settings",), curriculum.detect, curriculum.curriculum,
    ),
    Variant(
        "lorafactory", "LoRAFactory", "https://github.com/hhnqqq/MyTransformers",
        "<module>.weight_a and <module>.weight_b", "exact", ("settings",), lorafactory.detect,
        lorafactory.lorafactory,
    ),
    # An adapter of a pruned model looks like any other: these two are chosen by what is given.
    Variant(
        "loram", "LoRAM", "https://arxiv.org/abs/2502.13533",
        "an ordinary LoRA folder, and LoRAM's index files", "exact", ("index",),
        convert=pruned.loram,
    ),
    Variant(
        "llm_pruner", "LLM-Pruner", "https://arxiv.org/abs/2305.11627",
        "an ordinary LoRA folder, and both models' weights", "exact", ("base", "index"),
        convert=pruned.llm_pruner,
    ),
    *(
        Variant(
            reader.name, reader.title, reader.paper or reader.url, reader.files, "refused",
            detect=reader.detect, reason=reader.refused,
        )
        for reader in READERS
        if reader.refused
    ),
    _refused("OFT", "OFT", _ROTATES),
    _refused("BOFT", "BOFT", _ROTATES),
    _refused("ROAD", "RoAd", "it rotates the layer's output, bias included"),
    _refused("PSOFT", "PSOFT", "its bases come from an SVD of the base weight that is not stored"),
    _refused("TINYLORA", "TinyLoRA", "its bases come from an SVD of the base weight"),
    _refused("SHIRA", "SHiRA", "its delta is sparse, of full rank"),
    _refused("WAVEFT", "WaveFT", "its delta is sparse or an inverse wavelet transform: full rank"),
    _refused("PEANUT", "PEANuT", "a small network of the base weight makes its delta"),
    _refused("GLORA", "GLoRA", "it scales and shifts the base weight and bias: full rank"),
    _refused("FROD", "FRoD", "it replaces the base weight"),
    _refused("OSF", "OSF", "it replaces the base weight"),
    _refused("ADAMSS", "AdaMSS", "its subspaces come from an SVD of the base weight"),
    _refused("DEFT", "DEFT", "it projects the base weight: full rank"),
    *(
        _refused(name, name.replace("_", " ").title(), _NOT_A_DELTA)
        for name in (
            "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT",
            "ADAPTION_PROMPT", "LN_TUNING", "BEFT", "TRAINABLE_TOKENS", "CARTRIDGE", "SHADOW",
            "SUPERTUNING",
        )
    ),
)  # fmt: skip
