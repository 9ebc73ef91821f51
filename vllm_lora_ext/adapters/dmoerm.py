"""DMoERM (github.com/quanshr/DMoERM-v1): a router over categories, LoRA experts, an MLP over them.

A reward model, not an adapter: a text's category is the router's choice, and its reward is a small
network over the last hidden states of one pass per expert of that category. The router is a model
of its own. So are the bases of the categories, which their files hold too: they are left unread.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_lora_ext.adapters.files import Limits, read_object
from vllm_lora_ext.adapters.finite import is_finite, not_finite
from vllm_lora_ext.adapters.folder import SIDECAR, Roots, tensor_digest
from vllm_lora_ext.adapters.paths import real_file
from vllm_lora_ext.adapters.pickles import PICKLES
from vllm_lora_ext.adapters.readers.peft_config import MAX_ALPHA, bad_value
from vllm_lora_ext.adapters.reward_model import (
    Category,
    Head,
    RewardAdapter,
    RewardExpert,
    Router,
)
from vllm_lora_ext.adapters.weights import Weights, missing_tensor
from vllm_lora_ext.errors import AdapterError

NAME = "dmoerm"
ROUTER_FOLDER, INNER_FOLDER = "router", "innermoe"
_ROUTER = f"{ROUTER_FOLDER}/best_router"
SETTINGS = {
    "categories": "names of the categories, in the order of the router's outputs",
    "points": "capabilities of each category, in the order in which their hidden states are joined:"
    " {category: [point, ...]}",
    "lora_alpha": "the experts' alpha; their scale is alpha / r",
    "target_modules": "which linears the experts adapt (may be left out)",
}
# Every expert wraps the model that the one before it has wrapped.
_WRAPS = r"base_model\.(?:base_model\.model\.)+"
_LORA = re.compile(rf"{_WRAPS}(?P<module>[\w.]+)\.lora_(?P<part>[AB])\.(?P<point>[^.]+)\.weight")
_BASE = re.compile(rf"{_WRAPS}(?:layers\.\d+\.[\w.]+|embed_tokens|norm)\.(?:weight|bias)")
_COMPUTED = ".rotary_emb.inv_freq"  # what older releases of transformers save of the config
_DTYPES = ("F32", "F16", "BF16", "F64")
_EARLIER_HEAD = ("base_value_head.weight", "base_value_head.bias")  # of the first phase


def is_reward_model(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is laid out as the authors' program leaves it."""
    return all(Path(path, name).is_dir() for name in (ROUTER_FOLDER, INNER_FOLDER))


def weight_files(path: str | os.PathLike[str]) -> list[str]:
    """Names of the weights' files below the folder, without their endings."""
    inner = Path(path, INNER_FOLDER)
    found = [_phase_3(entry.name) for entry in sorted(inner.iterdir()) if entry.is_dir()]
    endings = (".safetensors", *PICKLES)
    there = [name for name in found if any(Path(path, name + e).is_file() for e in endings)]
    return [_ROUTER, *there]


def read_reward_model(
    path: str | os.PathLike[str],
    settings: Mapping[str, Any] | None = None,
    *,
    roots: Roots | None = None,
) -> RewardAdapter:
    """Read and check a DMoERM folder: `router/`, `innermoe/<category>/ckpts/`, `routing.json`.

    Args:
        settings: what the files leave out, in place of or beside `routing.json`; see `SETTINGS`.
        roots: folders that links out of the folder may lead into; None: anywhere.
    Raises:
        AdapterError: the folder is none, is not complete, or its parts do not fit each other.
    """
    if not is_reward_model(path):
        raise AdapterError(
            "missing_file", "this is no folder of a reward model", seen=os.fspath(path),
            limit=f"{ROUTER_FOLDER}/ and {INNER_FOLDER}/<category>/ckpts/ in it",
            fix="name the folder into which DMoERM was trained",
        )  # fmt: skip
    root, limits = Path(path), Limits()
    given = _Settings.read(root, settings or {}, roots)
    parts = {n: _Tensors(root, n, limits, roots) for n in weight_files(root)}
    router = _router(parts[_ROUTER], len(given.categories))
    found = sorted(name.split("/")[1] for name in parts if name != _ROUTER)
    given.check_found(found)
    width = router.head_CD.shape[1]
    categories = {
        name: _category(parts[_phase_3(name)], given.points[name], given, width)
        for name in given.categories if name in found
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(given.as_dict(), sort_keys=True).encode())
    for name in sorted(parts):
        digest.update(parts[name].finish())
    return RewardAdapter(given.categories, categories, router, str(root), digest.hexdigest())


def said_settings(
    path: str | os.PathLike[str], given: Mapping[str, Any], roots: Roots | None = None
) -> dict[str, Any]:
    """What `routing.json` says, and what is given beside it.

    Raises:
        AdapterError: `setting_mismatch`, they disagree; `bad_json`, `bad_file`, `too_large`.
    """
    there = real_file(Path(path), SIDECAR, roots)
    said = read_object(there, SIDECAR, Limits())[0] if there else {}
    for key in said.keys() & given.keys():
        if said[key] != given[key]:
            raise AdapterError(
                "setting_mismatch", f"'{key}' is given, and {SIDECAR} says something else",
                seen=given[key], limit=said[key], fix="give it once",
            )  # fmt: skip
    return {**said, **given}


def _phase_3(category: str) -> str:
    return f"{INNER_FOLDER}/{category}/ckpts/phase3"


class _Tensors:
    """One file of weights, every tensor of which must be used or known."""

    def __init__(self, root: Path, name: str, limits: Limits, roots: Roots | None) -> None:
        self.file, self._weights = f"{name}.safetensors", Weights()
        real = real_file(root, self.file, roots)
        if real is None:
            raise no_safetensors(root, name)
        self._weights.add_safetensors(real, self.file, limits)
        self.names = [name for name in self._weights.shapes if not name.endswith(_COMPUTED)]
        self._left = set(self.names)
        self._parts: dict[str, bytes] = {}

    def stored(self, name: str) -> torch.Tensor:
        """A tensor in the dtype in which it was saved, finite."""
        if name not in self._weights.shapes:
            raise missing_tensor(name, f" in {self.file}")
        if (dtype := self._weights.dtypes[name]) not in _DTYPES:
            raise AdapterError(
                "bad_dtype", f"tensor '{name}' of {self.file} has a dtype that cannot be served",
                seen=dtype, limit=list(_DTYPES), fix="save it as float32, float16 or bfloat16",
            )  # fmt: skip
        tensor = self._weights.read(name)
        self._parts[name] = tensor_digest(tensor)
        self._left.discard(name)
        if not is_finite(tensor):
            raise not_finite(f"tensor '{name}' of {self.file}", tensor)
        return tensor

    def take(self, name: str, *shape: int | None) -> torch.Tensor:
        """A tensor as float32, of this shape; None: any size."""
        tensor = self.stored(name).float()
        fits = len(tensor.shape) == len(shape) and all(
            want in (None, size) for want, size in zip(shape, tensor.shape, strict=True)
        )
        if not fits or not tensor.numel():
            wanted = ["any" if want is None else want for want in shape]
            raise AdapterError(
                "bad_shape", f"tensor '{name}' of {self.file} has an impossible shape",
                seen=list(tensor.shape), limit=wanted, fix="save the reward model again",
            )  # fmt: skip
        return tensor

    def skip(self, names: Sequence[str]) -> None:
        """Known, and of no use here."""
        self._left.difference_update(names)

    def finish(self) -> bytes:
        """Refuse what no part of the format explains; then sha256 over what was read."""
        if self._left:
            raise AdapterError(
                "unexpected_tensor", f"{len(self._left)} of {len(self.names)} tensors of"
                f" {self.file} belong to no part of DMoERM", seen=sorted(self._left)[:4],
                fix="check that the file is of its third phase, and saved completely",
            )  # fmt: skip
        digest = hashlib.sha256()
        for name in sorted(self._parts):
            digest.update(hashlib.sha256(name.encode()).digest() + self._parts[name])
        return digest.digest()


def no_safetensors(root: Path, name: str) -> AdapterError:
    """The error for a file of weights that is a pickle, or is not there."""
    if any(Path(root, name + ending).is_file() for ending in PICKLES):
        return AdapterError(
            "pickle_refused", "the reward model's tensors are in pickles, which can run code",
            seen=name, limit="*.safetensors",
            fix="convert it offline with `vllm-lora-ext convert --allow-pickle`",
        )  # fmt: skip
    return AdapterError(
        "missing_file", f"'{name}.safetensors' is missing", fix="save the reward model again"
    )


@dataclass(frozen=True)
class _Settings:
    """What the files leave out."""

    categories: tuple[str, ...]
    points: dict[str, tuple[str, ...]]
    alpha: float
    targets: frozenset[str] | None

    @classmethod
    def read(cls, root: Path, given: Mapping[str, Any], roots: Roots | None) -> _Settings:
        said = said_settings(root, given, roots)
        if (system := said.pop("system", NAME)) != NAME:
            raise bad_value(f"system in {SIDECAR}", system, NAME)
        if unknown := sorted(said.keys() - SETTINGS.keys()):
            raise AdapterError(
                "unknown_key", f"{SIDECAR} holds a key that this format does not use",
                seen=unknown[0], limit=sorted(SETTINGS), fix=f"remove it from {SIDECAR}",
            )  # fmt: skip
        for key in ("categories", "points", "lora_alpha"):
            if key not in said:
                raise AdapterError(
                    "missing_setting", f"'{key}' ({SETTINGS[key]}) is in no file of this adapter",
                    fix=f'add "{key}" to {SIDECAR} in the adapter\'s folder',
                )  # fmt: skip
        categories, points = _names("categories", said["categories"]), said["points"]
        if not isinstance(points, dict) or not points.keys() <= set(categories):
            raise bad_value(f"points in {SIDECAR}", points, "an object: category → its points")
        targets = said.get("target_modules")
        return cls(
            categories, {c: _names(f"points.{c}", p) for c, p in points.items()},
            _alpha(said["lora_alpha"]),
            None if targets is None else frozenset(_names("target_modules", targets)),
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        targets = {} if self.targets is None else {"target_modules": sorted(self.targets)}
        points = {category: list(points) for category, points in self.points.items()}
        return {
            "categories": list(self.categories), "points": points, "lora_alpha": self.alpha,
            **targets,
        }  # fmt: skip

    def check_found(self, found: list[str]) -> None:
        """That the categories with files have a place in the router and points."""
        if not found:
            raise AdapterError(
                "missing_file", "no category has files", seen=INNER_FOLDER,
                limit=_phase_3("<category>"), fix="save the third phase of each category",
            )  # fmt: skip
        for category in found:
            if category not in self.points:
                raise AdapterError(
                    "setting_mismatch", f"there are files of a category that points in {SIDECAR}"
                    " does not name", seen=category, limit=sorted(self.points),
                    fix=f"name its points in {SIDECAR}, or remove its folder",
                )  # fmt: skip


def _names(field_name: str, value: object) -> tuple[str, ...]:
    names: list[Any] = value if isinstance(value, list) else []
    named = all(isinstance(n, str) and n for n in names)
    if not names or not named or len(set(names)) < len(names):
        raise bad_value(f"{field_name} in {SIDECAR}", value, "a list of different names")
    return tuple(names)


def _alpha(value: object) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= MAX_ALPHA:  # type: ignore[operator]
        raise bad_value(f"lora_alpha in {SIDECAR}", value, f"a number up to {MAX_ALPHA:g}")
    return float(value)  # type: ignore[arg-type]


def _router(tensors: _Tensors, categories: int) -> Router:
    head_CD = tensors.take("value_head.weight", None, None)
    if len(head_CD) != categories:
        raise AdapterError(
            "setting_mismatch", f"categories in {SIDECAR} are not as many as the router's outputs",
            seen=categories, limit=len(head_CD), fix="name them in the router's order",
        )  # fmt: skip
    bias = tensors.take("value_head.bias", categories)
    model = [name for name in tensors.names if name.startswith("model.")]
    if not model:
        raise missing_tensor("model.*", f" in {tensors.file}")
    weights = {name.removeprefix("model."): tensors.stored(name) for name in model}
    return Router(weights, head_CD, bias)


def _category(
    tensors: _Tensors, points: tuple[str, ...], settings: _Settings, width: int
) -> Category:
    loras: dict[str, dict[tuple[str, str], str]] = {}
    for name in tensors.names:
        if match := _LORA.fullmatch(name):
            loras.setdefault(match["point"], {})[match["module"], match["part"]] = name
    if set(loras) != set(points):
        raise AdapterError(
            "setting_mismatch", f"points in {SIDECAR} are not those of {tensors.file}",
            seen=sorted(points), limit=sorted(loras), fix=f"mend {SIDECAR}",
        )  # fmt: skip
    modules = sorted({module for parts in loras.values() for module, _ in parts})
    kinds = {module.rpartition(".")[2] for module in modules}
    if settings.targets is not None and kinds != settings.targets:
        raise AdapterError(
            "setting_mismatch", f"target_modules in {SIDECAR} are not those of {tensors.file}",
            seen=sorted(settings.targets), limit=sorted(kinds), fix=f"mend {SIDECAR}",
        )  # fmt: skip
    experts = tuple(_expert(tensors, p, loras[p], modules, settings.alpha) for p in points)
    base = [name for name in tensors.names if _BASE.fullmatch(name)]
    tensors.skip([*base, *_EARLIER_HEAD])
    return Category(experts, _head(tensors, len(points) * width), bool(base))


def _expert(
    tensors: _Tensors, point: str, names: Mapping[tuple[str, str], str], modules: Sequence[str],
    alpha: float,
) -> RewardExpert:  # fmt: skip
    rank, held = 0, {}
    for module in modules:
        for part in "AB":
            if (module, part) not in names:
                raise missing_tensor(f"{module}.lora_{part}.{point}.weight", f" in {tensors.file}")
        a_RK = tensors.take(names[module, "A"], rank or None, None)
        b_NR = tensors.take(names[module, "B"], None, len(a_RK))
        rank = len(a_RK)
        held[f"base_model.model.{module}.lora_A.weight"] = a_RK
        held[f"base_model.model.{module}.lora_B.weight"] = b_NR
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha,
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
    }  # fmt: skip
    return RewardExpert(point, rank, held, config)


def _head(tensors: _Tensors, width: int) -> Head:
    first_MI = tensors.take("final_value_head1.weight", None, width)
    middle = len(first_MI)
    slope = tensors.take("prelu.weight", None)
    if len(slope) not in (1, middle):
        slope = tensors.take("prelu.weight", middle)
    return Head(
        first_MI, tensors.take("final_value_head1.bias", middle), slope,
        tensors.take("final_value_head2.weight", 1, middle),
        tensors.take("final_value_head2.bias", 1),
    )  # fmt: skip
