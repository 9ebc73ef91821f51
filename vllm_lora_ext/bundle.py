"""Ordinary adapters and a router, bundled into one routed adapter.

    y = W x + sum_e g_e(x) · s_e B_e A_e x

The experts were trained apart, each alone. What chooses among them is given (`Given`: routers that
were trained over them), made of the experts themselves (`Arrow`), constant (`Uniform`) or said by
each request (`ByRequest`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vllm_lora_ext.adapters import (
    AdapterFolder,
    RoutedAdapter,
    check_adapter,
    load_adapter,
)
from vllm_lora_ext.adapters.dora import refuse_dora
from vllm_lora_ext.adapters.readers import plain
from vllm_lora_ext.adapters.readers.peft_config import bad_value
from vllm_lora_ext.adapters.registry import find_reader
from vllm_lora_ext.conditions.column import Column
from vllm_lora_ext.convert import check_output, native_copy, write_record
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.routed import one_base, same_sizes
from vllm_lora_ext.merging.routers import (
    Arrow,
    ByRequest,
    Given,
    Router,
    Share,
    Uniform,
    read_router,
)

__all__ = [
    "Arrow", "ByRequest", "Expert", "Given", "Uniform", "bundle", "lacking", "read_expert",
    "read_router", "write_bundle",
]  # fmt: skip


@dataclass(frozen=True)
class Expert:
    """An ordinary adapter that is to be one of several experts.

    Args:
        name: for messages.
        parts: module → its share.
        source, digest: the folder, and the sha256 over what was read there.
    """

    name: str
    parts: dict[str, Share] = field(repr=False)
    base_model: str = ""
    source: str = ""
    digest: str = ""


def read_expert(name: str, folder: str | os.PathLike[str]) -> Expert:
    """An adapter without gates, of any format that can be read.

    Raises:
        AdapterError: what reading an adapter raises, with the expert's name in front;
            `unsupported_feature`, it is routed itself or adapts an embedding.
    """
    try:
        return _read_expert(name, folder)
    except AdapterError as error:
        text = f"expert '{name}': {error.text}"
        raise AdapterError.parse(f"[lora_ext:{error.code}] {text} [/lora_ext]") or error from error


def bundle(experts: Sequence[Expert], router: Router) -> RoutedAdapter:
    """One routed adapter of all experts, in their order.

    An expert that does not adapt a layer of another adds nothing there, and can still be chosen:
    it gets one rank of zeros. See `lacking`.

    Returns:
        The checked adapter, with every scale folded into B.
    Raises:
        AdapterError: `empty_adapter`, `bad_value` (two experts of one name), `setting_mismatch`
            (base models, number of experts), `shape_mismatch`, and what the router raises.
    """
    if not experts:
        raise AdapterError("empty_adapter", "there is no expert to bundle", fix="name one or more")
    names = [expert.name for expert in experts]
    if len(set(names)) < len(names):
        raise bad_value("the experts' names", names, "a name of its own for each")
    base = one_base(expert.base_model for expert in experts)
    modules = list(dict.fromkeys(module for expert in experts for module in expert.parts))
    router.check(len(experts), modules)
    layers = {name: router.layer(name, _shares(name, experts)) for name in modules}
    # What a request does not name is not there: without a word it is the base model's.
    by_request = any(layer.gate.source == "request" for layer in layers.values())
    adapter = RoutedAdapter(
        layers, system=router.system, base_model=base,
        columns=tuple(Column(scale=0.0, expert=n) for n in names) if by_request else (),
    )  # fmt: skip
    check_adapter(adapter)
    return adapter


def lacking(experts: Sequence[Expert]) -> dict[str, list[str]]:
    """Expert → layers that others adapt and it does not; those that lack none are left out."""
    every = dict.fromkeys(module for expert in experts for module in expert.parts)
    gone = {e.name: [module for module in every if module not in e.parts] for e in experts}
    return {name: modules for name, modules in gone.items() if modules}


def write_bundle(
    adapter: RoutedAdapter,
    out: str | os.PathLike[str],
    record: Mapping[str, Any],
    sources: Sequence[str | os.PathLike[str]],
    dtype: str = "float32",
    force: bool = False,
    step: Callable[[str], None] = lambda text: None,
) -> RoutedAdapter:
    """Write an adapter in the native format, whole or not at all, and read it back.

    Args:
        out: a new folder, an empty one, or an earlier result, which is replaced.
        record: goes into `conversion.json`: what the folder was made of.
        sources: one or more, what was read; `out` must be none of these folders.
        dtype: of A and B; routers stay as they are.
        force: put whatever else `out` holds aside, as `out.old`.
        step: told what begins, three times.
    Returns:
        What is in `out`.
    Raises:
        AdapterError: `output_exists`, `output_failed`, `overflow`. `out` is then as it was.
    """
    place = check_output(out, sources, force)
    with native_copy(adapter, place, dtype, force, step) as (native, copy):
        write_record(native, {**record, "dtype": dtype, "out_digest": copy.digest})
    return replace(copy, source=os.fspath(out))


def _read_expert(name: str, path: str | os.PathLike[str]) -> Expert:
    folder = AdapterFolder(path)
    reader = find_reader(folder)
    if reader is plain.READER:  # PEFT makes its prototypes of B as it is stored
        config, pairs = plain.read_pairs(folder)
        base, digest = config.base_model, folder.finish()
        scales = {module: config.scale(module) for module in pairs}
    else:
        adapter = load_adapter(path)
        _refuse_routed(adapter)
        refuse_dora(adapter, "an expert of a mixture")
        pairs, base, digest = adapter.modules, adapter.base_model, adapter.digest
        scales = dict.fromkeys(pairs, 1.0)
    embedding = next((module for module, pair in pairs.items() if pair.kind != "linear"), None)
    if embedding:
        raise AdapterError(
            "unsupported_feature", "an expert may adapt linear layers only", seen=embedding,
            fix="train it without the embedding",
        )  # fmt: skip
    check_adapter(RoutedAdapter(pairs, system=reader.name))
    parts = {module: Share(pair.a_RK, pair.b_NR, scales[module]) for module, pair in pairs.items()}
    return Expert(name, parts, base, os.fspath(path), digest)


def _refuse_routed(adapter: RoutedAdapter) -> None:
    gated = [name for name, module in adapter.modules.items() if module.gate.source != "none"]
    gated += list(adapter.blocks)
    if adapter.template is not None:
        gated += list(adapter.template.sizes)
    if gated:
        raise AdapterError(
            "unsupported_feature", f"the adapter is routed itself ({adapter.system})",
            seen=gated[0], limit="adapters without gates",
            fix="put routed adapters side by side with concat_routed (bundle --routed)",
        )  # fmt: skip


def _shares(module: str, experts: Sequence[Expert]) -> list[Share]:
    """One part per expert; a zero one where it does not adapt the layer."""
    width, out = same_sizes(module, {e.name: e.parts[module] for e in experts if module in e.parts})
    nothing = Share(torch.zeros(1, width), torch.zeros(out, 1))
    return [expert.parts.get(module, nothing) for expert in experts]
