"""Tiny quantised bases, written tensor by tensor as each format has them, and what they hold.

A format's writer rounds the seven linears of every layer and returns the rounded weights, so that
transformers can run what the engine runs. Everything else stays as it is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.make_adapters import TARGETS
from vllm_lora_ext.adapters.model import MixBlock, RoutedAdapter
from vllm_lora_ext.routing.mix import expert_weights

GROUP = 32  # inputs that share a scale, in formats of four bits
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs stands at each place of an int32
Tensors = dict[str, torch.Tensor]
# weight [out, in] → the format's tensors by their suffixes, and the weight that they stand for
Writer = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]


def _pack(values: torch.Tensor) -> torch.Tensor:
    """Eight four-bit numbers of the last dimension into one int32, the first lowest."""
    parts = values.to(torch.int64).unflatten(-1, (-1, 8)) << torch.arange(0, 32, 4)
    total = parts.sum(-1)
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def _groups(weight_NK: torch.Tensor) -> torch.Tensor:
    return weight_NK.unflatten(1, (-1, GROUP))  # [N, K / 32, 32]


def awq(weight_NK: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Unsigned, a zero point for each group; packed along the outputs, in an order of its own."""
    groups = _groups(weight_NK)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / 15).half().float()
    zero = (-low / scale).round().clamp(0, 15)
    q = (groups / scale + zero).round().clamp(0, 15)
    rounded = ((q - zero) * scale).flatten(1)

    def packed(rows: torch.Tensor) -> torch.Tensor:  # [_, N] → [_, N / 8]
        return _pack(rows.unflatten(-1, (-1, 8))[..., list(AWQ_ORDER)].flatten(-2))

    tensors = {
        "qweight": packed(q.flatten(1).T), "qzeros": packed(zero[..., 0].T),
        "scales": scale[..., 0].T.half(),
    }  # fmt: skip
    return tensors, rounded


def _symmetric(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[N, K] numbers from -8 to 7, [N, K / 32] scales, and what they stand for."""
    groups = _groups(weight_NK)
    scale = (groups.abs().amax(-1, keepdim=True) / 7).half().float()
    q = (groups / scale).round().clamp(-8, 7)
    return q.flatten(1), scale[..., 0], (q * scale).flatten(1)


def gptq(weight_NK: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Signed, 8 added; packed along the inputs. Zero points are stored less one."""
    q, scale, rounded = _symmetric(weight_NK)
    zeros = torch.full((scale.shape[1], len(q)), 7)
    tensors = {
        "qweight": _pack(q + 8).T, "qzeros": _pack(zeros), "scales": scale.T.half(),
        "g_idx": torch.arange(q.shape[1], dtype=torch.int32) // GROUP,
    }  # fmt: skip
    return tensors, rounded


def packed(weight_NK: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """compressed-tensors' `pack-quantized`: as GPTQ's, rows of outputs."""
    q, scale, rounded = _symmetric(weight_NK)
    shape = torch.tensor(weight_NK.shape, dtype=torch.int64)
    return {"weight_packed": _pack(q + 8), "weight_scale": scale, "weight_shape": shape}, rounded


def int8(weight_NK: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """compressed-tensors' `int-quantized`: a scale for each output."""
    scale = weight_NK.abs().amax(1, keepdim=True) / 127
    q = (weight_NK / scale).round().clamp(-127, 127)
    return {"weight": q.to(torch.int8), "weight_scale": scale}, q * scale


def fp8(weight_NK: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """compressed-tensors' `float-quantized`: a scale for each output."""
    scale = weight_NK.abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    q = (weight_NK / scale).to(torch.float8_e4m3fn)
    return {"weight": q, "weight_scale": scale}, q.float() * scale


def _compressed(form: str, inputs: dict[str, Any] | None, **weights: Any) -> dict[str, Any]:
    group = {
        "targets": ["Linear"], "input_activations": inputs,
        "weights": {"type": "int", "symmetric": True, "dynamic": False} | weights,
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }  # fmt: skip


_PER_TOKEN = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}
_INT, _FLOAT = _PER_TOKEN | {"type": "int"}, _PER_TOKEN | {"type": "float"}
FORMATS: dict[str, tuple[Writer, dict[str, Any]]] = {
    "awq": (awq, {
        "quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True,
        "version": "gemm",
    }),
    "gptq": (gptq, {
        "quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True,
        "checkpoint_format": "gptq",
    }),
    "w4a16": (packed, _compressed(
        "pack-quantized", None, num_bits=4, strategy="group", group_size=GROUP
    )),
    "w8a8": (int8, _compressed("int-quantized", _INT, num_bits=8, strategy="channel")),
    "fp8": (fp8, _compressed(
        "float-quantized", _FLOAT, type="float", num_bits=8, strategy="channel"
    )),
}  # fmt: skip


def write(name: str, base: Path, folder: Path, net: nn.Module) -> None:
    """A quantised copy of `base` in `folder`; `net`, the same model, is rounded too."""
    writer, config = FORMATS[name]
    shutil.copytree(base, folder)
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    own = dict(net.named_parameters())
    for key in [k for k in tensors if k.split(".")[-2] in TARGETS]:
        stem, weight = key.removesuffix("weight"), tensors.pop(key).float()
        made, rounded = writer(weight)
        tensors |= {stem + part: t.contiguous() for part, t in made.items()}
        own[key].data.copy_(rounded)
        if name in _READS:
            _reading(net.get_submodule(stem[:-1]), _READS[name])
    save_file(tensors, file, metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))


def _to_int8(x_TK: torch.Tensor) -> torch.Tensor:
    """A scale for each token."""
    scale = x_TK.abs().amax(-1, keepdim=True) / 127
    return (x_TK / scale).round() * scale


def _to_fp8(x_TK: torch.Tensor) -> torch.Tensor:
    """A scale for each token."""
    scale = x_TK.abs().amax(-1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    return (x_TK / scale).to(torch.float8_e4m3fn).float() * scale


_READS = {"w8a8": _to_int8, "fp8": _to_fp8}


def _reading(layer: Any, round_: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """The layer multiplies rounded inputs; adapters, which are hooks, see them as they are."""
    forward = layer.forward
    layer.forward = lambda x_TK: forward(round_(x_TK))


def mixed_once(adapter: RoutedAdapter) -> Callable[[nn.Module], AbstractContextManager[Any]]:
    """MixLoRA where inputs are rounded: the engine's last linear reads the experts' weighted sum,
    once, and not each expert's states, of which the sum is the same only without rounding."""

    @contextmanager
    def put_on(net: nn.Module) -> Iterator[None]:
        hooks = [
            net.get_submodule(name).register_forward_hook(partial(_mixed, block))
            for name, block in adapter.blocks.items()
        ]
        yield
        for hook in hooks:
            hook.remove()

    return put_on


def _mixed(block: MixBlock, mlp: Any, args: tuple[torch.Tensor], _: torch.Tensor) -> torch.Tensor:
    x_TK, gate = args[0][0], block.gate
    v_TE = expert_weights(gate, x_TK @ block.router_GK.T)
    gate_TN, up_TN = mlp.gate_proj(x_TK), mlp.up_proj(x_TK)
    sum_TN, own_TK, start = torch.zeros_like(up_TN), torch.zeros_like(x_TK), 0
    for e, rank in enumerate(gate.blocks):
        ranks, start = slice(start, start + rank), start + rank

        def low(name: str, x: torch.Tensor, ranks: slice = ranks) -> torch.Tensor:
            part = block.parts[name]
            return x @ part.a_RK[ranks].T @ part.b_NR[:, ranks].T

        a_TN = mlp.act_fn(gate_TN + low("gate_proj", x_TK)) * (up_TN + low("up_proj", x_TK))
        sum_TN = sum_TN + v_TE[:, e : e + 1] * a_TN
        own_TK = own_TK + v_TE[:, e : e + 1] * low("down_proj", a_TN)
    return (mlp.down_proj(sum_TN) + own_TK)[None]
