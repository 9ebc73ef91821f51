"""An adapter in a transformers model: slow and obviously right, to compare a server with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import nn

from vllm_lora_ext import routing
from vllm_lora_ext.adapters.blocks import activation
from vllm_lora_ext.adapters.checks import BLOCK_PARTS, check_fits
from vllm_lora_ext.adapters.classifier import Classifier
from vllm_lora_ext.adapters.dora import rescaled
from vllm_lora_ext.adapters.model import MixBlock, RoutedAdapter, RoutedModule
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.routing.mix import mix_reference


class AppliedAdapter:
    """Hooks that add an adapter to a model; leaving the `with` block, or `remove`, takes it off."""

    def __init__(self, handles: list[torch.utils.hooks.RemovableHandle], rows: _Rows) -> None:
        self._handles, self._rows = handles, rows

    @property
    def away(self) -> bool:
        """Whether the model runs without it at the moment, for its gates."""
        return self._rows.away

    def rows_of(self, module: RoutedModule) -> torch.Tensor | None:
        """[T, G] the numbers that a module's gate reads in this call; None: none come."""
        return self._rows.of(module)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> AppliedAdapter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.remove()


def apply_adapter(
    hf_model: nn.Module,
    adapter: RoutedAdapter,
    rows_TC: torch.Tensor | None = None,
    prompt_length: int | None = None,
) -> AppliedAdapter:
    """Add `B (g(x) ⊙ (A x))` to every adapted layer of a transformers model, in fp32; rescale
    its own output before, where the adapter is a DoRA.

    An adapter with a classifier (X-LoRA) has every call of the model run twice, and raises
    `unsupported_feature` at a call that goes on from a KV cache: it would need two of them.

    Args:
        hf_model: its `nn.Linear` and `nn.Embedding` layers go by the adapter's module names.
        rows_TC: values of the adapter's columns at every token of the calls to come, [T, C].
        prompt_length: how many tokens of every sequence in the calls to come are its prompt; only
            gates that are frozen there ask.
    Raises:
        AdapterError: `unknown_module`, `shape_mismatch`, `wrong_base`; `unsupported_feature`, also
            of an adapter whose columns or template need what is not given here.
    """
    classifier = adapter.classifier
    unknown_end = classifier is not None and classifier.frozen and prompt_length is None
    if adapter.template is not None or (adapter.columns and rows_TC is None) or unknown_end:
        raise AdapterError(
            "unsupported_feature", "what the adapter adds depends on the request, not on its"
            " weights and the hidden states alone", seen=adapter.system,
            limit="adapters that act on every token alike",
            fix="give rows_TC or prompt_length, derive it from its template, or ask the server",
        )  # fmt: skip
    check_fits(adapter, model_shapes(hf_model), torch.float32)
    handles = []
    rows = _Rows(rows_TC)
    if classifier is not None:
        device = next(hf_model.parameters()).device
        before = _first_pass(classifier.map(lambda t: t.to(device)), rows, prompt_length)
        handles.append(hf_model.register_forward_pre_hook(before, with_kwargs=True))
    for name, block in adapter.blocks.items():
        mlp = hf_model.get_submodule(name)
        handles.append(mlp.register_forward_hook(_block_hook(name, block, mlp)))
    for name, module in adapter.modules.items():
        layer = hf_model.get_submodule(name)
        moved = _rescaled(name, _to(module, layer), layer)
        handles.append(layer.register_forward_hook(_hook(moved, rows)))
    return AppliedAdapter(handles, rows)


@dataclass
class _Rows:
    """The numbers that come with each token of a call; whether the adapter is away meanwhile."""

    values_TC: torch.Tensor | None
    away: bool = False

    def of(self, module: RoutedModule) -> torch.Tensor | None:
        """Those that a module's gate reads."""
        if self.values_TC is None:
            return None
        return self.values_TC[:, module.row_start : module.row_start + module.gate.columns]


def _first_pass(classifier: Classifier, rows: _Rows, prompt_length: int | None) -> Any:
    """Before the model runs with the adapter, it runs without, for the gates."""
    end = prompt_length if classifier.frozen else None

    def before(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if rows.away:
            return
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            raise AdapterError(
                "unsupported_feature", "the adapter's gates come from a pass without it, which has"
                " no KV cache of its own here", seen=f"{cache.get_seq_length()} cached tokens",
                limit="whole sequences", fix="call or generate with use_cache=False",
            )  # fmt: skip
        rows.away = True
        try:
            asked = {"output_hidden_states": True, "return_dict": True, "use_cache": False}
            hidden_BTK = model(*args, **kwargs | asked).hidden_states[-1]
        finally:
            rows.away = False
        gates_BTG = classifier.gates_of(hidden_BTK.flatten(0, -2)).unflatten(
            0, hidden_BTK.shape[:-1]
        )
        if end is not None:
            gates_BTG[:, end:] = gates_BTG[:, end - 1 : end]
        rows.values_TC = gates_BTG.flatten(0, 1)

    return before


def model_shapes(hf_model: nn.Module) -> dict[str, tuple[int, int]]:
    """Module name → (in, out) of every linear and embedding; an embedding's `in` is its rows."""
    shapes = {}
    for name, layer in hf_model.named_modules():
        if isinstance(layer, nn.Linear):
            shapes[name] = (layer.in_features, layer.out_features)
        elif type(layer).__name__ == "Conv1D":  # GPT-2's linear, its weight [in, out]
            shapes[name] = (layer.weight.shape[0], layer.weight.shape[1])
        elif isinstance(layer, nn.Embedding):
            shapes[name] = (layer.num_embeddings, layer.embedding_dim)
    return shapes


def delta_reference(
    module: RoutedModule, x_TK: torch.Tensor, rows_TG: torch.Tensor | None = None
) -> torch.Tensor:
    """What an adapted layer adds to its output.

    Args:
        x_TK: [T, in] inputs; [T] token ids for an embedding.
        rows_TG: [T, G] the numbers that come with each token for its gate, where it reads some.
    Returns:
        [T, out] fp32.
    """
    if module.kind != "embedding":
        return routing.delta_reference(module, x_TK, rows_TG)
    h_TR = module.a_RK.float()[:, x_TK].T
    if rows_TG is not None and module.gate.columns:
        h_TR = h_TR * routing.gate_reference(module.gate, rows_TG)
    return h_TR @ module.b_NR.float().T


def _hook(module: RoutedModule, rows: _Rows) -> Any:
    def add(layer: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        if rows.away:
            return output
        x = args[0]
        flat = x.reshape(-1) if module.kind == "embedding" else x.reshape(-1, x.shape[-1])
        delta = delta_reference(module, flat, rows.of(module)).reshape(output.shape)
        y = output.float()
        if module.rescale is not None:
            y = y * module.rescale.scale_N + module.rescale.shift_N
        return (y + delta).to(output.dtype)

    return add


def _rescaled(name: str, module: RoutedModule, layer: Any) -> RoutedModule:
    if module.magnitude_N is None:
        return module
    weight = layer.weight.t() if type(layer).__name__ == "Conv1D" else layer.weight
    return rescaled(name, module, weight, layer.bias)


def _block_hook(name: str, block: MixBlock, mlp: nn.Module) -> Any:
    """Replaces the block's output by that of its experts."""
    children = dict(mlp.named_children())
    linears = {n: children[n] for names in BLOCK_PARTS for n in names if n in children}
    own = [c for n, c in children.items() if n not in linears]
    if set(linears) not in BLOCK_PARTS or len(own) != 1:
        raise AdapterError(
            "unsupported_feature", f"{name} is not an MLP block that is known here",
            seen=type(mlp).__name__, limit=[", ".join(sorted(names)) for names in BLOCK_PARTS],
            fix="serve the adapter with the model it was trained on",
        )  # fmt: skip
    act = own[0] if block.act is None else activation(block.act)
    device = next(mlp.parameters()).device
    parts = {
        n: replace(p, a_RK=p.a_RK.to(device), b_NR=p.b_NR.to(device))
        for n, p in block.parts.items()
    }
    moved = replace(block, router_GK=block.router_GK.to(device), parts=parts)

    def mix(layer: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        flat = args[0].reshape(-1, args[0].shape[-1])
        as_fp32 = {n: _in_fp32(linear) for n, linear in linears.items()}
        return mix_reference(moved, flat, as_fp32, act).reshape(output.shape).to(output.dtype)

    return mix


def _in_fp32(linear: Any) -> Any:
    """The linear without its own hooks, as a function of fp32."""
    bias = None if linear.bias is None else linear.bias.float()
    return lambda h: nn.functional.linear(h, linear.weight.float(), bias)


def _to(module: RoutedModule, layer: nn.Module) -> RoutedModule:
    device = next(layer.parameters()).device
    moved: dict[str, Any] = {
        field.name: value.to(device)
        for field in dataclasses.fields(module)
        if isinstance(value := getattr(module, field.name), torch.Tensor)
    }
    if module.norm is not None:
        moved["norm"] = module.norm.map(lambda t: None if t is None else t.to(device))
    return dataclasses.replace(module, **moved)
