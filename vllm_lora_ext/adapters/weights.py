"""The tensors of an adapter: one safetensors file, several with an index, or a pickle.

Other files beside them (a value head, a merged model, the state of an optimiser) are not opened:
PEFT reads none of them, so they cannot change what the adapter computes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from vllm_lora_ext.adapters.files import Limits, read_object, too_large
from vllm_lora_ext.adapters.pickles import PICKLES, load_pickle
from vllm_lora_ext.adapters.tensor_file import SPELLING, TensorFile
from vllm_lora_ext.errors import AdapterError

WEIGHTS = ("adapter_model.safetensors", "model.safetensors")
INDEX = ".index.json"
# As fairseq calls its last checkpoint; only where no config says that PEFT's file is meant.
FAIRSEQ = "final.safetensors"
# Where PEFT and vLLM look when there is no safetensors file.
PICKLED = ("adapter_model.bin", "adapter_model.pt")
# X-LoRA's, in its authors' layout: no other weights stand beside it.
GATES_ELSEWHERE = "xlora_classifier.safetensors"
# As `tensor_file.SPELLING` has them.
FLOATS = ("F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2")
WHOLE = ("I64", "I32", "I16", "I8", "U8")
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.safetensors")

Real = Callable[[str], Path | None]  # a file's name → where it really lies, None: nowhere


class Weights:
    """Tensors by name, read one at a time.

    Attributes:
        shapes, dtypes: of every tensor; dtypes as safetensors spells them.
        missing: the error for a format that needs weights, where there are none.
    """

    def __init__(self, missing: AdapterError | None = None) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.missing = missing
        self._files: dict[str, TensorFile] = {}
        self._loaded: dict[str, torch.Tensor] = {}
        self._open = ExitStack()

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it is stored, in memory of its own. Raises AdapterError `bad_safetensors`."""
        if name in self._loaded:
            return self._loaded[name]
        return self._files[name].read(name)

    def close(self) -> None:
        """Nothing is read any more."""
        self._open.close()

    def add_safetensors(self, path: Path, file: str, limits: Limits) -> None:
        """Open one more file.

        Raises:
            AdapterError: `bad_file`, `bad_safetensors`, `too_large`; `duplicate_tensor`, another
                file has a tensor of that name.
        """
        opened = TensorFile(path, file, limits)
        self._open.callback(opened.close)
        for name in opened.shapes.keys() & self.shapes.keys():
            raise AdapterError(
                "duplicate_tensor", f"two files hold tensor '{name}'",
                seen=[self._files[name].name, file], fix="save the adapter again",
            )  # fmt: skip
        self.shapes |= opened.shapes
        self.dtypes |= opened.dtypes
        self._files |= dict.fromkeys(opened.shapes, opened)
        if len(self.shapes) > limits.tensors:
            raise too_large(f"the number of tensors in {file}", len(self.shapes), limits.tensors)

    def add_pickle(self, path: Path, file: str, limits: Limits) -> None:
        """Load a pickle. Raises AdapterError `pickle_refused`, `too_large`."""
        limit = min(limits.read_bytes, limits.file_bytes)
        self._loaded = load_pickle(path, file, limit, limits.tensors)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._loaded.items()}
        self.dtypes = {
            name: SPELLING.get(tensor.dtype, str(tensor.dtype))
            for name, tensor in self._loaded.items()
        }


def open_weights(
    entries: Sequence[str], real: Real, limits: Limits, *, has_config: bool, allow_pickle: bool
) -> Weights:
    """The weights among the files of a folder.

    Args:
        entries: names of everything in the folder.
        has_config: whether there is an `adapter_config.json`: the adapter is then in the file that
            PEFT writes, whatever else is there.
    Raises:
        AdapterError: `pickle_refused`, `unexpected_file`, `missing_file`, `missing_tensor`,
            `unexpected_tensor`, `duplicate_tensor`, `bad_index`, `bad_file`, `bad_json`,
            `bad_safetensors`, `path_not_allowed`, `too_large`.
    """
    found = [name for name in entries if name.endswith(".safetensors")]
    names = WEIGHTS if has_config else (*WEIGHTS, FAIRSEQ)
    wholes = [name for name in names if name in entries or name + INDEX in entries]
    if GATES_ELSEWHERE in found:
        wholes = [GATES_ELSEWHERE, *wholes]
    if len(wholes) > 1 and (not has_config or GATES_ELSEWHERE in wholes):
        raise _not_these(wholes)
    if not wholes or (has_config and wholes == [GATES_ELSEWHERE]):
        return _without_safetensors(entries, found, real, limits, allow_pickle)
    weights = Weights()
    try:
        if wholes[0] in entries:
            weights.add_safetensors(_there(real, wholes[0]), wholes[0], limits)
        else:
            _add_shards(weights, wholes[0], found, real, limits)
    except AdapterError:
        weights.close()
        raise
    return weights


def _without_safetensors(
    entries: Sequence[str], found: list[str], real: Real, limits: Limits, allow_pickle: bool
) -> Weights:
    pickles = [name for name in entries if name.endswith(PICKLES)]
    chosen = next((name for name in PICKLED if name in pickles), None)
    if allow_pickle and chosen:
        weights = Weights()
        weights.add_pickle(_there(real, chosen), chosen, limits)
        return weights
    shards = [name for name in found if _stem(name) in WEIGHTS]
    if shards:
        raise AdapterError(
            "missing_file", f"'{_stem(shards[0])}{INDEX}' is missing, which says what"
            " the parts hold", seen=shards[:4], fix="save the adapter again, or in one file",
        )  # fmt: skip
    if pickles and not allow_pickle and not (found and not chosen):
        error = AdapterError(
            "pickle_refused", "the adapter's tensors are in a pickle, which can run code",
            seen=chosen or pickles[0], limit="*.safetensors",
            fix="convert it offline with `vllm-lora-ext convert --allow-pickle`, or start the"
            ' server with --additional-config \'{"lora_ext": {"pickle": "weights_only"}}\'',
        )  # fmt: skip
        if chosen:
            raise error
        return Weights(error)  # what a trainer leaves, beside an adapter of subfolders
    if found:
        return Weights(_not_these(found))
    return Weights(AdapterError(
        "missing_file", "the adapter has no safetensors file", limit=list(WEIGHTS),
        fix=f"save its tensors as {WEIGHTS[0]}",
    ))  # fmt: skip


def _add_shards(weights: Weights, whole: str, found: list[str], real: Real, limits: Limits) -> None:
    index = whole + INDEX
    table = read_object(_there(real, index), index, limits)[0].get("weight_map")
    if not isinstance(table, dict) or not table or not all(map(_is_shard, table.values())):
        raise AdapterError(
            "bad_index", f"weight_map in {index} does not say which file holds which tensor",
            seen=table, limit="an object: tensor → name of a safetensors file beside the index",
            fix="save the adapter again, or in one file",
        )  # fmt: skip
    files = sorted(set(table.values()))
    unknown = [name for name in found if _stem(name) == whole and name not in files]
    if unknown:
        raise AdapterError(
            "unexpected_file", f"{index} does not know every part that is there",
            seen=unknown[:4], limit=files[:4], fix="remove the parts of another adapter",
        )  # fmt: skip
    held: dict[str, str] = {}
    for file in files:
        weights.add_safetensors(_there(real, file), file, limits)
        held |= {name: file for name in weights.shapes if name not in held}
    for name, file in table.items():
        if held.get(name) != file:
            raise missing_tensor(name, f" in {file}, where {index} says it is")
    for name in held.keys() - table.keys():
        raise AdapterError(
            "unexpected_tensor", f"{index} does not know tensor '{name}'", seen=held[name],
            fix="save the adapter again, or in one file",
        )  # fmt: skip


def _is_shard(file: object) -> bool:
    return isinstance(file, str) and file.endswith(".safetensors") and "/" not in file


def _stem(name: str) -> str:
    """The whole file that a shard is a part of; empty when the name is no shard's."""
    shard = _SHARD.fullmatch(name)
    return f"{shard[1]}.safetensors" if shard else ""


def _there(real: Real, name: str) -> Path:
    path = real(name)
    if path is None:
        raise AdapterError("missing_file", f"'{name}' is missing", fix=f"save {name} again")
    return path


def _not_these(found: list[str]) -> AdapterError:
    return AdapterError(
        "unexpected_file", "it cannot be told which safetensors file holds the adapter",
        seen=found[:4], limit=list(WEIGHTS), fix="remove or rename the others",
    )  # fmt: skip


def missing_tensor(name: str, because: str = "") -> AdapterError:
    """The error for a tensor that the format demands."""
    return AdapterError(
        "missing_tensor", f"tensor '{name}' is missing{because}", fix="save the adapter again"
    )
