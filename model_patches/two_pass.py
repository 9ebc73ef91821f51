"""Adapters whose gates the base model's own last hidden state gives (X-LoRA): two passes a step.

Every attention layer of the model gets a twin: the same layer, under a name of its own in vLLM's
table of layers, so that vLLM gives it a KV cache of its own in a group of the same kind. Blocks,
slots, prefix cache, chunks and preemption are then those of any layer. A step with rows of such an
adapter runs the model first with the twins and without adapters, and takes the rows' gates from
what comes out; then as always. All other steps run once, and so do those whose rows of such
adapters all have gates that are `frozen_gates`.

Targets: `compilation_config.static_forward_context`, from which vLLM takes what has a KV cache, and
the forward context, through which attention finds its layer, when it runs, by its name.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.forward_context import (
    ForwardContext,
    get_forward_context,
    is_forward_context_available,
    override_forward_context,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionType

from vllm_lora_ext.adapters.classifier import Classifier
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.kernels.gated_lora import StepMap
from vllm_lora_ext.model_patches.frozen_gates import FrozenGates
from vllm_lora_ext.model_patches.rows import Rows

logger = logging.getLogger("vllm.lora_ext")

TWIN = "first_pass"
"""What the name of an attention layer's twin ends with."""


class TwoPass:
    """Of one engine.

    Args:
        model: the served model, its layers wrapped.
        step, rows: of its language model.
        vllm_config: its configuration.
    Raises:
        AdapterError: `bad_settings`, the model has layers that keep something else than keys and
            values, or none that can be run twice.
    """

    def __init__(self, model: nn.Module, step: StepMap, rows: Rows, vllm_config: Any) -> None:
        self._step, self._rows = step, rows
        self._hidden = vllm_config.model_config.get_hidden_size()
        self._classifiers: dict[int, Classifier] = {}
        self._frozen = FrozenGates(rows, step)
        attentions = _attentions(model)
        self._twins = {layer.layer_name: _twin(layer) for layer in attentions}
        layers = vllm_config.compilation_config.static_forward_context
        layers |= {twin.layer_name: twin for twin in self._twins.values()}
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        specs = [twin.get_kv_cache_spec(vllm_config) for twin in self._twins.values()]
        each = sum(spec.page_size_bytes // spec.block_size for spec in specs)
        logger.info(
            "vllm-lora-ext: two_pass: %d attention layers have a second KV cache, for passes"
            " without adapters: a token takes %d bytes of KV cache on this rank, %d without"
            " two_pass",
            len(specs), 2 * each, each,
        )  # fmt: skip

    def check(self, classifier: Classifier) -> None:
        """That steps can compute this classifier's gates.

        Raises:
            AdapterError: `shape_mismatch`, `unsupported_feature`.
        """
        if classifier.hidden_size != self._hidden:
            raise AdapterError(
                "shape_mismatch", "the classifier reads hidden states of another size than the"
                " model's", seen=classifier.hidden_size, limit=self._hidden,
                fix="serve it with the model it was trained on",
            )  # fmt: skip
        if classifier.gates > self._step.columns:
            raise AdapterError(
                "unsupported_feature", "the classifier gives a token more gates than this server"
                " has room for", seen=classifier.gates, limit=f"max_gates {self._step.columns}",
                fix="start the server with --additional-config "
                f"'{{\"lora_ext\": {{\"two_pass\": true, \"max_gates\": {classifier.gates}}}}}'",
            )  # fmt: skip
        if classifier.frozen:
            logger.warning(
                "vllm-lora-ext: the gates of an X-LoRA are frozen where a prompt ends, as its"
                " routing.json says: an approximation, whose answers are not the exact adapter's"
            )

    def load(self, slot: int, classifier: Classifier | None) -> None:
        """What gives the gates of a slot's adapter; None: nothing does."""
        if classifier is None:
            self._classifiers.pop(slot, None)
        else:
            device = self._step.device
            self._classifiers[slot] = classifier.map(lambda t: t.to(device, non_blocking=True))

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        slots = self._step.slots & self._classifiers.keys()
        if not slots:
            return
        context = get_forward_context() if is_forward_context_available() else None
        if context is None or not context.attn_metadata:
            return  # a dummy run
        frozen = {slot for slot in slots if self._classifiers[slot].frozen}
        if frozen != slots or not self._frozen.known(slots):
            self._first_pass(context, model, args, kwargs)
            for slot in frozen:
                self._frozen.keep(slot, self._classifiers[slot].gates)
        if frozen:
            self._frozen.fill(frozen)

    def _first_pass(
        self, context: ForwardContext, model: nn.Module, args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:  # fmt: skip
        with (
            self._step.without_adapters(),
            self._rows.first_pass(),
            override_forward_context(self._with_twins(context)),
        ):
            hidden_TK = model.forward(*args, **kwargs)
        if isinstance(hidden_TK, tuple):  # beside it, what a drafter reads
            hidden_TK = hidden_TK[0]
        self._fill(hidden_TK)

    def _with_twins(self, context: ForwardContext) -> ForwardContext:
        def through(table: Mapping[str, Any]) -> dict[str, Any]:
            own = {n: table[t.layer_name] for n, t in self._twins.items() if t.layer_name in table}
            return {**table, **own}

        return replace(
            context, no_compile_layers={**context.no_compile_layers, **self._twins},
            attn_metadata=through(context.attn_metadata),
            slot_mapping=through(context.slot_mapping),
        )  # fmt: skip

    def _fill(self, hidden_TK: torch.Tensor) -> None:
        for slot, start, stop, index_T in self._step.groups:
            classifier = self._classifiers.get(slot)
            if classifier is None:
                continue
            table_TC = self._step.rows_TC[:, : classifier.gates]
            if index_T is None:
                table_TC[start:stop] = classifier.gates_of(hidden_TK[start:stop])
            else:
                table_TC.index_copy_(0, index_T, classifier.gates_of(hidden_TK[index_T]))


def _twin(layer: Attention) -> Attention:
    """The same layer with a KV cache of its own, which is bound when vLLM has made it."""
    twin = copy.copy(layer)
    twin.impl = copy.copy(layer.impl)  # some keep scales of what is in the cache
    twin.layer_name = f"{layer.layer_name}.{TWIN}"
    twin.kv_cache = torch.tensor([])
    return twin


def _attentions(model: nn.Module) -> list[Attention]:
    """Of the model itself, not of a drafter that stands beside it in vLLM's table."""
    kept: list[Any] = [layer for layer in model.modules() if isinstance(layer, AttentionLayerBase)]
    other = [
        f"{layer.layer_name}: {type(layer).__name__}" for layer in kept
        if type(layer) is not Attention
        or layer.attn_type != AttentionType.DECODER
        or layer.kv_sharing_target_layer_name is not None
    ]  # fmt: skip
    if other or not kept:
        raise _not_served(
            "keeps something else than keys and values of its own in each attention layer",
            other[:1], "decoders whose layers all have a KV cache of their own",
        )  # fmt: skip
    if type(model).__call__ is not nn.Module.__call__:
        raise _not_served(
            "is compiled as a whole, so that it cannot be run twice in a step",
            type(model).__name__, "models of vLLM's own, whose inner part is compiled",
        )  # fmt: skip
    return kept


def _not_served(why: str, seen: object, limit: str) -> AdapterError:
    return AdapterError(
        "bad_settings", f"the setting two_pass is true, and this model {why}", seen=seen or "none",
        limit=limit, fix="leave the setting two_pass out, and serve no X-LoRA",
    )  # fmt: skip


def apply() -> None:
    """Nothing at start: an engine with the setting makes its own."""
