"""The table of formats, and the one way from a folder to a checked RoutedAdapter."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any, Literal

from vllm_lora_ext.adapters.checks import check_adapter
from vllm_lora_ext.adapters.dmoerm import is_reward_model
from vllm_lora_ext.adapters.folder import CONFIG, AdapterFolder, Limits, Roots
from vllm_lora_ext.adapters.model import RoutedAdapter
from vllm_lora_ext.adapters.outside import with_packages
from vllm_lora_ext.adapters.parts import refuse_parts
from vllm_lora_ext.adapters.paths import shown
from vllm_lora_ext.adapters.readers import (
    adalora,
    adamole,
    alora,
    arrow,
    delora,
    dora,
    flylora,
    gralora,
    hydralora,
    lily,
    loha,
    lokr,
    lora_mixer,
    loramoe,
    meteora,
    miss,
    mixlora,
    mmlora,
    moe_peft,
    moelora,
    mola,
    moram,
    native,
    nola,
    offline,
    plain,
    poly,
    reclora,
    smora,
    unilora,
    vblora,
    vera,
    wavllm,
    xlora,
)
from vllm_lora_ext.adapters.readers.base import Reader
from vllm_lora_ext.errors import AdapterError

__all__ = [
    "ENTRY_POINTS", "FORMATS", "Reader", "find_reader", "format_of", "formats", "load_adapter",
    "not_served",
]  # fmt: skip

# Packages may bring readers of their own: an entry point of this group names a `Reader`.
ENTRY_POINTS = "vllm_lora_ext.readers"

FORMATS: tuple[Reader, ...] = (
    plain.READER,
    dora.READER,
    alora.READER,
    loramoe.READER,
    meteora.READER,
    smora.READER,
    flylora.READER,
    moram.READER,
    mola.READER,
    hydralora.READER,
    adamole.ADAMOLE,
    adamole.MOLE,
    moe_peft.LORAMOE,
    moe_peft.MOLA,
    mixlora.READER,
    lora_mixer.READER,
    moelora.READER,
    poly.READER,
    arrow.READER,
    mmlora.READER,
    reclora.READER,
    wavllm.READER,
    xlora.READER,
    lily.READER,
    native.READER,
    adalora.READER,
    delora.READER,
    gralora.READER,
    loha.READER,
    lokr.READER,
    miss.READER,
    nola.READER,
    unilora.READER,
    vblora.READER,
    vera.READER,
    *offline.CONVERTED,
    *offline.REFUSED,
)
# Formats that are known and not read yet: better to be named than to be "unknown".
_KNOWN_MARKS = {
    "internal_xlora_classifier": "X-LoRA", "old_lora_A": "MoRAM for CLIP (X-TAIL)",
}  # fmt: skip


@cache
def formats() -> tuple[Reader, ...]:
    """Every format: the table's, then those of installed packages, by name.

    Raises:
        AdapterError: `bad_reader`, an entry point cannot be loaded or is no Reader.
    """
    return with_packages(FORMATS, Reader, ENTRY_POINTS, _bad_reader)


def _bad_reader(what: str, why: str) -> AdapterError:
    return AdapterError(
        "bad_reader", f"an installed package brings a reader that cannot be used: {why}",
        seen=what, limit=f"a Reader under the entry point group {ENTRY_POINTS}",
        fix="mend or uninstall that package",
    )  # fmt: skip


def load_adapter(
    path: str | os.PathLike[str],
    limits: Limits | None = None,
    settings: Mapping[str, Any] | None = None,
    *,
    roots: Roots | None = None,
    pickle: Literal["weights_only"] | None = None,
    accept_config_keys: Collection[str] = (),
    head_size: int | None = None,
    parts: bool = False,
) -> RoutedAdapter:
    """Read and check the adapter in a folder.

    Args:
        path: the folder. Its files are never executed.
        limits: sizes that are still taken for an adapter.
        settings: what the files leave out, as the sidecar `routing.json` would say it.
        roots: folders that links out of the adapter's folder may lead into; None: anywhere.
        pickle: `weights_only` also reads `adapter_model.bin`, where there is no safetensors file.
        accept_config_keys: keys of the config that no format knows and that are ignored.
        head_size: rows per attention head of the model that is to serve it, where one is.
        parts: whether the caller knows heads and fused experts, which most tools would drop.
    Returns:
        The adapter, with fp32 tensors in memory of their own, all finite, no tensor left over.
    Raises:
        AdapterError: the folder cannot be served; docs/errors.md lists the codes. Nothing else.
    """
    folder = AdapterFolder(
        path, limits, settings,
        roots=roots, allow_pickle=pickle is not None, accepted=accept_config_keys,
        head_size=head_size,
    )  # fmt: skip
    with closing(folder):  # whoever keeps an error keeps no file open
        return read_adapter(folder, parts=parts)


def read_adapter(folder: AdapterFolder, *, parts: bool = False) -> RoutedAdapter:
    """As `load_adapter`, of a folder that is open already, and not read."""
    with folder.unchanged():
        return _read(folder, parts)


def _read(folder: AdapterFolder, parts: bool) -> RoutedAdapter:
    reader = find_reader(folder)
    if reader.read is None:
        raise not_served(reader, folder.path)
    adapter = reader.read(folder)
    digest = folder.finish()
    adapter = dataclasses.replace(adapter, source=os.fspath(folder.path), digest=digest)
    check_adapter(adapter)
    if not parts:
        refuse_parts(adapter)
    return adapter


def needs_two_passes(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an adapter whose steps run the model twice; False where it cannot be
    told, which loading it then tells."""
    try:
        with closing(AdapterFolder(path)) as folder:
            return find_reader(folder).two_pass
    except AdapterError:
        return False


def format_of(name: str) -> Reader:
    """The row of this name."""
    return next(reader for reader in formats() if reader.name == name)


def find_reader(folder: AdapterFolder) -> Reader:
    """The one reader whose format the folder has.

    Raises:
        AdapterError: `unknown_peft_type`, `unknown_format`, `ambiguous_format`;
            `unsupported_feature`, it is a reward model of many adapters.
    """
    if folder.no_weights is not None and is_reward_model(folder.path):
        raise AdapterError(
            "unsupported_feature", "the folder is a reward model (DMoERM), not one adapter",
            seen=os.fspath(folder.path), limit="adapters",
            fix="score texts with `vllm-lora-ext reward`, or name it in the setting reward",
        )  # fmt: skip
    claims = [reader for reader in formats() if reader.detect(folder)]
    least = min((reader.general for reader in claims), default=0)
    found = [reader for reader in claims if reader.general == least]
    if len(found) == 1:
        return found[0]
    if folder.no_weights is not None:
        raise folder.no_weights
    if found:
        raise AdapterError(
            "ambiguous_format", "the folder fits several formats",
            seen=[reader.name for reader in found], limit="one",
            fix="keep the files of one adapter only",
        )  # fmt: skip
    raise _unknown(folder)


def _unknown(folder: AdapterFolder) -> AdapterError:
    peft_type = folder.config.get("peft_type")
    near = [r for r in formats() if r.read is not None and peft_type in r.peft_types]
    if folder.has_config and not near:
        served = [r for r in formats() if r.read is not None]
        return AdapterError(
            "unknown_peft_type", f"peft_type in {CONFIG} is none that can be served",
            seen=peft_type, limit=sorted({name for r in served for name in r.peft_types}),
            fix="save it in a known format",
        )  # fmt: skip
    if not folder.has_config:
        near = [r for r in formats() if r.read is not None and not r.peft_types]
    return AdapterError(
        "unknown_format", f"the tensors{_looks_like(folder)} are of no format that can be served",
        seen=sorted(folder.names)[:3] or "no tensors",
        limit=[r.name for r in near],
        fix="; ".join(f"a {r.title} folder has {r.files}" for r in near)
        + ("" if folder.has_config else f"; here {CONFIG} is missing"),
    )  # fmt: skip


def not_served(reader: Reader, path: Path) -> AdapterError:
    """The one refusal of what is known, and not served as it is."""
    if reader.refused:
        return AdapterError(
            "unsupported_feature", f"{reader.title} cannot be served: {reader.refused}",
            seen=reader.files, fix="merge it into the base model with the tool that made it",
        )  # fmt: skip
    given = "".join(f" --{need} {need.upper()}" for need in reader.needs)
    asked = set(reader.settings) - ({"sizes"} if "base" in reader.needs else set())
    given += "".join(f" --set {key}=VALUE" for key in sorted(asked))
    return AdapterError(
        "unsupported_feature", f"{reader.title} is not served as it is", seen=reader.files,
        limit="formats that need nothing beside their folder", fix="make an ordinary LoRA of it:"
        f" vllm-lora-ext convert {shown(path)} OUT{given}",
    )  # fmt: skip


def _looks_like(folder: AdapterFolder) -> str:
    for mark, system in _KNOWN_MARKS.items():
        if any(mark in name for name in folder.names):
            return f", which look like {system}'s,"
    return ""
