"""Where the gate of bundled adapters comes from: `Given`, `Arrow`, `Uniform` or `ByRequest`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from vllm_lora_ext.adapters import RoutedAdapter, RoutedModule, load_adapter
from vllm_lora_ext.adapters.gates import make_gate
from vllm_lora_ext.adapters.prototypes import prototypes
from vllm_lora_ext.adapters.readers.names import group, part
from vllm_lora_ext.adapters.readers.peft_config import bad_value, whole_number
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.kernels.gated_lora.step import MAX_COLUMNS
from vllm_lora_ext.merging.variants.files import Checkpoint

# The native format's names, in a file of routers alone.
_ROUTER = re.compile(r"(?P<module>.+)\.router\.(?P<part>weight|bias)")


@dataclass(frozen=True)
class Share:
    """One expert's share of a layer, B as it is stored: its delta is `scale · B A`."""

    a_RK: torch.Tensor
    b_NR: torch.Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.b_NR.shape[1]


class Router(Protocol):
    """What makes a layer's gate and puts the experts behind it."""

    @property
    def system(self) -> str:
        """`RoutedAdapter.system` of the bundle."""

    def check(self, experts: int, modules: Sequence[str]) -> None:
        """Refuse a number of experts, or layers, that it does not fit. Raises AdapterError."""

    def layer(self, module: str, parts: Sequence[Share]) -> RoutedModule:
        """The layer with one part per expert. Raises AdapterError."""


@dataclass(frozen=True)
class Arrow:
    """Arrow (https://arxiv.org/abs/2405.11157): |prototype · x|, the k largest, softmax of them.

    A prototype is the main input direction of the expert's own B A, so nothing is trained.

    Args:
        seed: of the start of PEFT's 15 power iterations; None for the exact singular vectors.
    """

    k: int
    temperature: float = 1.0
    seed: int | None = None
    system: str = "arrow"

    def check(self, experts: int, modules: Sequence[str]) -> None:
        if self.seed is not None:
            whole_number(self.seed, "seed", -(2**63), 2**64 - 1)

    def layer(self, module: str, parts: Sequence[Share]) -> RoutedModule:
        fields = {
            "source": "prototype", "score": "abs", "select": "top_k", "k": self.k,
            "weight": "softmax", "temperature": self.temperature,
        }  # fmt: skip
        rows_GK = prototypes([(part.a_RK, part.b_NR) for part in parts], self.seed)
        return replace(_gated(module, parts, fields), router_GK=rows_GK)


@dataclass(frozen=True)
class Uniform:
    """Every expert at a constant weight, 1/E when none are given: a plain LoRA of all ranks."""

    weights: tuple[float, ...] | None = None
    system: str = "uniform"

    def check(self, experts: int, modules: Sequence[str]) -> None:
        if self.weights is not None and len(self.weights) != experts:
            raise bad_value("the number of weights", len(self.weights), f"{experts}, one each")

    def layer(self, module: str, parts: Sequence[Share]) -> RoutedModule:
        weights = self.weights or (1 / len(parts),) * len(parts)
        return RoutedModule(
            a_RK=torch.cat([part.a_RK for part in parts]),
            b_NR=torch.cat(
                [w * (part.b_NR * part.scale) for w, part in zip(weights, parts, strict=True)],
                dim=1,
            ),
        )


@dataclass(frozen=True)
class ByRequest:
    """Each request gives the experts' weights, as routers outside of the model compute them.

    Args:
        fields: of the gate table, what becomes of the weights; none: they are the gates.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    system: str = "bundle"

    def check(self, experts: int, modules: Sequence[str]) -> None:
        if experts > MAX_COLUMNS:
            raise bad_value("the number of experts", experts, f"at most {MAX_COLUMNS}")

    def layer(self, module: str, parts: Sequence[Share]) -> RoutedModule:
        return _gated(module, parts, {**self.fields, "source": "request"})


@dataclass(frozen=True)
class Rows:
    """A layer's router: its tensors as in `RoutedModule`, and its gate's fields but `blocks`."""

    fields: Mapping[str, Any]
    router_GK: torch.Tensor
    bias_G: torch.Tensor | None = None
    head_K: torch.Tensor | None = None
    head_bias: float = 0.0


@dataclass(frozen=True)
class Given:
    """Routers that exist: module → its rows, one per expert in the experts' order."""

    rows: Mapping[str, Rows] = field(repr=False)
    system: str = "bundle"

    def check(self, experts: int, modules: Sequence[str]) -> None:
        for module in modules:
            if module not in self.rows:
                raise AdapterError(
                    "missing_tensor", f"there is no router for {module}, which an expert adapts",
                    limit=f"a tensor {module}.router.weight", fix="add it to the routers",
                )  # fmt: skip
        unused = sorted(set(self.rows) - set(modules))
        if unused:
            raise AdapterError(
                "unexpected_tensor", "there is a router of a layer that no expert adapts",
                seen=unused[0], fix="remove it, or bundle the experts that it was trained over",
            )  # fmt: skip
        for module, rows in self.rows.items():
            shape = list(rows.router_GK.shape)
            if len(shape) != 2 or shape[0] != experts:
                raise AdapterError(
                    "setting_mismatch", f"the router of {module} is not for {experts} experts",
                    seen=shape, limit=f"[{experts}, in]",
                    fix="name every expert once, in the order of the router's rows",
                )  # fmt: skip

    def layer(self, module: str, parts: Sequence[Share]) -> RoutedModule:
        rows = self.rows[module]
        return replace(
            _gated(module, parts, rows.fields), router_GK=rows.router_GK, bias_G=rows.bias_G,
            head_K=rows.head_K, head_bias=rows.head_bias,
        )  # fmt: skip


def read_router(path: str | os.PathLike[str], gate: Mapping[str, Any] | None = None) -> Given:
    """Routers out of a safetensors file, or out of a routed adapter of any format.

    A file holds `<module>.router.weight` [E, in] per layer and, where the gate has a bias,
    `<module>.router.bias` [E], as the native format names them. An adapter gives its routers and
    gates, threshold heads too; its own experts are not used.

    Args:
        gate: fields of the gate table. A file needs them; over an adapter's own they win.
    Raises:
        AdapterError: `missing_setting`, `unknown_key`, `unexpected_tensor`, `missing_tensor`,
            `bad_dtype`, `bad_shape`, `unsupported_feature`, and what reading the files raises.
    """
    given = dict(gate or {})
    if "blocks" in given:
        raise AdapterError(
            "unknown_key", "the gate's blocks are the experts' ranks and cannot be given",
            seen=given["blocks"], fix="leave 'blocks' out",
        )  # fmt: skip
    if os.path.isdir(path):
        return _router_of_adapter(load_adapter(path, roots=()), given)
    if not given:
        raise AdapterError(
            "missing_setting", "a file of routers does not say what becomes of their logits",
            limit="score, select, k, weight, temperature, ... of the gate table",
            fix="give the gate's fields, for example score softmax, select top_k, k 2",
        )  # fmt: skip
    return _router_of_file(Checkpoint(path), {"source": "router"} | given)


def _gated(module: str, parts: Sequence[Share], fields: Mapping[str, Any]) -> RoutedModule:
    """The experts side by side, every scale folded into B, behind a gate without its tensors."""
    return RoutedModule(
        a_RK=torch.cat([part.a_RK for part in parts]),
        b_NR=torch.cat([part.b_NR * part.scale for part in parts], dim=1),
        gate=make_gate({**fields, "blocks": [part.rank for part in parts]}, module),
    )


def _router_of_adapter(adapter: RoutedAdapter, given: Mapping[str, Any]) -> Given:
    if adapter.blocks:
        raise AdapterError(
            "unsupported_feature", "routers of MLP blocks cannot be given to experts of layers",
            seen=next(iter(adapter.blocks)), limit="routers of linear layers",
            fix="use an adapter whose experts stand on layers",
        )  # fmt: skip
    rows = {}
    for name, module in adapter.modules.items():
        if module.router_GK is None:
            raise AdapterError(
                "unsupported_feature", f"{name} has no router that could be given to others",
                seen=f"source {module.gate.source}", limit="source router or prototype",
                fix="use a router that was trained over these experts",
            )  # fmt: skip
        own = {key: value for key, value in module.gate.to_dict().items() if key != "blocks"}
        rows[name] = Rows(
            own | dict(given), module.router_GK, module.bias_G, module.head_K, module.head_bias
        )
    return Given(rows, adapter.system)


def _router_of_file(file: Checkpoint, fields: Mapping[str, Any]) -> Given:
    for name in file.names:
        if not _ROUTER.fullmatch(name):
            raise AdapterError(
                "unexpected_tensor", f"{file.path.name} holds a tensor that belongs to no router",
                seen=name, limit="<module>.router.weight, <module>.router.bias",
                fix="keep the routers only, or give the whole adapter's folder",
            )  # fmt: skip
    return Given({
        module: _rows_of_file(file, module, parts, fields)
        for module, parts in group(file.names, _ROUTER).items()
    })  # fmt: skip


def _rows_of_file(
    file: Checkpoint, module: str, parts: Mapping[str, str], fields: Mapping[str, Any]
) -> Rows:
    router_GK = _floats(file, part(dict(parts), "weight", f"{module}.router"))
    return Rows(fields, router_GK, _floats(file, parts["bias"]) if "bias" in parts else None)


def _floats(file: Checkpoint, name: str) -> torch.Tensor:
    tensor = file.take(name)
    if not tensor.is_floating_point():
        raise AdapterError(
            "bad_dtype", f"'{name}' is no router", seen=str(tensor.dtype),
            limit="float32, float16, bfloat16", fix="save it as float32",
        )  # fmt: skip
    return tensor.float()
