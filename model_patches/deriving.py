"""Adapters that a worker makes from those that it holds, as a recipe says."""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256

import numpy as np
import torch
from vllm.lora.request import LoRARequest

from vllm_lora_ext.conditions.recipe import Part, Recipe, is_recipe
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.composing import Composer, Ingredient
from vllm_lora_ext.model_patches.held import from_memory
from vllm_lora_ext.model_patches.loader import Reading
from vllm_lora_ext.model_patches.placing import Placer
from vllm_lora_ext.model_patches.residency import HostAdapter, Residency, Resident


class Deriver:
    """Of one worker.

    Args:
        held: what the worker holds.
        read: reads an adapter from its folder.
        resident: what stays in host memory of an adapter of this id.
    """

    def __init__(
        self,
        held: Residency,
        placer: Placer,
        composer: Composer,
        read: Callable[[LoRARequest], Resident],
        resident: Callable[[int, HostAdapter], Resident],
    ) -> None:
        self._held, self._placer, self._composer = held, placer, composer
        self._read, self._resident = read, resident

    def plan(self, request: LoRARequest) -> Reading:
        """What is to be done for a recipe; takes the parts as they stand now.

        Raises:
            AdapterError: `bad_value`, it is no recipe.
        """
        recipe = Recipe.parse(request.lora_path)
        found = [self._held.find(part.version) for part in recipe.parts]
        parts = [held and held[1] for held in found]
        uses = frozenset(held[0] for held in found if held)
        return Reading(functools.partial(self._make, request, recipe, parts), uses)

    def _make(
        self, request: LoRARequest, recipe: Recipe, held: Sequence[Resident | None]
    ) -> Resident:
        ingredients = [
            self._ingredient(recipe, part, resident)
            for part, resident in zip(recipe.parts, held, strict=True)
        ]
        only = ingredients[0]
        if len(ingredients) == 1 and only.scale == 1.0 and not only.by_row:
            host = replace(
                only.host, version=recipe.version, source=request.lora_name, parts=(only.part,)
            )
        else:
            host = self._composer.compose(ingredients, recipe.version, request.lora_name)
        return self._resident(request.lora_int_id, host)

    def _ingredient(self, recipe: Recipe, part: Part, resident: Resident | None) -> Ingredient:
        resident = resident or self._reload(part)
        if resident.version != part.version:
            raise AdapterError(
                "adapter_changed", "an adapter of the request was replaced while the request was"
                " on its way", seen=part.name, fix="send the request again",
            )  # fmt: skip
        host, version = resident.host, part.version
        if (
            host is None or host.classifier is not None or host.attention
            or is_recipe(part.path)
        ):  # fmt: skip
            raise AdapterError(
                "unsupported_feature", f"adapter {part.name} cannot be one of several, or scaled",
                seen=resident.system, limit="adapters of linear layers, embedding and output"
                " matrix, named one by one", fix="name it as the request's model",
            )  # fmt: skip
        if host.template is not None:
            user = _tensor(recipe.user) if host.template.user is not None else None
            gate = _gate(recipe.gate) if host.template.instruction else None
            version = f"{version}:{_digest(user, gate)}"
            adapter = host.template.derive(user, gate)
            host = self._placer.place(replace(adapter, source=part.name, digest=version))
        return Ingredient(part.name, version, host, part.scale, recipe.by_row)

    def _reload(self, part: Part) -> Resident:
        """Of one that was evicted since the request was taken; it stays evicted."""
        if from_memory(part.path):
            raise AdapterError(
                "adapter_changed", "an adapter of the request was handed over as tensors, and this"
                " version of it is no longer held", seen=part.name, fix="send the request again",
            )  # fmt: skip
        return self._read(LoRARequest(part.name, part.lora_id, part.path))


def _tensor(numbers: Sequence[float] | None) -> torch.Tensor | None:
    return None if numbers is None else torch.tensor(numbers, dtype=torch.float32)


def _gate(text: str | None) -> torch.Tensor | None:
    """fp32 [d], as a recipe carries it."""
    if text is None:
        return None
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").copy())


def _digest(*tensors: torch.Tensor | None) -> str:
    digest = sha256()
    for tensor in tensors:
        digest.update(b"none" if tensor is None else tensor.numpy().tobytes())
        digest.update(b";")
    return digest.hexdigest()[:32]
