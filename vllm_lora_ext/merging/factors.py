"""Factors: an adapter as a map of modules to (A, B), and the way from and to PEFT folders."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_lora_ext.adapters import AdapterFolder, RoutedAdapter, load_adapter
from vllm_lora_ext.adapters.dora import refuse_dora
from vllm_lora_ext.adapters.folder import CONFIG
from vllm_lora_ext.adapters.limits import DTYPES
from vllm_lora_ext.adapters.output import fill, new_folder
from vllm_lora_ext.adapters.readers.names import PREFIX
from vllm_lora_ext.adapters.readers.peft_config import read_peft_config
from vllm_lora_ext.errors import AdapterError


class Pair(NamedTuple):
    """One module's delta `B A`, fp32, its scale folded into B.

    a_RK: [R, in]; b_NR: [out, R]. R may be 0.
    """

    a_RK: torch.Tensor
    b_NR: torch.Tensor

    @property
    def rank(self) -> int:
        return self.b_NR.shape[1]

    def delta(self) -> torch.Tensor:
        """The dense [out, in]: for tests and for merges in full space only."""
        return self.b_NR @ self.a_RK


@dataclass(frozen=True)
class Factors:
    """An adapter without scales, gates or files.

    Args:
        modules: name in the Hugging Face model (`model.layers.0.mlp.up_proj`) → its pair.
        base_model: what the adapter says it was trained on; may be empty.
        source: the folder, for messages.
        scales: module → the scale (alpha/r, alpha/sqrt(r)) that was folded into its B. Merges that
            imitate a tool working on unscaled factors divide by it; a module not in here has 1.
        rslora: those scales were alpha/sqrt(r). This and what follows only imitations of tools ask.
        config_rank: what PEFT makes room for, the larger of `r` and `rank_pattern`; 0: not known.
        config_scale: of a layer that no pattern names, whether the adapter has it or not.
    """

    modules: dict[str, Pair] = field(repr=False)
    base_model: str = ""
    source: str = ""
    scales: dict[str, float] = field(default_factory=dict, repr=False)
    rslora: bool = False
    config_rank: int = 0
    config_scale: float = 1.0

    def ranks(self) -> dict[str, int]:
        return {name: pair.rank for name, pair in self.modules.items()}

    @property
    def rank(self) -> int:
        """Largest rank of a module: what `max_lora_rank` must hold."""
        return max(self.ranks().values(), default=0)


def load_factors(folder: str | os.PathLike[str]) -> Factors:
    """Read an ordinary LoRA folder, every scale folded into B.

    A server merges too, and knows no roots here: links must stay in the folder or the hub's cache.

    Raises:
        AdapterError: those of `load_adapter`; `unsupported_feature` for an adapter with gates or
            on embeddings.
    """
    adapter = load_adapter(folder, roots=())
    config = AdapterFolder(folder, roots=()).config
    return fold(adapter, config if adapter.system == "plain" else {})


def fold(adapter: RoutedAdapter, config: Mapping[str, Any]) -> Factors:
    """The factors of an adapter that has no gates.

    Args:
        config: the PEFT config that its scales came from; empty when they are not known.
    Raises:
        AdapterError: `unsupported_feature`.
    """
    gated = [name for name, m in adapter.modules.items() if m.gate.source != "none"]
    gated += list(adapter.blocks)
    if adapter.template is not None:
        gated += list(adapter.template.sizes)
    if gated:
        raise AdapterError(
            "unsupported_feature", f"{adapter.source or 'the adapter'} is routed ({adapter.system})"
            " and cannot be merged: its gates depend on the token, or on the request",
            seen=sorted(gated)[0], limit="ordinary LoRA",
            fix="serve it as it is, or put routed adapters of"
            " one kind side by side with `vllm-lora-ext bundle --routed A --routed B`",
        )  # fmt: skip
    refuse_dora(adapter, "merged")
    embeddings = [name for name, m in adapter.modules.items() if m.kind == "embedding"]
    if embeddings:
        raise AdapterError(
            "unsupported_feature", f"{adapter.source or 'the adapter'} adapts an embedding, which"
            " cannot be merged", seen=sorted(embeddings)[0], limit="linear layers",
            fix="train without it, or serve the adapter alone",
        )  # fmt: skip
    modules = {name: Pair(m.a_RK, m.b_NR) for name, m in adapter.modules.items()}
    if not config:
        return Factors(modules, adapter.base_model, adapter.source)
    lora = read_peft_config(dict(config))
    scales = {name: lora.scale(name) for name in modules}
    return Factors(
        modules, adapter.base_model, adapter.source, scales, lora.rslora,
        config_rank=max([lora.r, *lora.ranks.values()]),
        config_scale=lora.alpha / (math.sqrt(lora.r) if lora.rslora else lora.r),
    )  # fmt: skip


def save_peft(
    factors: Factors,
    folder: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    extra_files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write an ordinary PEFT folder of scale 1; the same factors give the same bytes.

    The folder appears whole or not at all. Modules of rank 0 are left out.

    Args:
        folder: must be missing or empty.
        dtype: float32, bfloat16 or float16; the one rounding on the way.
        extra_files: name → content of files beside them (`recipe.lock.json`).
    Raises:
        AdapterError: `empty_adapter`, `bad_value` (dtype), `rank_mismatch`, `not_finite` (a value
            that dtype cannot hold counts), `output_exists` (the folder holds something),
            `output_failed`.
    """
    config, tensors = peft_files(factors, dtype)
    with new_folder(Path(folder)) as part:
        fill(part, tensors, {CONFIG: config, **(extra_files or {})})
    return Path(folder)


def peft_files(
    factors: Factors, dtype: torch.dtype = torch.float32
) -> tuple[bytes, dict[str, torch.Tensor]]:
    """What `save_peft` writes: `adapter_config.json`, and the tensors by their names."""
    if dtype not in DTYPES.values():
        raise AdapterError(
            "bad_value", "an adapter cannot be saved in this dtype", seen=str(dtype),
            limit=list(DTYPES), fix="choose one of them",
        )  # fmt: skip
    tensors = {}
    for name, pair in sorted(factors.modules.items()):
        if pair.rank:
            tensors.update(_tensors(name, pair, dtype))
    if not tensors:
        raise AdapterError(
            "empty_adapter", "nothing is left to save: every module has rank 0",
            fix="check weights and filters",
        )  # fmt: skip
    return (json.dumps(peft_config(factors), indent=2) + "\n").encode(), tensors


def peft_config(factors: Factors) -> dict[str, Any]:
    """`adapter_config.json` for these factors: alpha equals the rank everywhere, so scale is 1."""
    ranks = {name: rank for name, rank in factors.ranks().items() if rank}
    largest = max(ranks.values(), default=1)
    pattern = rank_pattern(ranks, largest)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": factors.base_model or None,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": sorted(ranks),
    }


def rank_pattern(ranks: Mapping[str, int], default: int) -> dict[str, int]:
    """PEFT's `rank_pattern`: last words of names where they say enough, else whole names.

    PEFT takes the first key that equals a name or a tail of it, so longer keys come first.
    """
    of_tail: dict[str, set[int]] = defaultdict(set)
    for name, rank in ranks.items():
        of_tail[_tail(name)].add(rank)
    found = {}
    for name, rank in ranks.items():
        alone = len(of_tail[_tail(name)]) == 1
        if rank != default or not alone:
            found[_tail(name) if alone else name] = rank
    return dict(sorted(found.items(), key=lambda item: (-len(item[0]), item[0])))


def _tail(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _tensors(name: str, pair: Pair, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    a, b = pair.a_RK, pair.b_NR
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise AdapterError(
            "rank_mismatch", f"A and B of {name} do not belong together",
            seen=f"A {list(a.shape)}, B {list(b.shape)}", limit="A [R, in], B [out, R]",
        )  # fmt: skip
    tensors = {"lora_A": a.detach().to(dtype), "lora_B": b.detach().to(dtype)}
    for part, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(
                "not_finite", f"{part} of {name} is not finite in {dtype}",
                fix="check the weights, or save in float32",
            )  # fmt: skip
    return {f"{PREFIX}{name}.{part}.weight": t.contiguous() for part, t in tensors.items()}
