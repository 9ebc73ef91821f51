"""Formats that are not served as they are: made an ordinary LoRA by `convert`, or refused.

What is known of them stands here, so that a server can name them; how they are converted, in
`merging.variants`, which needs more than a folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from vllm_lora_ext.adapters.folder import AdapterFolder
from vllm_lora_ext.adapters.readers.base import Need, Reader, of_type
from vllm_lora_ext.adapters.readers.peft_config import INITS
from vllm_lora_ext.adapters.readers.tuners import SIZES

_PEFT = "https://github.com/huggingface/peft"
_FACTORY = re.compile(r".+\.weight_a(\.\d+)?")


def _is_bat(folder: AdapterFolder) -> bool:
    config = folder.config
    return config.get("peft_type") == "MISS" and config.get("init_weights") == "bat"


def _took_from_the_base(folder: AdapterFolder) -> bool:
    kind = folder.config.get("init_lora_weights")
    starts = ("pissa", "olora", "corda", "loftq")
    named = isinstance(kind, str) and kind.lower() not in INITS and kind.lower().startswith(starts)
    return folder.config.get("peft_type") == "LORA" and named


def _is_curriculum(folder: AdapterFolder) -> bool:
    return any(name.endswith(".base_weight_scale.logit") for name in folder.names)


def _is_factory(folder: AdapterFolder) -> bool:
    return any(map(_FACTORY.fullmatch, folder.names))


def _of_peft(
    peft_type: str, title: str, paper: str, needs: tuple[Need, ...], *settings: str
) -> Reader:
    return Reader(
        name=peft_type.lower(), title=title, url=_PEFT, files=f"peft_type {peft_type}",
        peft_types=(peft_type,), detect=of_type(peft_type), paper=paper, needs=needs,
        settings=dict.fromkeys(settings, SIZES),
    )  # fmt: skip


def _refused(peft_type: str, title: str, reason: str) -> Reader:
    return Reader(
        name=peft_type.lower(), title=title, url=_PEFT, files=f"peft_type {peft_type}",
        peft_types=(peft_type,), detect=of_type(peft_type), refused=reason,
    )  # fmt: skip


def _by_what_is_given(folder: AdapterFolder) -> bool:
    """Such a folder looks like any other: `--index` or `--pruned` says what it is."""
    return False


def _other(
    name: str, title: str, files: str, needs: tuple[Need, ...],
    detect: Callable[[AdapterFolder], bool], *, url: str, paper: str = "",
    peft_types: tuple[str, ...] = (), settings: Mapping[str, str] | None = None,
) -> Reader:  # fmt: skip
    return Reader(
        name=name, title=title, url=url, files=files, peft_types=peft_types, detect=detect,
        paper=paper, needs=needs, settings=settings or {},
    )  # fmt: skip


CONVERTED = (
    _of_peft("FOURIERFT", "FourierFT", "https://arxiv.org/abs/2405.03003", ("base",), "sizes"),
    _of_peft("C3A", "C3A", "https://arxiv.org/abs/2407.19342", ("rank",)),
    _of_peft("RANDLORA", "RandLoRA", "https://arxiv.org/abs/2502.00987", ("base", "rank"), "sizes"),
    _of_peft("PVERA", "PVeRA", "https://arxiv.org/abs/2512.07703", ("base",), "sizes"),
    _of_peft("HRA", "HRA", "https://arxiv.org/abs/2405.17484", ("base",)),
    _of_peft("HIRA", "HiRA", "https://github.com/hqsiswiliam/hira", ("base", "rank")),
    _of_peft("IA3", "IA3", "https://arxiv.org/abs/2205.05638", ("base", "rank")),
    _other(
        "miss_bat", "MiSS bat", "peft_type MISS, init_weights bat", ("base", "rank"), _is_bat,
        url=_PEFT, paper="https://arxiv.org/abs/2409.15371", peft_types=("MISS",),
    ),
    _other(
        "rebase", "PiSSA, OLoRA, CorDA, LoftQ", "peft_type LORA, init_lora_weights names one of"
        " them: it changed the base weights when training began", ("init",), _took_from_the_base,
        url=_PEFT, paper="https://arxiv.org/abs/2404.02948", peft_types=("LORA",),
    ),
    _other(
        "scalezero", "ScaleZero (dynamic parameter scaling)",
        "<module>.base_weight_scale.logit and <module>.adapters.<j>.lora_A", ("rank",),
        _is_curriculum, url="https://github.com/opendilab/LightZero",
        settings={
            "stage": "how many adapters count", "lora_alpha": "lora_alpha of the training config",
        },
    ),
    _other(
        "lorafactory", "LoRAFactory", "<module>.weight_a and <module>.weight_b", ("init",),
        _is_factory, url="https://github.com/hhnqqq/MyTransformers",
        settings={
            "lora_variant": "which variant it is",
            "lora_scaler": "lora_scaler of the training arguments",
        },
    ),
    _other(
        "loram", "LoRAM", "an ordinary LoRA folder, and LoRAM's index files", ("index",),
        _by_what_is_given, url="https://github.com/junzhang-zj/LoRAM",
        paper="https://arxiv.org/abs/2502.13533",
    ),
    _other(
        "llm_pruner", "LLM-Pruner", "an ordinary LoRA folder, and both models' weights",
        ("base", "pruned"), _by_what_is_given, url="https://github.com/horseee/LLM-Pruner",
        paper="https://arxiv.org/abs/2305.11627",
    ),
)  # fmt: skip

_ROTATES = "it rotates the base weight: the delta has full rank and no low-rank part"
_NOT_A_DELTA = "it changes no linear layer's weight"

REFUSED = (
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
