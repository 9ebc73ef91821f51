"""From what a request says to what it is sent with: an adapter, and its columns.

One adapter that is whole in all positions is that adapter itself. Everything else is a derived
adapter, which the workers make by a recipe: its id and name follow from the recipe, so equal
requests meet in one. The front ends drive these steps, each in its own way (`admission`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
from vllm.lora.request import LoRARequest

from vllm_lora_ext.conditions.column import Column
from vllm_lora_ext.conditions.recipe import Part, Recipe
from vllm_lora_ext.conditions.said import FIELD, Entry, Ids, Said, parse
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.admitted import Admitted, Understands
from vllm_lora_ext.model_patches.request_settled import Settled
from vllm_lora_ext.model_patches.request_steps import AskGate, Load, Steps, load_first
from vllm_lora_ext.settings import LoraExtSettings

TRIES = 8
"""Ids for one adapter: two may meet in one."""


@dataclass(frozen=True)
class _Use:
    """An adapter in a request."""

    entry: Entry
    lora: LoRARequest
    version: str
    understands: Understands


def said_by(engine: Any, value: object) -> Said:
    """What stands in the field of a request, checked for itself.

    Raises:
        AdapterError: `bad_value`.
    """
    config = engine.vllm_config
    settings = LoraExtSettings.from_additional_config(config.additional_config)
    said = parse(value, settings.max_request_adapters, settings.max_request_spans)
    said.check_positions(config.model_config.max_model_len)
    return said


def resolve(
    engine: Any, said: Said | None, lora: LoRARequest | None, message: str | None = None
) -> Steps[Settled]:
    """What a request is to be sent with.

    Args:
        engine: an `LLMEngine` or `AsyncLLM`; said: None where the request says nothing.
        lora: the adapter of its model; message: its last message of a user, which is the
            instruction where it says no other.
    Raises:
        AdapterError: what it says does not fit its adapters, or one of them cannot be had.
    """
    if engine.vllm_config.lora_config is None:
        if said is not None and said.model_copy(update={"trace": None}) != Said():
            raise no_adapters()
        return Settled(lora, trace=bool(said and said.trace))
    try:
        return (yield from _resolve(engine, said, lora, message, again=False))
    except AdapterError as error:
        if error.code != "adapter_changed":
            raise
    return (yield from _resolve(engine, said, lora, message, again=True))


def no_adapters() -> AdapterError:
    """The error of an engine without LoRA."""
    return AdapterError(
        "bad_settings", "this engine serves no adapters", fix="start it with LoRA enabled"
    )


def _resolve(
    engine: Any, said: Said | None, lora: LoRARequest | None, message: str | None, again: bool
) -> Steps[Settled]:
    admitted = Admitted.of(engine)
    if said is None:
        if lora is None:
            return Settled(None)
        (use,) = yield from _load(admitted, [(_entry_of(lora), lora)], again)
        if not use.understands.needs:
            return Settled(use.lora, use.version)
        said = Said()
    instruction = message or None if said.instruction is None else said.instruction
    uses = yield from _load(admitted, _named(admitted, said, lora), again)
    _check_used(said, uses)
    columns = [_own_columns(said, use, uses) for use in uses]
    _check_needed(said, uses)
    by_row = any(use.entry.by_token for use in uses)
    live = [(use, own) for use, own in zip(uses, columns, strict=True) if by_row or use.entry.scale]
    trace = bool(said.trace)
    if not live:
        return Settled(None, trace=trace)
    live.sort(key=lambda pair: pair[0].entry.name)  # equal sums are one adapter
    first = live[0][0]
    plain = len(live) == 1 and first.entry.scale == 1.0 and not by_row
    if plain and not first.understands.template:
        told = said.gates is not None or said.modality_spans is not None
        plan = _plan(said, live, by_row) if told else None
        return Settled(first.lora, first.version, plan, trace)
    recipe = yield from _recipe(engine, said.user, instruction, [u for u, _ in live], by_row)
    derived, made = yield from _derive(admitted, recipe)
    return Settled(derived, recipe.version, _plan(said, live, by_row), trace, made)


def _entry_of(lora: LoRARequest) -> Entry:
    return Entry.model_construct(name=lora.lora_name)


def _named(
    admitted: Admitted, said: Said, lora: LoRARequest | None
) -> list[tuple[Entry, LoRARequest]]:
    if said.adapters is None:
        return [] if lora is None else [(_entry_of(lora), lora)]
    if lora is not None:
        raise AdapterError(
            "bad_value", f"{FIELD}.adapters stands beside a model that is not the base model",
            seen=lora.lora_name, fix="name the base model, and this one among the adapters",
        )  # fmt: skip
    found = []
    for i, entry in enumerate(said.adapters):
        known = admitted.named(entry.name)
        if known is None:
            raise AdapterError(
                "bad_value", f"{FIELD}.adapters[{i}].name is no loaded adapter", seen=entry.name,
                fix="load it first, or mend its spelling",
            )  # fmt: skip
        found.append((entry, known))
    return found


def _load(
    admitted: Admitted, named: Iterable[tuple[Entry, LoRARequest]], again: bool
) -> Steps[list[_Use]]:
    uses = []
    for entry, lora in named:
        if again or admitted.needs_load(lora):
            yield Load(lora)
        lora = msgspec.structs.replace(lora, load_inplace=False) if lora.load_inplace else lora
        lora_id = lora.lora_int_id
        uses.append(_Use(entry, lora, admitted.version(lora_id), admitted.understands(lora_id)))
    return uses


def _check_used(said: Said, uses: list[_Use]) -> None:
    """Raises AdapterError for what no adapter of the request has a use for."""
    kinds = any(c.modalities for use in uses for c in use.understands.columns)
    for field, used in (
        ("user", any(use.understands.user is not None for use in uses)),
        ("gates", any(use.understands.experts for use in uses)),
        ("modality_spans", kinds or any(use.entry.modality for use in uses)),
        ("instruction", any(use.understands.instruction for use in uses)),
    ):
        if getattr(said, field) is not None and not used:
            raise AdapterError(
                "bad_value", f"{FIELD}.{field} has no use here: no adapter of the request"
                " understands it", seen=", ".join(use.entry.name for use in uses) or "no adapter",
                fix=f"leave {field} out",
            )  # fmt: skip


def _check_needed(said: Said, uses: list[_Use]) -> None:
    for use in uses:
        length = use.understands.user
        if length is not None and said.user is None:
            raise _missing("user", use, f"{length} numbers")
        if length is not None and said.user is not None and len(said.user) != length:
            raise AdapterError(
                "bad_value", f"{FIELD}.user is not of the length that {use.entry.name} needs",
                seen=len(said.user), limit=f"{length} numbers", fix="send the whole vector",
            )  # fmt: skip
    instructed = [use.entry.name for use in uses if use.understands.instruction]
    if len(instructed) > 1:
        raise AdapterError(
            "unsupported_feature", "several adapters of one request need an instruction",
            seen=", ".join(instructed), limit=1, fix="name one of them",
        )  # fmt: skip


def _missing(field: str, use: _Use, limit: str) -> AdapterError:
    return AdapterError(
        "bad_value", f"{FIELD}.{field} is missing: adapter {use.entry.name} needs it",
        limit=limit, fix=f"say {field} with the request",
    )  # fmt: skip


def _own_columns(said: Said, use: _Use, uses: list[_Use]) -> list[Column]:
    """The columns that the adapter has of its own, with the request's gates."""
    experts = use.understands.experts
    if not experts:
        return list(use.understands.columns)
    if said.gates is None:
        raise _missing("gates", use, ", ".join(experts))
    weights = _weights(said.gates, experts, [u for u in uses if u.understands.experts])
    return [
        replace(column, scale=weights.get(column.expert, 0.0)) if column.expert else column
        for column in use.understands.columns
    ]


def _weights(
    gates: Mapping[str, float], experts: tuple[str, ...], gated: list[_Use]
) -> dict[str, float]:
    """Expert → weight, of one adapter."""
    if len({use.entry.name for use in gated}) > 1:
        raise AdapterError(
            "unsupported_feature", "several adapters of one request need gates",
            seen=", ".join(use.entry.name for use in gated), limit=1, fix="name one of them",
        )  # fmt: skip
    found: dict[str, float] = {}
    for key, weight in gates.items():
        number = int(key) if key.isdecimal() and len(key) < 9 else len(experts)
        by_number = key not in experts and number < len(experts)
        name = experts[number] if by_number else key
        if name not in experts or name in found:
            twice = name in found
            raise AdapterError(
                "bad_value", f"{FIELD}.gates.{key[:80]} " + (
                    "is said twice, by name and by number" if twice
                    else f"is no expert of {gated[0].entry.name}"
                ), seen=key, limit=", ".join(experts) + f", or 0 to {len(experts) - 1}",
                fix="name each expert once",
            )  # fmt: skip
        found[name] = weight
    return found


def _plan(said: Said, live: list[tuple[_Use, list[Column]]], by_row: bool) -> dict[str, Any] | None:
    """What the request's parameters carry (`plan`): columns in the order of the slot's."""
    columns = []
    for use, own in live:
        if by_row:
            kinds = (use.entry.modality,) if use.entry.modality else ()
            columns.append(Column(use.entry.scale, use.entry.spans, kinds))
        columns += own
    if not columns:
        return None
    plan: dict[str, Any] = {"columns": [column.to_dict() for column in columns]}
    if said.modality_spans:
        spans = said.modality_spans.items()
        plan["modality_spans"] = {name: [list(span) for span in of] for name, of in spans}
    return plan


def _recipe(
    engine: Any,
    said_user: tuple[float, ...] | None,
    instruction: str | Ids | None,
    uses: list[_Use],
    by_row: bool,
) -> Steps[Recipe]:
    parts = tuple(
        Part(
            use.entry.name, use.lora.lora_int_id, use.lora.lora_path, use.version,
            1.0 if by_row else use.entry.scale,
        )
        for use in uses
    )  # fmt: skip
    user, gate = None, None
    if said_user is not None and any(use.understands.user is not None for use in uses):
        user = tuple(np.asarray(said_user, dtype=np.float32).tolist())
    for use in uses:
        if use.understands.instruction:
            gate = yield from _gate(engine, use, _ids(engine, instruction, use))
    return Recipe(parts, by_row, user, gate=gate)


def _ids(engine: Any, text: str | Ids | None, use: _Use) -> tuple[int, ...]:
    """What the gate is computed from: of a text, it alone and in quotation marks."""
    if isinstance(text, Ids):
        vocabulary = engine.vllm_config.model_config.get_vocab_size()
        if max(text.ids) >= vocabulary:
            raise AdapterError(
                "bad_value", f"{FIELD}.instruction.ids are no tokens of the model",
                seen=max(text.ids), limit=f"below {vocabulary}", fix="send the model's own ids",
            )  # fmt: skip
        return text.ids
    if text is None:
        raise _missing("instruction", use, 'a text, or {"ids": [...]}')
    tokenizer = engine.renderer.tokenizer
    if tokenizer is None:
        raise AdapterError(
            "bad_value", f"{FIELD}.instruction is a text, and this engine has no tokenizer",
            fix='send it as {"ids": [...]}',
        )  # fmt: skip
    return tuple(tokenizer.encode(f'"{text}"', add_special_tokens=False))


def _gate(engine: Any, use: _Use, ids: tuple[int, ...]) -> Steps[str]:
    admitted = Admitted.of(engine)
    most = engine.vllm_config.model_config.max_model_len
    if len(ids) > most:
        raise AdapterError(
            "bad_value", f"{FIELD}.instruction is longer than the model's context",
            seen=len(ids), limit=f"max_model_len {most}", fix="shorten it",
        )  # fmt: skip
    gate = admitted.gate(use.version, ids)
    if gate is None:
        gate = yield AskGate(use.lora, use.version, ids)
        admitted.keep_gate(use.version, ids, gate)
    return gate


def _derive(admitted: Admitted, recipe: Recipe) -> Steps[tuple[LoRARequest, bool]]:
    """The adapter of a recipe, and whether it was made for this request."""
    path = recipe.path()
    loras = [LoRARequest(recipe.name, recipe.lora_id(i), path) for i in range(TRIES)]
    known = next((lora for lora in loras if not admitted.needs_load(lora)), None)
    if known is not None:
        return known, False
    derived = yield from load_first(loras)
    return derived, True
