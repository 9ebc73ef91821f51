"""Experts that are whole MLP blocks (MixLoRA), in the model's own MLP modules.

Target: none of vLLM's names; the activation module of each MLP that the manager finds is wrapped,
in the model instance. A block is known by its structure: a class whose `forward` does nothing but
first linear → activation → second linear, as every gated MLP of the Llama family's layout does
(Llama, Mistral, Qwen, Gemma, Phi-3), and fc1 → activation → fc2 of others.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from vllm_lora_ext.adapters.blocks import activation
from vllm_lora_ext.adapters.model import LowRank, MixBlock, RoutedModule
from vllm_lora_ext.kernels.gated_lora.codes import ACTIVATIONS, MOST_ACTIVATED
from vllm_lora_ext.kernels.gated_lora.plan import Shape
from vllm_lora_ext.kernels.mix_mlp import (
    BlockSite,
    Scratch,
    block_mix_,
    mix_act_,
    register_block,
    scratch_for,
)
from vllm_lora_ext.kernels.mix_mlp.plan import PackedBlock
from vllm_lora_ext.model_patches.layers import RoutedLinear
from vllm_lora_ext.routing import GatedSlice


class MixedActivation(nn.Module):
    """The model's activation, then the experts of the rows that have some: one opaque op."""

    def __init__(self, act: nn.Module, block: BlockSite) -> None:
        super().__init__()
        self.act, self.handle = act, register_block(block)
        self.scratch: Scratch | None = None

    def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
        a = self.act(gate_up)
        a_TI, gate_up_TN = a.view(-1, a.shape[-1]), gate_up.view(-1, gate_up.shape[-1])
        if self.scratch is None:
            mix_act_(a_TI, gate_up_TN, self.handle)
        else:
            block_mix_(a_TI, self.scratch.z, gate_up_TN, self.scratch.u, self.handle)
        return a


class Activated(nn.Module):
    """In place of an activation that the linear before it has done."""

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        return a


@dataclass(frozen=True)
class Block:
    """One MLP block of the model: its two linears and its slots."""

    first: RoutedLinear
    last: RoutedLinear
    site: BlockSite
    gated: bool
    act: MixedActivation

    def hand_on(self, scratch: Scratch) -> None:
        """From now on the three steps hand their tensors on through `scratch`."""
        self.first.leave_in(scratch.u)
        self.last.leave_in(scratch.z)
        self.act.scratch = scratch

    def on_kernel(self, block: MixBlock) -> bool:
        """Whether an adapter's experts are served by the kernel, which CUDA graphs can hold."""
        return self.site.on_kernel(block.gate, block.act)

    def shapes(self, experts: MixBlock) -> list[Shape]:
        """Shapes and dtypes of the tensors that `pack` fills. Raises ValueError when the experts
        do not fit."""
        return self.site.shapes(*self._parts(experts))

    def pack(self, experts: MixBlock, out: Sequence[torch.Tensor]) -> PackedBlock:
        """An adapter's experts as a slot holds them, in the tensors of `out`."""
        first, last = self._parts(experts)
        act = None if experts.act is None else self._activation(experts.act)
        return self.site.pack(experts.gate, first, last, act, experts.act, out)

    def _parts(self, experts: MixBlock) -> tuple[list[GatedSlice], GatedSlice | None]:
        """This rank's parts of the first linear, the router with the first one, and of the last."""
        hidden, sizes = self.first.full_sizes()
        up_first = dict(zip(self._first_names(), sizes, strict=True))
        parts = dict(experts.parts)
        if self.first.n_slices == 2:
            parts |= _split(parts.get("gate_up_proj"), sizes)
        first = [_part(parts.get(name), hidden, size) for name, size in up_first.items()]
        first[0] = RoutedModule(first[0].a_RK, first[0].b_NR, experts.gate, experts.router_GK)
        down = parts.get("down_proj" if self.gated else "fc2")
        last = None if down is None else RoutedModule(down.a_RK, down.b_NR)
        return (
            [m for m in self.first.sharded(first) if m is not None],
            last and self.last.sharded([last])[0],
        )

    def _first_names(self) -> tuple[str, ...]:
        if self.first.n_slices == 2:
            return "gate_proj", "up_proj"
        return ("gate_up_proj",) if self.gated else ("fc1",)

    def _activation(self, name: str) -> nn.Module:
        act = activation(name)
        return _Gated(act) if self.gated else act


class _Gated(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act

    def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act(gate) * up


def wrap_blocks(model: nn.Module, layers: Mapping[str, nn.Module], fuse: bool) -> dict[str, Block]:
    """Finds the MLP blocks whose linears can be adapted, and wraps their activations.

    Args:
        layers: the model's LoRA layers by name.
        fuse: the first linear is to activate too, where its kernel can.
    Returns:
        Block's name → the block. One with an extended weight, whose shrunk rows no launch leaves
        behind, or whose first linear activates, can hold no experts and is none.
    """
    found = {}
    for name, module, (first_name, act_name, last_name) in list(_blocks(model)):
        first = layers.get(f"{name}.{first_name}")
        last = layers.get(f"{name}.{last_name}")
        if not isinstance(first, RoutedLinear) or not isinstance(last, RoutedLinear):
            continue
        gated, name_of_act = first_name != "fc1", _act_name(getattr(module, act_name))
        if fuse and name_of_act in ACTIVATIONS and _activates(first):
            assert name_of_act is not None
            first.activate(name_of_act)
            setattr(module, act_name, Activated())
            continue
        if first.site.extension is not None or last.site.extension is not None:
            continue
        if first.n_slices not in (1, 1 + gated) or last.n_slices != 1:
            continue
        act = getattr(module, act_name)
        bias = last.base_layer.bias
        if bias is not None and last.tp_rank > 0:  # added once; every rank decides alike
            bias = torch.zeros_like(bias)
        site = BlockSite(first.site, last.site, act, bias, name_of_act)
        mixed = MixedActivation(act, site)
        setattr(module, act_name, mixed)
        found[name] = Block(first, last, site, gated, mixed)
    return found


def _activates(first: RoutedLinear) -> bool:
    """Whether the kernel behind gate and up can activate too."""
    few = first.site.padded_rank <= MOST_ACTIVATED
    return first.n_slices == 2 and few and not first.reduces


def share_scratch(blocks: Collection[Block], dtype: torch.dtype) -> None:
    """Gives blocks that run the Triton kernels the memory in which these hand their tensors on.

    Args:
        dtype: the model's.
    """
    sites = [block.site for block in blocks]
    max_tokens = sites[0].first.step.table.shape[1] if sites else 0
    scratch = scratch_for(sites, max_tokens, dtype)
    for block in blocks if scratch is not None else ():
        assert scratch is not None
        block.hand_on(scratch)


def _act_name(act: nn.Module) -> str | None:
    """transformers' name of what vLLM's activation module computes, where it is a usual one."""
    name = type(act).__name__
    if name in ("GeluAndMul", "GELU"):
        return "gelu" if getattr(act, "approximate", "none") == "none" else "gelu_pytorch_tanh"
    return _ACT_NAMES.get(name)


_ACT_NAMES = {
    "SiluAndMul": "silu", "SiLU": "silu", "SiLUActivation": "silu", "GELUActivation": "gelu",
    "NewGELU": "gelu_pytorch_tanh", "FastGELU": "gelu_pytorch_tanh",
    "QuickGELU": "quick_gelu", "ReLU": "relu",
}  # fmt: skip


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[str, str, str]]]:
    for name, module in model.named_modules():
        cls: Any = type(module)  # mypy: a class is hashable
        steps = _steps(cls)
        if steps is not None and (steps[0], steps[2]) in _LINEARS:
            yield name, module, steps


_LINEARS = {("gate_up_proj", "down_proj"), ("fc1", "fc2")}


@cache
def _steps(cls: type[nn.Module]) -> tuple[str, str, str] | None:
    """The three children that `cls.forward` calls one after the other, if it does nothing else."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls.forward)))
    except (OSError, TypeError, SyntaxError):
        return None
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef) or len(function.args.args) != 2:
        return None
    value = function.args.args[1].arg
    calls: list[str] = []
    for statement in function.body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        if isinstance(statement, ast.Return):
            last = isinstance(statement.value, ast.Name) and statement.value.id == value
            if last and len(calls) == 3 and statement is function.body[-1]:
                return calls[0], calls[1], calls[2]
            return None
        called = _call(statement, value)
        if called is None:
            return None
        child, value = called
        calls.append(child)
    return None


def _call(statement: ast.stmt, value: str) -> tuple[str, str] | None:
    """`y = self.child(value)` or `y, _ = self.child(value)`: the child and y.

    `y = maybe_fused_act_quant(self.child, value, ...)` calls the child too: vLLM fuses activation
    and quantisation for the activations it knows by type, which a wrapped one is not.
    """
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return None
    target, call = statement.targets[0], statement.value
    if isinstance(target, ast.Tuple):
        target = target.elts[0]
    if not isinstance(target, ast.Name) or not isinstance(call, ast.Call) or call.keywords:
        return None
    func, args = call.func, call.args
    if isinstance(func, ast.Name) and func.id == "maybe_fused_act_quant" and len(args) == 3:
        func, args = args[0], args[1:2]
    own = (
        isinstance(func, ast.Attribute)
        and isinstance(func.value, ast.Name)
        and func.value.id == "self"
    )
    if not own or len(args) != 1 or not isinstance(args[0], ast.Name) or args[0].id != value:
        return None
    assert isinstance(func, ast.Attribute)
    return func.attr, target.id


def _split(fused: LowRank | None, sizes: tuple[int, ...]) -> dict[str, LowRank]:
    """Experts over a fused gate and up: both share A."""
    if fused is None:
        return {}
    gate_NR, up_NR = torch.split(fused.b_NR, list(sizes))
    return {"gate_proj": LowRank(fused.a_RK, gate_NR), "up_proj": LowRank(fused.a_RK, up_NR)}


def _part(part: LowRank | None, width: int, out: int) -> RoutedModule:
    if part is None:  # experts stand on other linears only
        return RoutedModule(torch.zeros(0, width), torch.zeros(out, 0))
    return RoutedModule(part.a_RK, part.b_NR)
