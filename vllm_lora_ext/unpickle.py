"""Adapters whose tensors are in a pickle, made into safetensors: offline, and only when asked."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from vllm_lora_ext.adapters.dmoerm import no_safetensors, weight_files
from vllm_lora_ext.adapters.files import Limits, too_large
from vllm_lora_ext.adapters.paths import real_file
from vllm_lora_ext.adapters.pickles import PICKLES, load_pickle
from vllm_lora_ext.adapters.weights import WEIGHTS
from vllm_lora_ext.errors import AdapterError

# What a trainer leaves beside the weights.
_LEFTOVERS = ("optimizer", "scheduler", "scaler", "training_args", "rng_state", "trainer_state")
_NAMES = {"pytorch_model": WEIGHTS[1], "model": WEIGHTS[1]}
_MAX_DEPTH, _MAX_FOLDERS = 4, 4096


def copy_as_safetensors(source: str | os.PathLike[str], target: Path) -> list[str]:
    """A copy of an adapter folder in which every pickle of tensors is a safetensors file.

    JSON and safetensors files come along, those of the folders inside too; nothing else does.

    Args:
        target: made by this function.
    Returns:
        The pickles that were read, as paths below `source`.
    Raises:
        AdapterError: `not_found`, `pickle_refused` (more than tensors, or broken), `too_large`,
            `unexpected_file` (several pickles), `path_not_allowed`, `bad_file`.
    """
    root = Path(source)
    if not root.is_dir():
        raise AdapterError(
            "not_found", "there is no adapter folder", seen=str(root),
            fix="check the path of the adapter",
        )  # fmt: skip
    limits = Limits()  # of a file, of JSON and of all tensors together, as for reading
    done: list[str] = []
    left = limits.read_bytes
    for folder in _folders(root):
        (target / folder).mkdir(parents=True)
        names = sorted(os.listdir(root / folder))
        for name in names:
            if name.endswith((".json", ".safetensors")):
                _bring(root, folder / name, target, limits)
        if any(name.endswith(".safetensors") for name in names):
            continue
        pickle = _weights(names, folder)
        if pickle is None:
            continue
        tensors = _load(root, folder / pickle, min(left, limits.file_bytes), limits.tensors)
        left -= sum(t.numel() * t.element_size() for t in tensors.values())
        name = _NAMES.get(Path(pickle).stem, WEIGHTS[0])
        save_file(tensors, target / folder / name, metadata={"format": "pt"})
        done.append(str(folder / pickle))
    return done


def copy_reward_model(
    source: str | os.PathLike[str], target: Path, allow_pickle: bool
) -> list[str]:
    """The weights of a DMoERM folder that are read, every pickle of tensors a safetensors file.

    Args:
        target: a folder that is there.
    Returns:
        The pickles that were read, as paths below `source`.
    Raises:
        AdapterError: `pickle_refused` (not allowed, more than tensors, or broken), `missing_file`,
            `too_large`, `path_not_allowed`, `bad_file`, `bad_safetensors`.
    """
    root, limits, pickles = Path(source), Limits(), []
    for name in weight_files(root):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        stored = Path(f"{name}.safetensors")
        if real_file(root, str(stored)) is not None:
            _bring(root, stored, target, limits)
        else:
            pickle = next((name + e for e in PICKLES if real_file(root, name + e)), None)
            if pickle is None or not allow_pickle:
                raise no_safetensors(root, name)
            tensors = _state(root, Path(pickle), limits)
            save_file(tensors, target / stored, metadata={"format": "pt"})
            pickles.append(pickle)
    return pickles


def _state(root: Path, pickle: Path, limits: Limits) -> dict[str, torch.Tensor]:
    try:
        return _load(root, pickle, limits.file_bytes, limits.tensors)
    except AdapterError as error:
        if error.code != "pickle_refused":
            raise
        # The authors' program saves its router as a whole module, whose class is their code.
        raise AdapterError(
            "pickle_refused", error.message, limit="a dict of tensors",
            fix="where the authors' code is, load it and save its tensors:"
            f" torch.save(torch.load('{pickle.name}', weights_only=False).state_dict(),"
            f" '{pickle.name}')",
        ) from error  # fmt: skip


def _folders(root: Path) -> list[Path]:
    """The folder and those inside, as paths below it; links to folders are left out."""
    found = [Path()]
    for folder in found:
        with os.scandir(root / folder) as entries:
            inside = sorted(e.name for e in entries if e.is_dir(follow_symlinks=False))
        if len(folder.parts) < _MAX_DEPTH:
            found += [folder / name for name in inside if not name.startswith(".")]
        if len(found) > _MAX_FOLDERS:
            raise AdapterError(
                "too_large", "the adapter's folder holds too many folders", seen=len(found),
                limit=_MAX_FOLDERS, fix="check that this is an adapter",
            )  # fmt: skip
    return found


def _bring(root: Path, name: Path, target: Path, limits: Limits) -> None:
    real = real_file(root, str(name))
    if real is None:
        return
    limit = limits.json_bytes if name.suffix == ".json" else limits.file_bytes
    if (size := real.stat().st_size) > limit:
        raise too_large(str(name), size, limit)
    try:
        os.link(real, target / name)  # a MeteoRA file holds a whole model
    except OSError:
        shutil.copyfile(real, target / name)


def _weights(names: list[str], folder: Path) -> str | None:
    pickles = [n for n in names if n.endswith(PICKLES) and not n.startswith(_LEFTOVERS)]
    for usual in ("adapter_model.bin", "pytorch_model.bin"):
        if usual in pickles:
            return usual
    if len(pickles) > 1:
        raise AdapterError(
            "unexpected_file", "several pickles may be the adapter's weights",
            seen=[str(folder / name) for name in pickles[:4]], limit="one",
            fix="move the others away",
        )  # fmt: skip
    return pickles[0] if pickles else None


def _load(root: Path, name: Path, limit: int, max_tensors: int) -> dict[str, torch.Tensor]:
    real = real_file(root, str(name))
    if real is None:
        raise AdapterError("missing_file", f"'{name}' is missing", fix=f"save {name} again")
    return load_pickle(real, str(name), limit, max_tensors)
