"""Any known format into the native one: written beside its place, read back, put there whole."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vllm_lora_ext.adapters import RoutedAdapter, load_adapter, write_native
from vllm_lora_ext.adapters.folder import CONFIG, WEIGHTS
from vllm_lora_ext.adapters.model import LowRank, RoutedModule
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.unpickle import copy_as_safetensors

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Says where a converted folder came from, and that it may be replaced by the next conversion.
RECORD = "conversion.json"
STEPS = 4


@dataclass(frozen=True)
class Conversion:
    """What was written.

    Args:
        source: the folder that was read; digest: sha256 over what was read there.
        out_digest: sha256 of the native adapter.
        layers, blocks, tensors: how many were written.
        rounding: largest |written - read| of A and B; 0 in float32.
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
) -> Conversion:
    """Read an adapter of any known format and write it in the native one.

    Args:
        out: a new folder, an empty one, or an earlier conversion, which is replaced.
        settings: what the files leave out.
        dtype: of A and B; float32 keeps every bit.
        allow_pickle: read `.bin`, `.pt` and `.pth` weights with `torch.load(weights_only=True)`.
        force: put whatever else `out` holds aside, as `out.old`.
        step: told what begins, `STEPS` times.
    Raises:
        AdapterError: what reading the adapter raises; `output_exists`, `output_failed`,
            `overflow` (a value that dtype cannot hold). `out` is then as it was.
    """
    place = Path(os.path.realpath(out))
    try:
        _check_place(Path(os.path.realpath(source)), place, force)
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{place.name}.", suffix=".part", dir=place.parent
        ) as scratch:
            made = _make(Path(source), Path(scratch), settings or {}, dtype, allow_pickle, step)
            made = Conversion(**{**made.as_dict(), "out": os.fspath(out)})
            record = made.as_dict() | {"vllm_lora_ext": version("vllm-lora-ext")}
            text = json.dumps(record, indent=2, default=str) + "\n"
            (Path(scratch) / "native" / RECORD).write_text(text, encoding="utf-8")
            _put_in_place(Path(scratch), place)
    except OSError as error:
        raise AdapterError(
            "output_failed", f"the native adapter cannot be written: {error}",
            fix="check the folder's permissions and the space left",
        ) from error  # fmt: skip
    return made


def differing(one: RoutedAdapter, other: RoutedAdapter) -> list[str]:
    """Names of layers and tensors that are not the same in both, bit for bit."""
    mine, theirs = tensors_of(one), tensors_of(other)
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
    for name, block in adapter.blocks.items():
        found[f"{name}.router_GK"] = block.router_GK
        for part, low_rank in block.parts.items():
            found |= {f"{name}.{part}.{f}": value for f, value in vars(low_rank).items()}
    return found


def _make(
    source: Path, scratch: Path, settings: Mapping[str, Any], dtype: str, allow_pickle: bool,
    step: Callable[[str], None],
) -> Conversion:  # fmt: skip
    step("reading")
    folder, pickles = source, []
    if allow_pickle:
        folder = scratch / "safetensors"
        pickles = copy_as_safetensors(source, folder)
    adapter = load_adapter(folder, settings=settings)
    _check_range(adapter, dtype)
    step("writing")
    native = write_native(adapter, scratch / "native", DTYPES[dtype])
    # safetensors writes for the owner only; a server may run as somebody else.
    os.chmod(native / WEIGHTS[0], os.stat(native / CONFIG).st_mode)
    step("reading back")
    copy = load_adapter(native)
    _check_copy(adapter, copy, dtype)
    step("putting it in place")
    before, after = tensors_of(adapter), tensors_of(copy)
    return Conversion(
        source=os.fspath(source), out="", system=adapter.system, base_model=adapter.base_model,
        dtype=dtype, settings=dict(settings), pickles=pickles, layers=len(adapter.modules),
        blocks=len(adapter.blocks), tensors=len(after), rank=adapter.rank,
        rounding=max(((before[n] - after[n]).abs().max().item() for n in after), default=0.0),
        digest=adapter.digest, out_digest=copy.digest,
    )  # fmt: skip


def _check_copy(adapter: RoutedAdapter, copy: RoutedAdapter, dtype: str) -> None:
    """What was read back must be what was read, rounded once at most."""
    before, after = tensors_of(adapter), tensors_of(copy)
    same = _gates(adapter) == _gates(copy) and set(before) == set(after)
    for name in before if same else ():
        wanted = before[name]
        if name.endswith((".a_RK", ".b_NR")):
            wanted = wanted.to(DTYPES[dtype]).float()
        same = same and torch.equal(wanted, after[name])
    if not same:
        raise AdapterError(
            "output_failed", "the native adapter, read back, is not what was written",
            fix="check the disk, and report it if it stays",
        )  # fmt: skip


def _gates(adapter: RoutedAdapter) -> dict[str, tuple[object, ...]]:
    gates: dict[str, tuple[object, ...]] = {
        name: (m.gate, m.kind, m.head_bias) for name, m in adapter.modules.items()
    }
    return gates | {name: (b.gate, b.act) for name, b in adapter.blocks.items()}


def _check_range(adapter: RoutedAdapter, dtype: str) -> None:
    limit = torch.finfo(DTYPES[dtype]).max
    layers: dict[str, RoutedModule | LowRank] = dict(adapter.modules)
    for name, block in adapter.blocks.items():
        layers |= {f"{name}.{part}": low_rank for part, low_rank in block.parts.items()}
    for name, layer in layers.items():
        for what, tensor in (("A", layer.a_RK), ("B times its scale", layer.b_NR)):
            if float(tensor.abs().max()) > limit:
                raise AdapterError(
                    "overflow", f"{what} of {name} has values too large for {dtype}",
                    seen=float(tensor.abs().max()), limit=limit, fix="convert it to float32",
                )  # fmt: skip


def _check_place(source: Path, place: Path, force: bool) -> None:
    if source == place or source in place.parents or place in source.parents:
        raise AdapterError(
            "output_exists", "the adapter cannot be converted into its own folder",
            seen=str(place), fix="name a folder beside it",
        )  # fmt: skip
    if not os.path.lexists(place):
        return
    if not place.is_dir():
        raise AdapterError(
            "output_exists", "there is a file where the native adapter should go",
            seen=str(place), fix="name another folder",
        )  # fmt: skip
    if not (_is_ours(place) or force):
        raise AdapterError(
            "output_exists", "the folder for the native adapter holds other things",
            seen=sorted(os.listdir(place))[:4],
            limit="a new or empty folder, or an earlier conversion",
            fix="name another folder, or give --force, which puts this one aside",
        )  # fmt: skip


def _is_ours(place: Path) -> bool:
    """Empty, or an earlier conversion to which nobody added a file."""
    names = set(os.listdir(place))
    return not names or (RECORD in names and names <= {CONFIG, WEIGHTS[0], RECORD})


def _put_in_place(scratch: Path, place: Path) -> None:
    if not place.exists():
        os.rename(scratch / "native", place)
        return
    aside = scratch / "earlier" if _is_ours(place) else _free_name(place)
    os.rename(place, aside)
    try:
        os.rename(scratch / "native", place)
    except OSError:
        os.rename(aside, place)
        raise


def _free_name(place: Path) -> Path:
    number = 1
    while True:
        name = f"{place.name}.old" + (str(number) if number > 1 else "")
        if not os.path.lexists(place.with_name(name)):
            return place.with_name(name)
        number += 1
