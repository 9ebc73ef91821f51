"""The one way from any artefact to low-rank factors."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

from vllm_lora_ext.adapters.checks import check_adapter
from vllm_lora_ext.adapters.readers import plain
from vllm_lora_ext.adapters.registry import Reader, find_reader, format_of, not_served
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.factors import Factors, Pair, fold, load_factors
from vllm_lora_ext.merging.variants.conversion import Conversion, Converted, Path
from vllm_lora_ext.merging.variants.files import Artefact, Checkpoint, as_folder
from vllm_lora_ext.merging.variants.lowrank import cut
from vllm_lora_ext.merging.variants.table import CONVERTERS

_EXACT = 1e-6  # below this a relative error is fp32's own


def read_variant(
    folder: Path,
    *,
    base: Path | None = None,
    init: Path | None = None,
    index: Path | None = None,
    pruned: Path | None = None,
    rank: int | None = None,
    settings: Mapping[str, Any] | None = None,
    multipliers: bool = False,
    allow_pickle: bool = False,
) -> Converted:
    """Turn an artefact of any known format into low-rank factors.

    Args:
        folder: an adapter folder, or a single safetensors file.
        base: checkpoint of the base model, where the format's row needs it or a setting `sizes`.
        init: folder of the adapter that training began with (PiSSA and its kin).
        index: LoRAM's index files; makes an ordinary folder one of a pruned model.
        pruned: checkpoint of the pruned model (LLM-Pruner).
        rank: approximate full-rank deltas with this rank, and cut exact ones that are above it.
        settings: what the files leave out, as in the sidecar `routing.json`.
        multipliers: the caller applies `out_scale` and `in_scale`; without it such formats are
            approximated.
        allow_pickle: also read `.bin` and `.pt` files, by torch's weights-only reader. Offline
            tools only.
    Returns:
        The factors, whether they are exact, and the error per layer where they are not.
    Raises:
        AdapterError: `unsupported_feature` for what is refused, with the reason; `missing_setting`
            for what must be given; those of `load_adapter` and `Checkpoint`.
    """
    if rank is not None and rank < 1:
        raise AdapterError("bad_value", "rank is out of range", seen=rank, limit="1 or more")
    given = dict(settings or {})
    weights = None if base is None else Checkpoint(base, allow_pickle)
    with as_folder(folder, allow_pickle) as where:
        reader = _format(Artefact(where), init is not None, index is not None, pruned is not None)
        converter = CONVERTERS.get(reader.name)
        if reader.read is None and converter is None:
            raise not_served(reader, FilePath(folder))
        if reader is plain.READER:
            return _cut(_plain(where, given, folder), rank)
        if "sizes" in reader.settings and weights is not None and "sizes" not in given:
            given["sizes"] = weights.sizes()
        if converter is None:
            factors = _read(reader, Artefact(where, settings=given))
            _check_sizes(factors, weights)
            return _cut(Converted(_named(factors, folder), reader.name), rank)
        conversion = Conversion(
            Artefact(where, settings=given), weights, init, index,
            None if pruned is None else Checkpoint(pruned, allow_pickle), rank, multipliers,
            allow_pickle,
        )  # fmt: skip
        factors = converter(conversion)
        conversion.folder.finish()
    _check_sizes(factors, weights)
    return _cut(_finish(conversion, factors, reader, folder), rank)


def _format(artefact: Artefact, begun: bool, indexed: bool, pruned: bool) -> Reader:
    """The row of the table that fits, and where only what is given tells it apart, that one."""
    if indexed or pruned:
        return format_of("loram" if indexed else "llm_pruner")
    found = find_reader(artefact)
    return format_of("rebase") if begun and "init" not in found.needs else found


def _read(reader: Reader, artefact: Artefact) -> Factors:
    """By the reader that also serves this format, but on files that may hold whole numbers."""
    assert reader.read is not None, "asked before"
    adapter = reader.read(artefact)
    artefact.finish()
    check_adapter(adapter)
    return fold(adapter, {})


def _plain(where: FilePath, settings: Mapping[str, Any], source: Path) -> Converted:
    if settings:
        raise AdapterError(
            "unknown_key", "an ordinary LoRA takes no settings", seen=sorted(settings)[0],
            fix="leave them out",
        )  # fmt: skip
    return Converted(_named(load_factors(where), source), "plain")


def _finish(conversion: Conversion, factors: Factors, reader: Reader, folder: Path) -> Converted:
    for name, pair in factors.modules.items():
        for what, tensor in (("A", pair.a_RK), ("B", pair.b_NR)):
            if not bool(tensor.isfinite().all()):
                raise AdapterError(
                    "not_finite", f"{what} of {name} is not finite after the conversion",
                    fix="check the artefact and the base weights",
                )  # fmt: skip
    if not factors.modules:
        raise AdapterError(
            "empty_adapter", "the artefact adapts no layer at all", fix="save it again"
        )
    errors = {name: conversion.errors.get(name, 0.0) for name in factors.modules}
    exact = max(errors.values()) < _EXACT
    return Converted(
        _named(factors, folder), reader.name, None if exact else errors, tuple(conversion.notes),
        conversion.out_scale or None, conversion.in_scale or None,
    )  # fmt: skip


def _check_sizes(factors: Factors, base: Checkpoint | None) -> None:
    """Against the base model, where one was given and names its layers alike."""
    sizes = {} if base is None else base.sizes()
    for name, pair in factors.modules.items():
        seen = [pair.a_RK.shape[1], pair.b_NR.shape[0]]
        if name in sizes and sizes[name] != seen:
            raise AdapterError(
                "shape_mismatch", f"{name} has other sizes in the base model", seen=seen,
                limit=sizes[name], fix="give the base model that it was trained on",
            )  # fmt: skip


def _cut(converted: Converted, rank: int | None) -> Converted:
    """Layers above the asked rank, cut to the best of that rank; errors add as squares."""
    factors = converted.factors
    if rank is None or factors.rank <= rank:
        return converted
    high = [name for name, pair in factors.modules.items() if pair.rank > rank]
    modules: dict[str, Pair] = dict(factors.modules)
    errors = dict(converted.error or dict.fromkeys(modules, 0.0))
    for name in high:
        modules[name], lost = cut(modules[name], rank)
        errors[name] = (errors[name] ** 2 + lost**2) ** 0.5
    exact = max(errors.values()) < _EXACT
    return dataclasses.replace(
        converted, factors=dataclasses.replace(factors, modules=modules),
        error=None if exact else errors,
    )  # fmt: skip


def _named(factors: Factors, folder: Path) -> Factors:
    return dataclasses.replace(factors, source=os.fspath(folder))
