"""Any known format into the native one: written beside its place, read back, put there whole.

A format that needs more than its folder (base weights, a rank) becomes an ordinary LoRA on the way.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vllm_lora_ext.adapters import RoutedAdapter, RoutedModule, load_adapter
from vllm_lora_ext.adapters.checks import check_adapter, check_overflow
from vllm_lora_ext.adapters.dmoerm import (
    INNER_FOLDER,
    ROUTER_FOLDER,
    is_reward_model,
    read_reward_model,
    said_settings,
)
from vllm_lora_ext.adapters.dmoerm import NAME as DMOERM
from vllm_lora_ext.adapters.folder import CONFIG, SIDECAR, WEIGHTS, AdapterFolder
from vllm_lora_ext.adapters.limits import DTYPES
from vllm_lora_ext.adapters.output import beside, check_place, fill, new_folder
from vllm_lora_ext.adapters.readers.native import fill_native
from vllm_lora_ext.adapters.registry import read_adapter
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.variants import read_variant
from vllm_lora_ext.unpickle import copy_as_safetensors, copy_reward_model

# Says where a converted folder came from, and that it may be replaced by the next conversion.
RECORD = "conversion.json"
STEPS = 4


@dataclass(frozen=True)
class Beside:
    """What stands beside a folder; `Reader.needs` says which formats ask for what.

    Args:
        base: folder of the base model.
        rank: of the approximation of deltas with full rank, or to cut others to.
        init: folder of the adapter that training began with.
        index: LoRAM's index files; pruned: checkpoint of the pruned model.
    """

    base: Path | None = None
    rank: int | None = None
    init: Path | None = None
    index: Path | None = None
    pruned: Path | None = None

    def said(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Conversion:
    """What was written.

    Args:
        source: the folder that was read; digest: sha256 over what was read there, empty where an
            ordinary LoRA was made of it.
        out_digest: sha256 of the native adapter.
        layers, blocks, tensors: how many were written.
        rounding: largest |written - read| of A and B; 0 in float32.
        beside: what was given beside the folder.
        errors: layer → |written - meant| / |meant| of its delta; empty where all are exact.
        notes: what a user should know about this conversion, a sentence each.
    """

    source: str
    out: str
    system: str
    base_model: str
    dtype: str
    settings: dict[str, Any]
    pickles: list[str]
    layers: int
    blocks: int
    tensors: int
    rank: int
    rounding: float
    digest: str
    out_digest: str
    beside: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    allow_pickle: bool = False,
    force: bool = False,
    step: Callable[[str], None] = lambda text: None,
    given: Beside | None = None,
) -> Conversion:
    """Read an adapter of any known format and write it in the native one.

    With something beside the folder an ordinary LoRA is made of it first (`read_variant`). An
    adapter that is made for each request (RecLoRA, WavLLM) keeps its own format: what is written
    are the tensors that its reader reads, and the settings.

    Args:
        out: a new folder, an empty one, or an earlier conversion, which is replaced.
        settings: what the files leave out.
        dtype: of A and B; float32 keeps every bit.
        allow_pickle: read `.bin`, `.pt` and `.pth` weights with `torch.load(weights_only=True)`.
        force: put whatever else `out` holds aside, as `out.old`.
        step: told what begins, `STEPS` times.
        given: what the format needs beside its folder.
    Raises:
        AdapterError: what reading the adapter raises; `output_exists`, `output_failed`,
            `overflow` (a value that dtype cannot hold); `unsupported_feature`, another dtype than
            float32 for one that keeps its format. `out` is then as it was.
    """
    place = check_output(out, [source], force)
    if given is not None and given.said():
        return _convert_to_lora(source, place, settings, dtype, allow_pickle, force, step, given)
    if is_reward_model(source):
        return _convert_reward_model(source, place, settings, dtype, allow_pickle, force, step)
    step("reading")
    folder, pickles = Path(source), []
    with beside(place) if allow_pickle else nullcontext(folder) as scratch:
        if allow_pickle:
            folder = scratch / "safetensors"
            pickles = copy_as_safetensors(source, folder)
        opened = AdapterFolder(folder, settings=settings)
        adapter = read_adapter(opened)
        template = None if adapter.template is None else Stored.of(opened)
    if template is not None:
        copied = template_copy(adapter, template, place, dtype, force, step)
    else:
        copied = native_copy(adapter, place, dtype, force, step)
    with copied as (native, copy):
        before, after = tensors_of(adapter), tensors_of(copy)
        made = Conversion(
            source=os.fspath(source), out=os.fspath(out), system=adapter.system,
            base_model=adapter.base_model, dtype=dtype, settings=dict(settings or {}),
            pickles=pickles, layers=len(_layers(adapter)), blocks=len(adapter.blocks),
            tensors=len(template.tensors) if template else len(after), rank=adapter.rank,
            rounding=_rounding(before, after), digest=adapter.digest, out_digest=copy.digest,
        )  # fmt: skip
        write_record(native, made.as_dict())
    return made


@contextmanager
def native_copy(
    adapter: RoutedAdapter, place: Path, dtype: str, force: bool, step: Callable[[str], None]
) -> Iterator[tuple[Path, RoutedAdapter]]:
    """The adapter written in the native format and read back, put in place afterwards.

    Args: as `convert`; `place` of `check_output`.
    Yields:
        The folder, for `write_record`, and what was read back from it.
    Raises:
        AdapterError: `output_exists`, `output_failed`, `overflow`. `place` is then as it was.
    """
    check_overflow(adapter, DTYPES[dtype])
    with new_folder(place, _is_ours, aside=force) as native:
        step("writing")
        fill_native(native, adapter, DTYPES[dtype])
        step("reading back")
        copy = load_adapter(native)
        if wrong := differing(adapter, copy, DTYPES[dtype]):
            raise _written_otherwise(wrong)
        yield native, copy
        step("putting it in place")


@dataclass(frozen=True)
class Stored:
    """What a folder holds of an adapter that keeps its format."""

    tensors: dict[str, torch.Tensor]
    settings: dict[str, Any]

    @classmethod
    def of(cls, folder: AdapterFolder) -> Stored:
        """Of a folder that was read: the tensors that its reader has used."""
        return cls({name: folder.take(name) for name in folder.read_tensors()}, folder.settings())


@contextmanager
def template_copy(
    adapter: RoutedAdapter, stored: Stored, place: Path, dtype: str, force: bool,
    step: Callable[[str], None],
) -> Iterator[tuple[Path, RoutedAdapter]]:  # fmt: skip
    """The adapter in its own format, its settings in `routing.json`; otherwise as `native_copy`."""
    if dtype != "float32":
        raise AdapterError(
            "unsupported_feature", f"adapters of {adapter.system} are made for each request, from"
            " weights that stay as they are", seen=dtype, limit="float32",
            fix="leave --dtype away: what is served has the server's dtype",
        )  # fmt: skip
    with new_folder(place, _is_ours, aside=force) as folder:
        step("writing")
        fill(folder, stored.tensors, {SIDECAR: json.dumps(stored.settings, indent=2) + "\n"})
        step("reading back")
        opened = AdapterFolder(folder)
        copy = read_adapter(opened)
        again = Stored.of(opened)
        wrong = sorted(set(again.tensors) ^ set(stored.tensors)) or [
            name for name, tensor in stored.tensors.items()
            if not torch.equal(tensor, again.tensors[name])
        ]  # fmt: skip
        if wrong or again.settings != stored.settings:
            raise _written_otherwise(wrong or ["settings"])
        yield folder, copy
        step("putting it in place")


def _convert_to_lora(
    source: str | os.PathLike[str], place: Path, settings: Mapping[str, Any] | None, dtype: str,
    allow_pickle: bool, force: bool, step: Callable[[str], None], given: Beside,
) -> Conversion:  # fmt: skip
    """An ordinary LoRA of a folder and what stands beside it."""
    step("reading")
    made = read_variant(source, settings=settings, allow_pickle=allow_pickle, **given.said())
    pairs = {name: pair for name, pair in made.factors.modules.items() if pair.rank}
    modules = {name: RoutedModule(a_RK=pair.a_RK, b_NR=pair.b_NR) for name, pair in pairs.items()}
    adapter = RoutedAdapter(modules, system=made.system, base_model=made.factors.base_model)
    check_adapter(adapter)
    with native_copy(adapter, place, dtype, force, step) as (native, copy):
        before, after = tensors_of(adapter), tensors_of(copy)
        done = Conversion(
            source=os.fspath(source), out=os.fspath(place), system=made.system,
            base_model=adapter.base_model, dtype=dtype, settings=dict(settings or {}), pickles=[],
            layers=len(adapter.modules), blocks=0, tensors=len(after), rank=adapter.rank,
            rounding=_rounding(before, after), digest="", out_digest=copy.digest,
            beside={name: str(value) for name, value in given.said().items()},
            errors=made.error or {}, notes=made.notes,
        )  # fmt: skip
        write_record(native, done.as_dict())
    return done


def _convert_reward_model(
    source: str | os.PathLike[str], place: Path, settings: Mapping[str, Any] | None, dtype: str,
    allow_pickle: bool, force: bool, step: Callable[[str], None],
) -> Conversion:  # fmt: skip
    """Its files as they are, each a safetensors file, and the settings in `routing.json`."""
    if dtype != "float32":
        raise AdapterError(
            "unsupported_feature", "a reward model keeps its format and its dtypes", seen=dtype,
            limit="float32", fix="leave --dtype away: what is served has the engine's dtype",
        )  # fmt: skip
    step("reading")
    with new_folder(place, _is_ours, aside=force) as folder:
        step("writing")
        said = said_settings(source, settings or {})
        pickles = copy_reward_model(source, folder, allow_pickle)
        (folder / SIDECAR).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
        step("reading back")
        made, tensors = read_reward_model(folder), 0
        for file in folder.rglob("*.safetensors"):
            with safe_open(file, "pt") as written:
                tensors += len(written.keys())
        layers = sum(
            len(expert.tensors) // 2 for c in made.categories.values() for expert in c.experts
        )
        done = Conversion(
            source=os.fspath(source), out=os.fspath(place), system=DMOERM, base_model="",
            dtype=dtype, settings=dict(settings or {}), pickles=pickles, layers=layers, blocks=0,
            tensors=tensors, rank=made.rank, rounding=0.0, digest=made.digest,
            out_digest=made.digest,
        )  # fmt: skip
        write_record(folder, done.as_dict())
        step("putting it in place")
    return done


def _written_otherwise(wrong: list[str]) -> AdapterError:
    return AdapterError(
        "output_failed", "the adapter, read back, is not what was written", seen=wrong[:4],
        fix="check the disk, and report it if it stays",
    )  # fmt: skip


def write_record(native: Path, record: Mapping[str, Any]) -> None:
    """What the folder was made of; by it the next conversion knows that it may be replaced."""
    whole = {**record, "vllm_lora_ext": version("vllm-lora-ext")}
    (native / RECORD).write_text(json.dumps(whole, indent=2, default=str) + "\n", encoding="utf-8")


def check_output(
    out: str | os.PathLike[str], sources: Sequence[str | os.PathLike[str]], force: bool
) -> Path:
    """Where a native adapter is to go, links followed.

    Raises:
        AdapterError: `output_exists`, it is one of the sources or holds what must stay.
    """
    place = Path(os.path.realpath(out))
    for source in (Path(os.path.realpath(source)) for source in sources):
        if source == place or source in place.parents or place in source.parents:
            raise AdapterError(
                "output_exists", "the adapter cannot be written into its own folder",
                seen=str(place), fix="name a folder beside it",
            )  # fmt: skip
    check_place(place, _is_ours, aside=force)
    return place


def differing(
    one: RoutedAdapter, other: RoutedAdapter, dtype: torch.dtype = torch.float32
) -> list[str]:
    """Names of layers and tensors that are not the same in both, bit for bit.

    Args:
        dtype: to which A and B of `one` are rounded before.
    """
    mine, theirs = tensors_of(one), tensors_of(other)
    for name in mine:
        if name.endswith((".a_RK", ".b_NR")):
            mine[name] = mine[name].to(dtype).float()
    found = set(mine) ^ set(theirs)
    found |= {n for n in set(mine) & set(theirs) if not torch.equal(mine[n], theirs[n])}
    for name in set(_gates(one)) | set(_gates(other)):
        if _gates(one).get(name) != _gates(other).get(name):
            found.add(f"{name}.gate")
    return sorted(found)


def tensors_of(adapter: RoutedAdapter) -> dict[str, torch.Tensor]:
    """Every tensor of an adapter by a name of its own."""
    found: dict[str, torch.Tensor] = {}
    for name, module in adapter.modules.items():
        found |= {
            f"{name}.{field}": value
            for field, value in vars(module).items() if isinstance(value, torch.Tensor)
        }  # fmt: skip
        if module.norm is not None:
            found |= {
                f"{name}.norm.{field}": torch.as_tensor(value)
                for field, value in vars(module.norm).items() if value is not None
            }  # fmt: skip
    for name, block in adapter.blocks.items():
        found[f"{name}.router_GK"] = block.router_GK
        for part, low_rank in block.parts.items():
            found |= {f"{name}.{part}.{f}": value for f, value in vars(low_rank).items()}
    return found


def _rounding(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> float:
    return max(((before[name] - after[name]).abs().max().item() for name in after), default=0.0)


def _layers(adapter: RoutedAdapter) -> Collection[str]:
    return adapter.modules if adapter.template is None else adapter.template.sizes


def _gates(adapter: RoutedAdapter) -> dict[str, tuple[object, ...]]:
    gates: dict[str, tuple[object, ...]] = {
        name: (m.gate, m.kind, m.head_bias) for name, m in adapter.modules.items()
    }
    return gates | {name: (b.gate, b.act) for name, b in adapter.blocks.items()}


def _is_ours(place: Path) -> bool:
    """Empty, or an earlier conversion to which nobody added a file."""
    names = set(os.listdir(place))
    files = {CONFIG, SIDECAR, WEIGHTS[0], RECORD, ROUTER_FOLDER, INNER_FOLDER}
    return not names or (RECORD in names and names <= files)
