"""Recipes from files and mappings: everything wrong with one is found here, before any reading."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from pydantic import ValidationError

from vllm_lora_ext.adapters.paths import shown
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.methods import all_methods, find_method
from vllm_lora_ext.merging.parameters import OF_ADAPTERS
from vllm_lora_ext.merging.recipes.schema import (
    PIPELINE,
    RESULT,
    WEIGHT_TAGS,
    Convert,
    Merge,
    Own,
    OwnOfModel,
    Recipe,
    Scatter,
    Truncate,
    ids_of,
)

MAX_BYTES = 1 << 20
_MENDED = "mend its spelling or remove it; docs/recipes.md lists the keys"


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """The recipe in a YAML file: one document, no key twice, no anchors, 1 MiB at most.

    Raises:
        AdapterError: `not_found`, `bad_file`, `too_large`, `bad_yaml`, those of `parse_recipe`.
    """
    file = Path(path)
    if not file.exists():
        raise AdapterError("not_found", "there is no such recipe", seen=shown(file))
    if not file.is_file():  # opening a pipe would wait for ever
        raise AdapterError("bad_file", "the recipe is no regular file", seen=shown(file))
    try:
        with file.open("rb") as stream:
            text = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise AdapterError("bad_file", f"the recipe cannot be read: {error.strerror}") from error
    if len(text) > MAX_BYTES:
        raise AdapterError(
            "too_large", "the recipe is too long", limit=f"{MAX_BYTES} bytes",
            fix="check that this is a recipe",
        )  # fmt: skip
    try:
        # A SafeLoader with fewer rights; it makes no objects.
        value = yaml.load(text.decode("utf-8"), _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        what = " ".join(str(error).split()) or type(error).__name__
        raise AdapterError(
            "bad_yaml", f"the recipe {file.name} is no valid YAML: {what}"[:600],
            fix="mend the line, one recipe in each file",
        ) from error  # fmt: skip
    return parse_recipe(value)


def parse_recipe(mapping: Mapping[str, Any]) -> Recipe:
    """A recipe from what `Recipe.model_dump(mode="json")` or a YAML file gives.

    Raises:
        AdapterError: `unknown_key`, `missing_key`, `bad_value`, `setting_mismatch`, with the path
            of the key in the message (`models[1].parameters.weight`).
    """
    if not isinstance(mapping, Mapping):
        raise AdapterError("bad_value", "a recipe must be a mapping of keys", seen=mapping)
    try:
        recipe = Recipe.model_validate(mapping)
    except ValidationError as error:
        raise _first(error) from None
    both = (recipe.dtype, recipe.output.dtype)
    if None not in both and len(set(both)) > 1:
        raise AdapterError(
            "setting_mismatch", "dtype and output.dtype differ", seen=list(both), fix="keep one"
        )
    return _check_steps(recipe) if recipe.merge_method == PIPELINE else _check_merge(recipe)


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        # Anchors would let a short file stand for an endless one.
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("anchors and aliases (&, *) are not read")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if isinstance(name, (list, dict)) or name in seen:
                raise yaml.YAMLError(f"key '{name}' stands there twice{key.start_mark}")
            seen.add(name)
        return super().construct_mapping(node, deep)


# YAML 1.1 takes 1e-3 for a text; every writer of a number means a number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _first(error: ValidationError) -> AdapterError:
    """The first mistake; a key that does not exist explains a missing one, so it comes first."""
    order = {"extra_forbidden": 0, "invalid_key": 0, "missing": 1, "union_tag_not_found": 1}
    found = min(error.errors(), key=lambda one: order.get(one["type"], 2))
    kind, path = found["type"], _path(found["loc"])
    if kind in ("extra_forbidden", "invalid_key"):
        return AdapterError("unknown_key", f"a recipe has no key '{path}'", fix=_MENDED)
    if kind == "missing":
        return AdapterError("missing_key", f"'{path}' is missing in the recipe", fix="add it")
    if kind == "union_tag_not_found":
        return AdapterError("missing_key", f"'{path}.op' is missing in the recipe", fix="add it")
    return AdapterError(
        "bad_value", f"'{path}' of the recipe is wrong: {found['msg']}", seen=found["input"],
        fix="mend the value",
    )  # fmt: skip


def _path(parts: Iterable[int | str]) -> str:
    text, at = "", list(parts)
    if at[:1] == ["steps"] and len(at) > 2:
        del at[2]  # the name of the step's class
    for part in at:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part not in WEIGHT_TAGS and part != "[key]":
            text += f".{part}" if text else part
    return text


def _check_merge(recipe: Recipe) -> Recipe:
    if recipe.steps:
        raise AdapterError(
            "unknown_key", "'steps' belongs to merge_method pipeline", seen=recipe.merge_method,
            fix="remove it, or write merge_method: pipeline",
        )  # fmt: skip
    _known(recipe.merge_method, "merge_method")
    if not recipe.models:
        raise AdapterError("missing_key", "'models' names no adapter", fix="add one or more")
    parameters = find_method(recipe.merge_method).said(recipe.parameters, "'parameters'")
    for i, model in enumerate(recipe.models):
        _check_own(recipe.merge_method, model.parameters, f"models[{i}].parameters")
    names = [model.name for model in recipe.models if model.name]
    if len(set(names)) < len(names):
        raise AdapterError("bad_value", "two of 'models' have one name", seen=names)
    for key in ("rank", "energy"):
        said, wanted = parameters.get(key), getattr(recipe.output, key)
        cuts = key == "energy" or recipe.output.on_overflow != "error"
        if cuts and None not in (said, wanted) and said != wanted:
            raise AdapterError(
                "setting_mismatch", f"parameters.{key} and output.{key} differ",
                seen=[said, wanted], fix="keep one",
            )  # fmt: skip
    return recipe.model_copy(update={"parameters": parameters})


def _check_steps(recipe: Recipe) -> Recipe:
    for key in ("models", "parameters", "masks"):
        if getattr(recipe, key):
            raise AdapterError(
                "unknown_key", f"'{key}' means nothing with merge_method pipeline",
                fix="remove it; the steps say it all",
            )  # fmt: skip
    if not recipe.steps:
        raise AdapterError("missing_key", "'steps' is missing or empty", fix="add a step")
    known: dict[str, bool] = {}  # id → whether a later step takes it
    steps = []
    for i, step in enumerate(recipe.steps):
        where = f"steps[{i}]"
        for name in ids_of(step):
            if name not in known:
                raise AdapterError(
                    "bad_value", f"{where} takes a step that does not stand before it", seen=name,
                    limit=list(known), fix="mend the id or the order",
                )  # fmt: skip
            known[name] = True
        if step.id in known:
            raise AdapterError("bad_value", f"'{where}.id' stands there twice", seen=step.id)
        known[step.id] = False
        steps.append(_check_step(step, where))
    ends = [name for name, used in known.items() if not used]
    if ends != [result_of(recipe)]:
        raise AdapterError(
            "bad_value", "the steps must come together in one result", seen=ends,
            limit=result_of(recipe), fix="use every step, or remove it",
        )  # fmt: skip
    return recipe.model_copy(update={"steps": steps})


def result_of(recipe: Recipe) -> str:
    """Id of the step that a pipeline's result comes from: `out`, or the last."""
    ids = [step.id for step in recipe.steps]
    return RESULT if RESULT in ids else ids[-1]


def _check_step(step: Any, where: str) -> Any:
    if isinstance(step, Merge):
        _known(step.method, f"{where}.method")
        for name, own in step.inputs.items():
            if isinstance(own, Own):
                _check_own(step.method, own, f"{where}.inputs.{name}")
        parameters = find_method(step.method).said(step.parameters, f"'{where}.parameters'")
        return step.model_copy(update={"parameters": parameters})
    if isinstance(step, Truncate) and step.rank is None and step.energy is None:
        raise AdapterError("missing_key", f"'{where}' has neither rank nor energy", fix="add one")
    if isinstance(step, (Convert, Scatter)):
        _check_settings(step.settings, f"{where}.settings")
    return step


def _check_settings(settings: Mapping[str, Any], where: str) -> None:
    """They go to a reader, which knows them, and into JSON."""
    for key, value in settings.items():
        if not _is_json(value):
            raise AdapterError(
                "bad_value", f"'{where}.{key}' is no JSON value", seen=repr(value)[:80],
                limit="numbers, texts, true, false, lists and mappings of them",
            )  # fmt: skip


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(each) for key, each in value.items())
    if isinstance(value, list):
        return all(_is_json(each) for each in value)
    return value is None or isinstance(value, (str, int, float, bool))


def _known(method: str, where: str) -> None:
    if method not in all_methods():
        raise AdapterError(
            "bad_value", f"'{where}' names no merge method", seen=method,
            limit=[*all_methods(), PIPELINE], fix="choose one of them",
        )  # fmt: skip


def _check_own(method: str, own: Own | OwnOfModel, where: str) -> None:
    given = {key: getattr(own, key) for key in OF_ADAPTERS}
    said = {key: value for key, value in given.items() if value is not None}
    find_method(method).own(said, f"'{where}' under method {method}")
