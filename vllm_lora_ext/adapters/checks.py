"""Checks of a RoutedAdapter: of itself, and against the model that is to serve it.

Both run before a tensor reaches a slot: one NaN there would poison the KV cache of every request.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches

import torch

from vllm_lora_ext.adapters.blocks import activation
from vllm_lora_ext.adapters.classifier import check_classifier
from vllm_lora_ext.adapters.finite import is_finite, not_finite
from vllm_lora_ext.adapters.limits import RANKS, slot_rank
from vllm_lora_ext.adapters.model import LowRank, MixBlock, RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.parts import check_parts
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.routing import GateSpec
from vllm_lora_ext.routing.spec import GIVEN, ROUTED

# Linears of an MLP block on which experts may stand, by how the model spells its block.
BLOCK_PARTS = (
    frozenset({"gate_proj", "up_proj", "down_proj"}),
    frozenset({"gate_up_proj", "down_proj"}),
    frozenset({"fc1", "fc2"}),
)
# Layers that guess tokens ahead. Models that are served without them may have adapters on them.
DRAFTERS = ("mtp.",)
_NUMBER = re.compile(r"\.(\d+)(?=\.|$)")


def check_adapter(adapter: RoutedAdapter) -> None:
    """What must hold of any adapter, whatever the model.

    Raises:
        AdapterError: `empty_adapter`, `bad_shape`, `rank_mismatch`, `missing_tensor`,
            `unexpected_tensor`, `not_finite`, `unsupported_feature`, `bad_value`.
    """
    made = adapter.template.sizes if adapter.template is not None else {}
    if not (adapter.modules or adapter.blocks or adapter.heads or adapter.experts or made):
        raise AdapterError(
            "empty_adapter", "the adapter adapts no layer at all", fix="save the adapter again"
        )
    for name, module in adapter.modules.items():
        _check_matrices(name, module)
        _check_gate_tensors(name, module)
        _check_columns(name, module, adapter)
        _check_magnitude(name, module)
        _check_finite(name, module)
    for name, block in adapter.blocks.items():
        _check_block(name, block)
    check_parts(adapter)
    if adapter.classifier is not None:
        check_classifier(adapter.classifier)
    twice = sorted(set(adapter.modules) & set(_block_parts(adapter)))
    if twice:
        raise AdapterError(
            "duplicate_tensor", "a layer is adapted both by itself and in its MLP block",
            seen=twice[0], fix="keep one of them",
        )  # fmt: skip


def check_fits(
    adapter: RoutedAdapter,
    shapes: Mapping[str, tuple[int, int]],
    dtype: torch.dtype,
    max_rank: int | None = None,
    max_router_rows: int | None = None,
    base_name: str = "",
) -> None:
    """What must hold for this model and this server to serve the adapter.

    Args:
        shapes: module name → (in, out) of every layer of the model that can be adapted.
        dtype: in which A and B will be stored.
        max_rank: the server's `--max-lora-rank`.
        max_router_rows: rows that a slot keeps for routers; a threshold head has one more.
        base_name: name or path of the served model.
    Raises:
        AdapterError: `wrong_base`, `unknown_module`, `shape_mismatch`, `rank_too_large`,
            `router_too_large`, `overflow`.
    """
    adapted = {name: _sizes(layer) for name, layer in _layers(adapter).items()}
    if adapter.template is not None:
        adapted |= adapter.template.sizes
    wrong = [name for name, sizes in adapted.items() if shapes.get(name) != sizes]
    trained_on, served = _last_part(adapter.base_model), _last_part(base_name)
    if trained_on and served and trained_on != served and 2 * len(wrong) > len(adapted):
        raise AdapterError(
            "wrong_base",
            f"the adapter was made for '{trained_on}', this server runs '{served}': {len(wrong)} of"
            f" {len(adapted)} adapted layers do not fit, for example {min(wrong)}",
            fix=f"serve it with '{trained_on}'",
        )
    if wrong:
        raise _misfit(wrong[0], adapted[wrong[0]], shapes)
    for name, block in adapter.blocks.items():
        _check_router_width(name, block, shapes)
    every: dict[str, RoutedModule | MixBlock] = {**adapter.modules, **adapter.blocks}
    needs = {name: (gated.rank, gated.gate.router_rows) for name, gated in every.items()}
    if adapter.template is not None:
        made = adapter.template.rank, adapter.template.router_rows
        needs |= dict.fromkeys(adapter.template.sizes, made)
    for name, (rank, rows) in needs.items():
        _check_limits(name, rank, rows, max_rank, max_router_rows)
    check_overflow(adapter, dtype)


def check_overflow(adapter: RoutedAdapter, dtype: torch.dtype) -> None:
    """That `dtype` can hold A and B: what it cannot, it would make infinite.

    Raises:
        AdapterError: `overflow`.
    """
    largest = torch.finfo(dtype).max
    for name, layer in _layers(adapter).items():
        for what, tensor in (("A", layer.a_RK), ("B times its scale", layer.b_NR)):
            seen = float(tensor.abs().max())
            if seen > largest:
                raise AdapterError(
                    "overflow", f"{what} of {name} has values too large for {dtype}", seen=seen,
                    limit=largest, fix="choose bfloat16 or float32 (--dtype)",
                )  # fmt: skip


def without_drafter(
    adapter: RoutedAdapter, has: Collection[str], skip_prefixes: Iterable[str] = ()
) -> RoutedAdapter:
    """The adapter without layers of a drafter that the served model leaves out.

    Args:
        has: names of the layers that the model has, as the adapter names them; they always stay.
        skip_prefixes: vLLM's `lora_skip_prefixes` of the model, beside `DRAFTERS`.
    Raises:
        AdapterError: `empty_adapter`, nothing else is adapted.
    """
    prefixes = {*DRAFTERS, *skip_prefixes}

    def stays(name: str, *layers: str) -> bool:
        mine = not any(f"{name}.".startswith(p) or f".{p}" in f"{name}." for p in prefixes)
        return mine or any(layer in has for layer in layers)

    modules = {n: m for n, m in adapter.modules.items() if stays(n, n)}
    parts = {n: [f"{n}.{part}" for part in block.parts] for n, block in adapter.blocks.items()}
    blocks = {n: b for n, b in adapter.blocks.items() if stays(n, *parts[n])}
    experts = {n: e for n, e in adapter.experts.items() if stays(n, n)}
    kept = len(modules) + len(blocks) + len(experts)
    if kept == len(adapter.modules) + len(adapter.blocks) + len(adapter.experts):
        return adapter
    if not kept and not adapter.heads:
        raise AdapterError(
            "empty_adapter", "the adapter only adapts a drafter, which this model leaves out",
            seen=[*adapter.modules, *adapter.blocks][:4], fix="serve the adapter of the model",
        )  # fmt: skip
    return replace(adapter, modules=modules, blocks=blocks, experts=experts)


def _check_matrices(name: str, module: RoutedModule) -> None:
    a, b = module.a_RK, module.b_NR
    for letter, matrix in (("A", a), ("B", b)):
        if matrix.ndim != 2 or 0 in matrix.shape:
            raise AdapterError(
                "bad_shape", f"{letter} of {name} must be a matrix of rank >= 1",
                seen=list(matrix.shape), limit="[R, in] for A, [out, R] for B, none of them 0",
                fix="save the adapter again",
            )  # fmt: skip
    gate = module.gate
    # Experts that share one A: each block of B goes with all rows of A.
    shared = gate.source in ("router", "prototype") and set(gate.blocks) == {a.shape[0]}
    if a.shape[0] != b.shape[1] and not shared:
        raise AdapterError(
            "rank_mismatch", f"A and B of {name} disagree on the rank",
            seen=f"A {list(a.shape)}, B {list(b.shape)}", limit="A [R, in], B [out, R]",
            fix="save the adapter again",
        )  # fmt: skip
    if gate.source != "none" and sum(gate.blocks) != b.shape[1]:
        raise AdapterError(
            "rank_mismatch", f"the gate of {name} covers another number of ranks than B has",
            seen=f"blocks sum to {sum(gate.blocks)}", limit=f"{b.shape[1]}, the columns of B",
            fix="mend the gate's blocks",
        )  # fmt: skip
    if gate.source not in ("none", "classifier") and module.kind == "embedding":
        raise AdapterError(
            "unsupported_feature", f"{name} is an embedding with a gate", seen=gate.source,
            limit="plain LoRA on embeddings", fix="leave the embedding without a gate",
        )  # fmt: skip


def _check_gate_tensors(name: str, module: RoutedModule) -> None:
    gate, width = module.gate, module.a_RK.shape[1]
    routed = gate.source in ROUTED
    wanted: tuple[tuple[str, torch.Tensor | None, bool, list[int]], ...] = (
        ("router", module.router_GK, routed, [gate.num_gates, width]),
        ("bias", module.bias_G, gate.bias != "none", [gate.num_gates]),
        ("threshold head", module.head_K, gate.threshold_head, [width]),
        (
            "attention",
            module.attention_PR,
            gate.source == "attention",
            [3 * module.rank, module.rank],
        ),
        *_norm_tensors(module),
    )
    for what, tensor, needed, shape in wanted:
        if tensor is None and needed:
            raise AdapterError(
                "missing_tensor", f"{name} has no {what}, its gate needs one", limit=shape,
                fix="save the adapter again",
            )  # fmt: skip
        if tensor is not None and not needed:
            raise AdapterError(
                "unexpected_tensor", f"{name} has a {what} that its gate does not use",
                seen=list(tensor.shape), fix="mend the gate, or remove the tensor",
            )  # fmt: skip
        if tensor is not None and list(tensor.shape) != shape:
            raise AdapterError(
                "bad_shape", f"the {what} of {name} has the wrong shape", seen=list(tensor.shape),
                limit=shape, fix="save the adapter again",
            )  # fmt: skip


def _norm_tensors(
    module: RoutedModule,
) -> list[tuple[str, torch.Tensor | None, bool, list[int]]]:
    """What belongs to a router that reads a normalised input, and the bias of any router."""
    gate, norm = module.gate, module.norm
    shape = [gate.num_gates]
    sums = None if norm is None else norm.row_sums_G
    found = [("input norm", sums, gate.normalise != "none", shape)]
    if norm is not None and norm.tail_G is not None:
        found.append(("input norm's constant part", norm.tail_G, True, shape))
    if module.logit_bias_G is not None:
        found.append(("logit bias", module.logit_bias_G, gate.source in ROUTED, shape))
    return found


def _check_columns(name: str, module: RoutedModule, adapter: RoutedAdapter) -> None:
    """Gates that come with each row: which one reads what is the adapter's to say."""
    gate, columns = module.gate, adapter.columns
    if gate.source == "classifier":
        _check_classified(name, module, adapter)
    elif gate.source in GIVEN and (gate.num_gates != len(columns) or module.row_start):
        raise AdapterError(
            "bad_gate", f"the gates of {name} come with each row, and the adapter's columns are not"
            " as many", seen=f"{gate.num_gates} gates, {len(columns)} columns",
            limit="one column per gate", fix="mend the adapter's columns, or the gate's blocks",
        )  # fmt: skip


def _check_classified(name: str, module: RoutedModule, adapter: RoutedAdapter) -> None:
    """Gates that a classifier gives are taken as they are: it has selected already."""
    gate, has = module.gate, adapter.classifier.gates if adapter.classifier is not None else 0
    wanted = range(module.row_start, module.row_start + gate.num_gates)
    if module.row_start < 0 or wanted.stop > has or adapter.columns:
        raise AdapterError(
            "bad_gate", f"the gates of {name} come from a classifier that does not give them",
            seen=f"gates {wanted.start} to {wanted.stop - 1}", limit=f"{has} gates, no columns",
            fix="save the adapter again",
        )  # fmt: skip
    if gate != GateSpec("classifier", blocks=gate.blocks):
        raise AdapterError(
            "bad_gate", f"the gate of {name} does more than to take what a classifier gives",
            seen=gate.to_dict(), limit="source and blocks", fix="leave it to the classifier",
        )  # fmt: skip


def _check_magnitude(name: str, module: RoutedModule) -> None:
    """DoRA's norm is that of all that a layer adds, which may hang on nothing else."""
    magnitude_N, out = module.magnitude_N, module.b_NR.shape[0]
    if magnitude_N is None:
        return
    if module.gate.source != "none" or module.kind != "linear":
        raise AdapterError(
            "unsupported_feature", f"{name} has DoRA's magnitudes and is no ordinary LoRA of a"
            " linear layer", seen=module.gate.source if module.kind == "linear" else module.kind,
            limit="linear layers without a gate", fix="train it without DoRA",
        )  # fmt: skip
    if list(magnitude_N.shape) != [out]:
        raise AdapterError(
            "bad_shape", f"the magnitudes of {name} have the wrong shape",
            seen=list(magnitude_N.shape), limit=[out], fix="save the adapter again",
        )  # fmt: skip


def _check_finite(name: str, module: RoutedModule) -> None:
    tensors = {
        "A": module.a_RK, "B times its scale": module.b_NR, "router": module.router_GK,
        "bias": module.bias_G, "threshold head": module.head_K,
        "threshold head's bias": torch.tensor(module.head_bias),
        "logit bias": module.logit_bias_G, "magnitude": module.magnitude_N,
        "attention": module.attention_PR,
    }  # fmt: skip
    if module.norm is not None:
        norm = module.norm
        tensors |= {
            "input norm": norm.row_sums_G, "input norm's constant part": norm.tail_G,
            "input norm's sums": torch.tensor([norm.tail_sum, norm.tail_squares]),
        }  # fmt: skip
    _refuse_not_finite(name, tensors)


def _refuse_not_finite(name: str, tensors: Mapping[str, torch.Tensor | None]) -> None:
    for what, tensor in tensors.items():
        if tensor is not None and not is_finite(tensor):
            raise not_finite(f"{what} of {name}", tensor)


def _check_block(name: str, block: MixBlock) -> None:
    gate = block.gate
    plain = gate.bias == gate.normalise == "none" and not (gate.threshold_head or gate.product)
    if gate.source != "router" or not plain:
        raise AdapterError(
            "unsupported_feature", f"the MLP block {name} has a gate that blocks do not have",
            seen=gate.to_dict(), limit="a router without bias, threshold head, normalised input and"
            " product", fix="use experts of single layers",
        )  # fmt: skip
    names = set(block.parts)
    if not names or not any(names <= known for known in BLOCK_PARTS):
        raise AdapterError(
            "unsupported_feature", f"the experts of the MLP block {name} stand on unknown layers",
            seen=sorted(names), limit=[", ".join(sorted(known)) for known in BLOCK_PARTS],
            fix="check which system the adapter is of",
        )  # fmt: skip
    if block.act is not None:
        activation(block.act)  # raises when there is none of that name
    router = block.router_GK
    if router.ndim != 2 or router.shape[0] != gate.num_gates:
        raise AdapterError(
            "bad_shape", f"the router of {name} has the wrong shape", seen=list(router.shape),
            limit=f"[{gate.num_gates}, in]", fix="save the adapter again",
        )  # fmt: skip
    for part, m in block.parts.items():
        a, b = m.a_RK, m.b_NR
        wanted = a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] == block.rank
        if not wanted or 0 in (*a.shape, *b.shape):
            raise AdapterError(
                "rank_mismatch", f"A and B of {name}.{part} do not have the experts' ranks",
                seen=f"A {list(a.shape)}, B {list(b.shape)}",
                limit=f"A [{block.rank}, in], B [out, {block.rank}]", fix="save the adapter again",
            )  # fmt: skip
        _refuse_not_finite(f"{name}.{part}", {"A": a, "B times its scale": b})
    _refuse_not_finite(name, {"router": router})


def _check_router_width(name: str, block: MixBlock, shapes: Mapping[str, tuple[int, int]]) -> None:
    """The router reads what the block's first linear reads, adapted or not."""
    first = (f"{name}.{part}" for part in ("gate_proj", "up_proj", "gate_up_proj", "fc1"))
    width = next((shapes[layer][0] for layer in first if layer in shapes), None)
    if width != block.router_GK.shape[1]:
        raise AdapterError(
            "shape_mismatch", f"the router of {name} does not fit the model",
            seen=list(block.router_GK.shape),
            limit="no such block" if width is None else f"[experts, {width}]",
            fix="serve it with the model it was trained on",
        )  # fmt: skip


def _layers(adapter: RoutedAdapter) -> dict[str, RoutedModule | LowRank]:
    return {**adapter.modules, **_block_parts(adapter)}


def _block_parts(adapter: RoutedAdapter) -> dict[str, LowRank]:
    return {f"{n}.{p}": m for n, b in adapter.blocks.items() for p, m in b.parts.items()}


def _sizes(module: RoutedModule | LowRank) -> tuple[int, int]:
    return module.a_RK.shape[1], module.b_NR.shape[0]


def _misfit(
    name: str, seen: tuple[int, int], shapes: Mapping[str, tuple[int, int]]
) -> AdapterError:
    if name not in shapes:
        return AdapterError(
            "unknown_module", "the adapter adapts a layer that this model does not have, or that"
            " cannot be adapted", seen=name, limit=_like(name, shapes),
            fix="serve it with the model it was trained on",
        )  # fmt: skip
    return AdapterError(
        "shape_mismatch", f"{name} has other sizes in the adapter than in the model",
        seen=f"in {seen[0]}, out {seen[1]}",
        limit=f"in {shapes[name][0]}, out {shapes[name][1]}",
        fix="serve it with the model it was trained on",
    )  # fmt: skip


def _check_limits(
    name: str, rank: int, rows: int, max_rank: int | None, max_router_rows: int | None
) -> None:
    if max_rank is not None and rank > max_rank:
        enough = slot_rank(rank)
        raise AdapterError(
            "rank_too_large", f"the experts of {name} together have too large a rank",
            seen=rank, limit=f"--max-lora-rank {max_rank}",
            fix=f"start the server with --max-lora-rank {enough}" if enough
            else f"serve fewer experts: vLLM stops at rank {RANKS[-1]}",
        )  # fmt: skip
    if max_router_rows is not None and rows > max_router_rows:
        raise AdapterError(
            "router_too_large", f"the router of {name} has too many rows", seen=rows,
            limit=f"max_router_rows {max_router_rows}",
            fix="start the server with --additional-config "
            f"'{{\"lora_ext\": {{\"max_router_rows\": {rows}}}}}'",
        )  # fmt: skip


def _like(name: str, has: Collection[str]) -> str:
    """The layers that a model has, by kind: those that look most like `name`."""
    if not has:
        return "the model has no layer that an adapter can be put on"
    kinds: dict[str, list[int]] = {}
    for layer in has:
        numbers = kinds.setdefault(_NUMBER.sub(".*", layer), [])
        numbers += [int(number) for number in _NUMBER.findall(layer)[:1]]
    near = get_close_matches(_NUMBER.sub(".*", name), kinds, n=4, cutoff=0.0)
    shown = [
        f"{kind} ({min(kinds[kind])} to {max(kinds[kind])})" if kinds[kind] else kind
        for kind in near
    ]
    return f"{len(has)} layers, among them {', '.join(shown)}"


def _last_part(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1]
