"""What of an adapter an engine serves, where the operator or the model leaves layers out."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import torch
from vllm.lora.utils import is_in_target_modules
from vllm.model_executor.layers.attention import CrossAttention
from vllm.model_executor.models import supports_multimodal

from vllm_lora_ext.adapters.checks import without_drafter
from vllm_lora_ext.adapters.model import RoutedAdapter
from vllm_lora_ext.errors import AdapterError


class Scope:
    """The layers of one model that stand outside of what can be adapted, though they are there.

    Args:
        model: the model, its layers wrapped.
        targets: `--lora-target-modules`; None: no limit.
        packed: last part of a fused layer's name → last parts of its slices' names.
        towers: whether LoRA is on the towers and connectors of this model.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        targets: list[str] | None,
        packed: Mapping[str, list[str]],
        towers: bool,
    ) -> None:
        self._targets = targets
        self._skip = tuple(getattr(model, "lora_skip_prefixes", None) or ())
        self._towers = () if towers else _towers(model)
        self._encoder_rows = on_encoder_rows(model)
        self._instead = _instead_of_towers(model)
        self._outside: set[str] = set()
        for name, _ in model.named_modules():
            if not is_in_target_modules(name, targets, dict(packed)):
                before, _, last = name.rpartition(".")
                self._outside |= {name, *(f"{before}.{part}" for part in packed.get(last, ()))}

    def narrowed(
        self, adapter: RoutedAdapter, name_of: Mapping[str, str], has: Collection[str]
    ) -> RoutedAdapter:
        """The adapter without what lies outside.

        Args:
            name_of: the adapter's name of a layer or of a parameter of experts → vLLM's.
            has: names of layers, as the adapter has them, that can be adapted or that live on
                another rank.
        Raises:
            AdapterError: `unsupported_feature`, layers of a tower or connector whose flag is off,
                or that run on an encoder's rows, or a part of a block of experts; `empty_adapter`,
                nothing is left.
        """
        adapter = without_drafter(adapter, has, self._skip)
        for name in adapter.modules:
            if name_of[name].startswith(self._encoder_rows):
                raise AdapterError(
                    "unsupported_feature", "the adapter has layers that read what the encoder"
                    " gives, which has other rows than a request's tokens", seen=name,
                    limit="layers that read the decoder's own states",
                    fix="train on these: self-attention, queries and outputs of cross attention,"
                    " the MLPs",
                )  # fmt: skip
            if name not in has and name_of[name].startswith(self._towers):
                raise AdapterError(
                    "unsupported_feature", "the adapter has layers of a tower or connector, and"
                    " LoRA is on the language model only", seen=name,
                    limit="layers of the language model", fix=self._instead,
                )  # fmt: skip
        if self._targets is None:
            return adapter
        inside = tuple(f"{block}." for block in adapter.blocks)
        cut = sorted(n for n, v in name_of.items() if v in self._outside and n.startswith(inside))
        if cut:
            raise AdapterError(
                "unsupported_feature", "the adapter's experts are whole MLP blocks, of which the"
                " server leaves layers out", seen=cut[0],
                limit="--lora-target-modules " + " ".join(self._targets),
                fix="start with the MLP's layers in --lora-target-modules, or without the flag",
            )  # fmt: skip
        modules = {
            name: m for name, m in adapter.modules.items() if name_of[name] not in self._outside
        }
        experts = {
            name: e
            for name, e in adapter.experts.items()
            if name_of[name].rpartition(".")[0] not in self._outside
        }
        if not (modules or adapter.blocks or experts or adapter.heads):
            raise self._nothing_left(adapter.modules)
        return dataclasses.replace(adapter, modules=modules, experts=experts)

    def left_out(self, layers: Collection[str], name_of: Mapping[str, str]) -> set[str]:
        """Layers of a template that an adapter derived from it will not have.

        Raises:
            AdapterError: `empty_adapter`, these are all.
        """
        outside = {name for name in layers if name_of[name] in self._outside}
        if layers and len(outside) == len(layers):
            raise self._nothing_left(layers)
        return outside

    def _nothing_left(self, layers: Collection[str]) -> AdapterError:
        return AdapterError(
            "empty_adapter", "no layer of the adapter is among those that may be adapted here",
            seen=", ".join(sorted({n.rpartition(".")[2] for n in layers})),
            limit="--lora-target-modules " + " ".join(self._targets or ()),
            fix="start with these layers in --lora-target-modules, or without the flag",
        )  # fmt: skip


def on_encoder_rows(model: Any) -> tuple[str, ...]:
    """What the names of those of an encoder-decoder model's layers begin with that run on the
    encoder's rows, of which a step's map says nothing: the encoder, and the keys and values of
    cross attention. vLLM wraps and maps them like all others."""
    crossed = [n for n, m in model.named_modules() if isinstance(m, CrossAttention)]
    if not crossed:
        return ()
    read = ("k_proj", "v_proj", "kv_proj")
    parents = {name.rpartition(".")[0] for name in crossed}
    encoders = [f"{name}." for name in getattr(model, "_tower_model_names", ())]
    return (*encoders, *(f"{parent}.{layer}" for parent in sorted(parents) for layer in read))


def _towers(model: Any) -> tuple[str, ...]:
    """Prefixes of the parts beside the language model."""
    if not supports_multimodal(model) or not hasattr(model, "get_mm_mapping"):
        return ()
    mapping = model.get_mm_mapping()
    return (*mapping.tower_model, *mapping.connector)


def _instead_of_towers(model: Any) -> str:
    if getattr(model, "supports_tower_connector_lora", False):
        return "start with --enable-tower-connector-lora"
    return f"train on the language model only: vLLM adapts nothing else of {type(model).__name__}"
