"""Adapters of a pruned model on the whole one: LoRAM's recovery and LLM-Pruner's.

A layer of the pruned model has some rows and columns of the whole one. The adapter's B rows and A
columns go back to their places, and the places that were pruned get zero.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_lora_ext.adapters.readers import plain
from vllm_lora_ext.adapters.readers.peft_config import bad_value, whole_number
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.factors import Factors, Pair, fold
from vllm_lora_ext.merging.variants.conversion import Conversion
from vllm_lora_ext.merging.variants.files import Checkpoint

_LAYER = re.compile(r"(?P<block>.+\.\d+\.(?P<kind>mlp|self_attn))\.(?P<linear>\w+)")
_ON_OUTPUT = {"mlp": ("gate_proj", "up_proj"), "self_attn": ("q_proj", "k_proj", "v_proj")}
_ON_INPUT = {"mlp": "down_proj", "self_attn": "o_proj"}
_PARTS = ("mlp", "attn")  # as LoRAM's `recovered` names them
_GEOMETRY = ("head_dim", "num_heads", "num_key_value_heads")
_SETTINGS = ("lora_recover_type", "recovered", "index", "full_shapes", *_GEOMETRY)


@dataclass(frozen=True)
class Places:
    """Where the rows and columns of a pruned layer stand in the whole one; None: all are there."""

    out_size: int | None = None
    out_kept: torch.Tensor | None = None
    in_size: int | None = None
    in_kept: torch.Tensor | None = None


def scatter(pair: Pair, places: Places, module: str) -> Pair:
    """The pair on the whole layer. Raises AdapterError `shape_mismatch`."""
    a, b = pair
    if places.in_kept is not None and places.in_size is not None:
        _check(module, "columns of A", a.shape[1], len(places.in_kept))
        a = torch.zeros(a.shape[0], places.in_size).index_copy_(1, places.in_kept, pair.a_RK)
    if places.out_kept is not None and places.out_size is not None:
        _check(module, "rows of B", b.shape[0], len(places.out_kept))
        b = torch.zeros(places.out_size, b.shape[1]).index_copy_(0, places.out_kept, pair.b_NR)
    return Pair(a, b)


def loram(conversion: Conversion) -> Factors:
    """LoRAM (arXiv 2502.13533), mode zeroA, with its `pruned_idx` files.

    Settings: `head_dim`, `num_heads`, `num_key_value_heads` where attention was pruned. `normA`
    fills what was pruned with noise, and is refused.
    """
    kind = conversion.setting("lora_recover_type", "zeroA")
    if kind != "zeroA":
        raise AdapterError(
            "unsupported_feature", "lora_recover_type fills the pruned columns of A with noise,"
            " which is a random delta in o_proj and down_proj", seen=kind, limit="zeroA",
            fix="recover with zeroA",
        )  # fmt: skip
    wanted = conversion.setting("recovered", None)
    if not isinstance(wanted, list | None) or any(part not in _PARTS for part in wanted or ()):
        raise bad_value("recovered", wanted, f"a list of {' and '.join(_PARTS)}")
    conversion.forget(_SETTINGS)
    factors = _plain(conversion)
    index = pruned_index(conversion)
    modules = {}
    for name, pair in factors.modules.items():
        match = _LAYER.fullmatch(name)
        gone = index.get(match["block"]) if match else None
        if match and gone is not None and (wanted is None or _short(match["kind"]) in wanted):
            places = _places(conversion, match["kind"], match["linear"], gone, pair)
            pair = scatter(pair, places, name)
        modules[name] = pair
    return dataclasses.replace(factors, modules=modules)


def _short(kind: str) -> str:
    return "attn" if kind == "self_attn" else kind


def _places(
    conversion: Conversion, kind: str, linear: str, gone: torch.Tensor, pair: Pair
) -> Places:
    on_input = _ON_INPUT[kind] == linear
    if not on_input and linear not in _ON_OUTPUT[kind]:
        return Places()
    if kind == "self_attn" and linear in ("q_proj", "o_proj"):
        gone = query_channels(
            gone,
            *(_geometry(conversion, key) for key in _GEOMETRY),
        )
    here = pair.a_RK.shape[1] if on_input else pair.b_NR.shape[0]
    size = here + len(gone)
    if len(gone) and not 0 <= int(gone.min()) <= int(gone.max()) < size:
        raise bad_value(f"pruned_idx for {linear}", [int(gone.min()), int(gone.max())], f"0 to"
                        f" {size - 1}")  # fmt: skip
    mask = torch.ones(size, dtype=torch.bool)
    mask[gone] = False
    kept = mask.nonzero().flatten()
    return Places(in_size=size, in_kept=kept) if on_input else Places(size, kept)


def query_channels(gone: torch.Tensor, head_dim: int, heads: int, kv_heads: int) -> torch.Tensor:
    """Channels of the query heads that go with pruned channels of key/value heads."""
    found = gone.sort().values
    heads_whole = len(found) % head_dim == 0 and torch.equal(
        found.view(-1, head_dim) % head_dim,
        torch.arange(head_dim).repeat(len(found) // head_dim, 1),
    )
    if not heads_whole:
        raise bad_value("pruned_idx of k_proj", len(found), f"whole heads of {head_dim} channels")
    group = heads // kv_heads * head_dim
    starts = found[::head_dim] // head_dim * group
    return (starts[:, None] + torch.arange(group)).flatten()


def _geometry(conversion: Conversion, key: str) -> int:
    meaning = "the whole model's, from its config.json"
    return whole_number(conversion.folder.setting(key, meaning), key, 1, 1 << 16)


def pruned_index(conversion: Conversion) -> dict[str, torch.Tensor]:
    """Block (`model.layers.0.mlp`) → pruned channels, from LoRAM's files or their numbers.

    `.pt` files are LoRAM's own; a safetensors file holds `<block>.pruned_idx`.
    """
    assert conversion.index is not None
    where = Path(conversion.index)
    files = sorted(where.iterdir()) if where.is_dir() else [where]
    tables = [file for file in files if file.suffix == ".safetensors"]
    found: dict[str, torch.Tensor] = {}
    for file in tables or [file for file in files if file.suffix == ".pt"]:
        checkpoint = Checkpoint(file, conversion.allow_pickle)
        for name in checkpoint.names:
            if name.rsplit(".", 1)[-1] == "pruned_idx":
                inside = name.rpartition(".")[0] or file.name.removesuffix(".pt")
                match = _LAYER.fullmatch(inside)
                found[match["block"] if match else inside] = checkpoint.take(name).long().flatten()
    if not found:
        raise AdapterError(
            "missing_tensor", "there is no 'pruned_idx' in the index files", seen=str(where),
            fix="give the folder that LoRAM wrote its index files to",
        )  # fmt: skip
    return found


def llm_pruner(conversion: Conversion) -> Factors:
    """LLM-Pruner (arXiv 2305.11627): the places are found by matching the pruned weights' rows.

    Needs the pruned model as safetensors beside the base: no index was ever saved. Where the
    hidden size was pruned too, its places come from the embedding's columns.
    """
    if conversion.pruned is None or conversion.base is None:
        raise AdapterError(
            "missing_setting", "an adapter of a pruned model cannot be placed on the whole one"
            " without an index, or both models' weights", fix="give base and pruned checkpoints",
        )  # fmt: skip
    factors = _plain(conversion)
    finder = _Finder(conversion.pruned, conversion.base)
    modules = {
        name: scatter(pair, finder.places(name), name) for name, pair in factors.modules.items()
    }
    conversion.notes.append(
        "an adapter trained to repair a pruned model has no such purpose on the whole one"
    )
    return dataclasses.replace(factors, modules=modules)


class _Finder:
    def __init__(self, pruned: Checkpoint, whole: Checkpoint) -> None:
        self._pruned, self._whole = pruned, whole
        self._hidden: torch.Tensor | None = None

    def places(self, module: str) -> Places:
        small, large = self._pruned.weight(module), self._whole.weight(module)
        (rows, columns), (all_rows, all_columns) = small.shape, large.shape
        inward = module.endswith(tuple(_ON_INPUT.values()))  # writes to the hidden state
        out_kept = in_kept = None
        if rows != all_rows and columns != all_columns:
            if inward:
                out_kept = self._hidden_kept()
                in_kept = match_lines(small.T, large[out_kept].T, module)
            else:
                in_kept = self._hidden_kept()
                out_kept = match_lines(small, large[:, in_kept], module)
        elif rows != all_rows:
            out_kept = match_lines(small, large, module)
        elif columns != all_columns:
            in_kept = match_lines(small.T, large.T, module)
        return Places(all_rows, out_kept, all_columns, in_kept)

    def _hidden_kept(self) -> torch.Tensor:
        if self._hidden is None:
            name = "model.embed_tokens"
            self._hidden = match_lines(
                self._pruned.weight(name).T, self._whole.weight(name).T, name
            )
        return self._hidden


def match_lines(some: torch.Tensor, every: torch.Tensor, module: str) -> torch.Tensor:
    """Which rows of `every` the rows of `some` are, by exact equality.

    Raises:
        AdapterError: `shape_mismatch`, a row is not there, or is there twice.
    """
    where: dict[bytes, int] = {}
    twice: set[bytes] = set()
    for i, key in enumerate(_keys(every)):
        if key in where:
            twice.add(key)
        where[key] = i
    keys = list(_keys(some))
    lost = [i for i, key in enumerate(keys) if key not in where or key in twice]
    if lost:
        raise AdapterError(
            "shape_mismatch", f"rows of the pruned {module} are not found once in the base model",
            seen=f"{len(lost)} of {len(keys)}", limit="every row, exactly and once",
            fix="give the index of kept channels, or the weights from before any tuning",
        )  # fmt: skip
    return torch.tensor([where[key] for key in keys])


def _keys(rows: torch.Tensor) -> Iterable[bytes]:
    for row in rows.contiguous().numpy():
        yield hashlib.blake2b(row.tobytes(), digest_size=16).digest()


def _plain(conversion: Conversion) -> Factors:
    return fold(plain.read(conversion.folder), conversion.folder.config)


def _check(module: str, what: str, seen: int, wanted: int) -> None:
    if seen != wanted:
        raise AdapterError(
            "shape_mismatch", f"the index keeps another number of {what} of {module}",
            seen=seen, limit=wanted, fix="give the index of this very adapter",
        )  # fmt: skip
