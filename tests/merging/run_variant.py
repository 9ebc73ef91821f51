"""A fixture's case.json as a call of the conversions, by system, method and parameters alone."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from vllm_lora_ext.merging.factors import Factors, Pair
from vllm_lora_ext.merging.generate.icm import Decoder, decode_adapter
from vllm_lora_ext.merging.ops.truncate import truncate
from vllm_lora_ext.merging.variants import Converted, extract, read_variant

# What else a method takes from the case's parameters, as settings of the conversion.
SETTINGS = {
    "nola_expand": ("basis_check",),
    "loram_recover": (
        "lora_recover_type", "recovered", "head_dim", "num_heads", "num_key_value_heads",
    ),
    "dps_stage": ("stage", "lora_alpha", "lora_scale_init", "scale_range"),
}  # fmt: skip
METHODS = frozenset({"dora", "ia3", "icm_decode", "loram_recover", "extract_svd", "nola_expand"})
MORE = ("PEFT tuner ", "LightZero", "LoRAFactory", "LLM-Pruner")


@dataclass(frozen=True)
class Run:
    """What a case gave: the conversion, and the flat vector where there is one."""

    converted: Converted
    flat_V: torch.Tensor | None = None


def handles(case: dict[str, Any]) -> bool:
    """Whether the case is a conversion or generation of one artefact."""
    return (
        case["method"] in METHODS
        or case["method"].startswith("rebase_")
        or case["system"].startswith(MORE)
    )


def run_variant(
    case_dir: Path, case: dict[str, Any], rank: int | None = None, multipliers: bool = False
) -> Run:
    """Run a case.

    Args:
        case_dir: its folder; the inputs' paths start at the folder above.
        case: its case.json.
        rank: of an approximation; by default the case's.
        multipliers: take DoRA's and IA3's exact form in place of the approximation.
    """
    root, given = case_dir.parent, case["parameters"]
    paths = _Paths(root, case)
    if case["method"] == "icm_decode":
        return _decode(paths, given)
    if case["method"] == "extract_svd":
        base = paths.base()
        assert base is not None, "two checkpoints are compared"
        converted = extract(
            paths.of("weights"), base, given["max_rank"], modules=given.get("modules"),
            sv_epsilon=given.get("sv_epsilon") or 0.0,
        )  # fmt: skip
        return Run(converted)
    if rank is None and not case["exact"] and not multipliers:
        rank = case["rank"]
    settings = {
        key: given[key] for key in SETTINGS.get(case["method"], ()) if given.get(key) is not None
    }
    index = paths.index(given["index"]) if given.get("index") is not None else None
    base = None if "full_shapes" in given else paths.base()  # such a case has its own geometry
    converted = read_variant(
        paths.of("adapter", "state"), base=base, init=paths.init(), index=index,
        rank=rank, settings=settings, multipliers=multipliers,
    )  # fmt: skip
    return Run(converted)


def factors_of(case_dir: Path, case: dict[str, Any], rank: int | None = None) -> Factors:
    """The factors that a case's adapter is served with, its weight included."""
    factors = run_variant(case_dir, case, rank).converted.factors
    weight = case["inputs"][0].get("weight", 1.0)
    modules = {
        name: truncate(Pair(pair.a_RK, pair.b_NR * weight), rank).pair
        for name, pair in factors.modules.items()
    }
    return dataclasses.replace(factors, modules=modules)


def _decode(paths: _Paths, given: dict[str, Any]) -> Run:
    latent = load_file(paths.of("latent"))
    config = json.loads(paths.of("adapter_config").read_text())
    z_L, condition_C = latent["z"][0], latent["condition"][0]
    factors = decode_adapter(
        paths.of("generator"), paths.of("layout"), config, condition_C, z_L=z_L
    )
    flat_V = Decoder(paths.of("generator"), given["condition_dim"])(z_L, condition_C)
    return Run(Converted(factors, "icm"), flat_V[: given["input_length"]])


class _Paths:
    """The inputs of a case. All of them were made on the base model `inputs/base`."""

    def __init__(self, root: Path, case: dict[str, Any]) -> None:
        self._root, self._inputs = root, case["inputs"]

    def of(self, *kinds: str) -> Path:
        """The first input of one of these kinds: the artefact itself."""
        return next(
            self._root / entry[kind]
            for entry in self._inputs
            for kind in kinds
            if kind in entry
        )  # fmt: skip

    def base(self) -> Path | None:
        """The base that the case names, else the one all fixtures share, for its shapes."""
        named = [entry["base"] for entry in self._inputs if "base" in entry]
        where = self._root / (named[0] if named else "inputs/base")
        return where if named or where.is_dir() else None

    def init(self) -> Path | None:
        """The second adapter, which is subtracted: what training began with."""
        adapters = [entry["adapter"] for entry in self._inputs if "adapter" in entry]
        return self._root / adapters[1] if len(adapters) > 1 else None

    def index(self, text: str) -> Path:
        """`input/index: what it holds`, beside the case's adapter."""
        below = text.split(":", 1)[0]
        return self.of("adapter").parent.parent / below
