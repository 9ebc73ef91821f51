"""From the path of an adapter to its folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vllm.lora.utils import get_adapter_absolute_path

from vllm_lora_ext.adapters.folder import resolve_inside
from vllm_lora_ext.errors import AdapterError


def find_folder(path: str, roots: Sequence[Path] | None) -> str:
    """The adapter's folder. Raises AdapterError `not_found`, `path_not_allowed`."""
    return _anywhere(path) if roots is None else _below(path, roots)


def _anywhere(path: str) -> str:
    """Where stock looks: the file system, then the Hugging Face hub."""
    try:
        return get_adapter_absolute_path(path)
    except Exception as error:  # no network, offline mode: stock lets some of them through
        raise AdapterError(
            "not_found", "there is no such adapter folder, and none came from the hub",
            seen=path, fix="check the path of the adapter",
        ) from error  # fmt: skip


def _below(path: str, roots: Sequence[Path]) -> str:
    """The folder below one of `roots`; a relative path may also start at the working directory.

    The hub is never asked: its cache is not below the roots.
    """
    sent, path = path, os.path.expanduser(path)
    places = [os.path.join(root, path) for root in roots] + [os.path.abspath(path)]
    found = next((place for place in places if os.path.isdir(place)), places[0])
    real = resolve_inside(found, roots, sent)
    if not os.path.isdir(real):  # whatever the name is
        raise AdapterError(  # with the path as it was sent: where the roots lie is the operator's
            "not_found", "there is no adapter folder", seen=sent,
            fix="check the path of the adapter",
        )  # fmt: skip
    return str(real)
