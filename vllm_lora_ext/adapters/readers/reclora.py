"""RecLoRA (github.com/Gebro13/RecLoRA): a user's vector mixes the experts of every layer.

The files are the state dict that the authors' model returns, and say nothing: the settings are
the training program's arguments.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from vllm_lora_ext.adapters.folder import SIDECAR, AdapterFolder
from vllm_lora_ext.adapters.limits import MAX_EXPERTS
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.readers.base import Reader
from vllm_lora_ext.adapters.readers.experts import number
from vllm_lora_ext.adapters.readers.names import group, part
from vllm_lora_ext.adapters.readers.peft_config import (
    MAX_ALPHA,
    MAX_RANK,
    bad_value,
    flag,
    whole_number,
)
from vllm_lora_ext.adapters.readers.sidecar import check_system, every_layer
from vllm_lora_ext.adapters.readers.tuners import take_shaped
from vllm_lora_ext.adapters.user_gates import (
    Attention,
    Linear,
    Mixture,
    Norm,
    Perceptron,
    Scaling,
    TokenMixture,
    UserLayer,
    UserTemplate,
    Weighting,
    expert_keys,
    fold_norm,
)
from vllm_lora_ext.errors import AdapterError

NAME = "reclora"
_LAYERS = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
_PART = re.compile(
    rf"lorec_layers\.(?P<module>({'|'.join(_LAYERS)})\.(0|[1-9]\d{{0,5}}))\.(?P<part>.+)"
)
_MODES = ("ctr", "finetune", "origin")
_MAX_USER = 1 << 20
_SETTINGS = {
    "system": f"{NAME} (may be left out)",
    "mode": "the authors' --mode: ctr, finetune or origin",
    "layers": "the adapted modules, the authors' names: q, k, v, o, gate, up, down",
    "lora_r": "rank of one expert",
    "lora_alpha": "B is scaled by lora_alpha / lora_r",
    "lora_assemble_num": "number of experts (finetune: width of the hidden layer)",
    "ctr_hidden_size": "length of the user's vector",
    "enable_softmax": "whether a softmax is taken over the gate's logits (ctr)",
    "enable_sqrt_after_softmax": "whether the square root of that is used (ctr with softmax)",
    "temperature": "divides the logits before the softmax (ctr with softmax)",
    "which_in_gate": "what the gate reads beside the user: None, token or lora (ctr)",
    "routing_mode": "soft (ctr with softmax)",
    "all_init_one": "whether the layers that scale have biases (finetune)",
}


@dataclass(frozen=True)
class _Arguments:
    mode: str
    r: int
    scale: float
    experts: int
    user: int
    which: str
    weighting: Weighting
    biased: bool


def detect(folder: AdapterFolder) -> bool:
    return not folder.has_config and any(n.startswith("lorec_layers.") for n in folder.names)


def read(folder: AdapterFolder) -> RoutedAdapter:
    check_system(folder, NAME)
    groups = group(folder.names, _PART)
    kinds = _kinds(folder)
    every_layer(groups, [f"{kind}.{{}}" for kind in kinds])
    args = _arguments(folder)
    names = {short: _full_name(short) for short in groups}
    if args.mode == "origin":
        modules = {names[s]: _plain(folder, s, parts, args) for s, parts in groups.items()}
        return RoutedAdapter(modules, system=NAME)
    layers = {names[s]: _layer(folder, s, parts, args) for s, parts in groups.items()}
    return RoutedAdapter({}, system=NAME, template=UserTemplate(layers, args.user))


def _full_name(short: str) -> str:
    kind, layer = short.split(".")
    return f"model.layers.{layer}.{_LAYERS[kind]}"


def _kinds(folder: AdapterFolder) -> list[str]:
    kinds = folder.setting("layers", _SETTINGS["layers"])
    known = isinstance(kinds, list) and all(isinstance(k, str) and k in _LAYERS for k in kinds)
    if not known or not kinds or len(set(kinds)) != len(kinds):
        raise bad_value(f"layers in {SIDECAR}", kinds, f"different ones of {', '.join(_LAYERS)}")
    return kinds


def _arguments(folder: AdapterFolder) -> _Arguments:
    mode = folder.setting("mode", _SETTINGS["mode"])
    if mode not in _MODES:
        raise bad_value(f"mode in {SIDECAR}", mode, " | ".join(_MODES))
    r = _whole(folder, "lora_r", MAX_RANK)
    alpha = number(
        folder.setting("lora_alpha", _SETTINGS["lora_alpha"]), f"lora_alpha in {SIDECAR}",
        -MAX_ALPHA, MAX_ALPHA,
    )  # fmt: skip
    made = mode != "origin"
    ctr = mode == "ctr"
    which = _which(folder) if ctr else "None"
    found = _Arguments(
        mode=mode, r=r, scale=alpha / r,
        experts=_whole(folder, "lora_assemble_num", MAX_EXPERTS) if made else 0,
        user=_whole(folder, "ctr_hidden_size", _MAX_USER) if made else 0,
        which=which,
        weighting=_weighting(folder) if ctr else Weighting(False, False, 1.0),
        biased=mode == "finetune" and _flag(folder, "all_init_one"),
    )  # fmt: skip
    for key in _SETTINGS:  # the program has them all in every mode, and reads some of them only
        if folder.has_setting(key):
            folder.setting(key, _SETTINGS[key])
    return found


def _weighting(folder: AdapterFolder) -> Weighting:
    if not _flag(folder, "enable_softmax"):
        return Weighting(False, False, 1.0)
    routing = folder.setting("routing_mode", _SETTINGS["routing_mode"])
    if routing == "hard":
        raise AdapterError(
            "unsupported_feature", f"routing_mode in {SIDECAR}: the authors' hard routing takes the"
            " bitwise complement of the chosen experts' numbers as their place, which chooses"
            " others; there is no meaning to serve", seen=routing, limit="soft",
            fix="train with soft routing",
        )  # fmt: skip
    if routing != "soft":
        raise bad_value(f"routing_mode in {SIDECAR}", routing, "soft")
    temperature = folder.setting("temperature", _SETTINGS["temperature"])
    return Weighting(
        True, _flag(folder, "enable_sqrt_after_softmax"),
        number(temperature, f"temperature in {SIDECAR}", 1e-6, 1e6),
    )  # fmt: skip


def _which(folder: AdapterFolder) -> str:
    which = folder.setting("which_in_gate", _SETTINGS["which_in_gate"])
    which = "None" if which is None else which
    if which not in ("None", "token", "lora"):
        raise bad_value(f"which_in_gate in {SIDECAR}", which, "None | token | lora")
    assert isinstance(which, str)
    return which


def _whole(folder: AdapterFolder, key: str, high: int) -> int:
    return whole_number(folder.setting(key, _SETTINGS[key]), f"{key} in {SIDECAR}", 1, high)


def _flag(folder: AdapterFolder, key: str) -> bool:
    return flag(folder.setting(key, _SETTINGS[key]), f"{key} in {SIDECAR}")


class _Parts:
    """One layer's tensors, taken by the names that the authors' modules have."""

    def __init__(self, folder: AdapterFolder, name: str, parts: dict[str, str]) -> None:
        self._folder, self._name, self._parts = folder, name, parts

    def take(self, wanted: str, *shape: int | None) -> torch.Tensor:
        return take_shaped(self._folder, part(self._parts, wanted, self._name), *shape)

    def shape(self, wanted: str) -> tuple[int, ...]:
        return self._folder.shape(part(self._parts, wanted, self._name))

    def linear(self, stem: str, out: int | None, width: int | None, bias: bool = True) -> Linear:
        weight = self.take(f"{stem}.weight", out, width)
        out = weight.shape[0]
        return Linear(weight, self.take(f"{stem}.bias", out) if bias else torch.zeros(out))

    def norm(self, stem: str, width: int) -> Norm:
        return Norm(self.take(f"{stem}.weight", width), self.take(f"{stem}.bias", width))

    def pair(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, in] and B [out, r] of one LoRA."""
        return self.take("lora_A.weight", rank, None), self.take("lora_B.weight", None, rank)

    def experts(self, letter: str, args: _Arguments) -> torch.Tensor:
        """[r · size, M]."""
        name = f"lora_{letter}_adapter.weight"
        stored = self.take(name, None, args.experts)
        if len(stored) % args.r:
            raise AdapterError(
                "rank_mismatch", f"tensor '{self._parts[name]}' does not hold experts of rank"
                f" lora_r ({SIDECAR})", seen=list(stored.shape),
                limit=f"[a multiple of {args.r}, {args.experts}]", fix="mend lora_r",
            )  # fmt: skip
        return stored


def _layer(folder: AdapterFolder, name: str, names: dict[str, str], args: _Arguments) -> UserLayer:
    parts = _Parts(folder, name, names)
    if args.mode == "finetune":
        return _scaling(parts, args)
    a_QM, b_PM = parts.experts("A", args), parts.experts("B", args)
    if args.which == "token":
        return _token(parts, a_QM, b_PM, args)
    user, experts = args.user, args.experts
    if args.which == "None":
        stem = "ctr_final_layer"
        first = parts.linear(f"{stem}.1", None, user)
        second = parts.linear(f"{stem}.4", experts, len(first.weight))
        gate = Perceptron(parts.norm(f"{stem}.0", user), first, second)
        return Mixture(a_QM, b_PM, args.r, args.scale, gate, args.weighting)
    into = parts.linear("key_layer.0", None, len(a_QM) + len(b_PM))
    keys = expert_keys(a_QM, b_PM, into, parts.linear("key_layer.2", user, len(into.weight)))
    attention = Attention(
        keys, parts.linear("query_layer", user, user),
        parts.linear("attention_layer.0.dnn.0", 4 * user, 4 * user),
        parts.linear("attention_layer.0.dnn.3", 4 * user, 4 * user),
        parts.linear("attention_layer.1", 1, 4 * user),
    )  # fmt: skip
    return Mixture(a_QM, b_PM, args.r, args.scale, attention, args.weighting)


def _token(parts: _Parts, a_QM: torch.Tensor, b_PM: torch.Tensor, args: _Arguments) -> TokenMixture:
    width, total = len(a_QM) // args.r, args.experts * args.r
    norm = parts.norm("gating_final_layer.0", width + args.user)
    linear = parts.linear("gating_final_layer.1", args.experts, width + args.user)
    a_RK = a_QM.t().reshape(total, width).contiguous()
    b_NR = args.scale * b_PM.t().reshape(total, -1).t()
    return TokenMixture(a_RK, b_NR.contiguous(), *fold_norm(norm, linear), args.weighting)


def _scaling(parts: _Parts, args: _Arguments) -> Scaling:
    a_RK, b_NR = parts.pair(args.r)
    hidden = parts.linear("ctr_final_layer.1", args.experts, args.user)
    return Scaling(
        a_RK, args.scale * b_NR, parts.norm("ctr_final_layer.0", args.user), hidden,
        parts.linear("lora_A_adapter", args.r, args.experts, args.biased),
        parts.linear("lora_B_adapter", len(b_NR), args.experts, args.biased),
    )  # fmt: skip


def _plain(
    folder: AdapterFolder, name: str, names: dict[str, str], args: _Arguments
) -> RoutedModule:
    parts = _Parts(folder, name, names)
    a_RK, b_NR = parts.pair(args.r)
    return RoutedModule(a_RK, args.scale * b_NR)


READER = Reader(
    name=NAME,
    title="RecLoRA",
    url="https://github.com/Gebro13/RecLoRA",
    files="model.safetensors (pytorch_model.bin through convert) with"
    " lorec_layers.<module>.<layer>.lora_A_adapter.weight, lora_B_adapter.weight and the gate's"
    " layers, routing.json with the training program's arguments; no adapter_config.json",
    peft_types=(),
    detect=detect,
    read=read,
    paper="Lifelong Personalized Low-Rank Adaptation of Large Language Models for Recommendation,"
    " https://arxiv.org/abs/2408.03533",
    summary="A request carries a user's vector, which mixes the experts of every layer. The worker"
    " makes the user's adapter from the resident experts: an ordinary LoRA, or with the gate"
    " `token` a routed one.",
    request="`user`, its vector (not in mode `origin`)",
    formula="A_u = sum_m g_m A_m,  B_u = sum_m g_m B_m,  y = W x + alpha/r B_u A_u x\n"
    "which_in_gate None:   g = softmax(Linear(relu(Linear(LayerNorm(u)))) / T)\n"
    "which_in_gate token:  g = softmax(Linear(LayerNorm([x, u])) / T), for every token\n"
    "which_in_gate lora:   g = softmax((l - max l) / T), l = MLP([q, k_m, q - k_m, q * k_m]),\n"
    "                      q = Linear(u), k_m = Linear(relu(Linear([A_m, B_m])))\n"
    "mode finetune:        y = W x + alpha/r b(u) * (B (a(u) * (A x)))",
    settings=_SETTINGS,
    traps=(
        "Two mixtures are multiplied: the products B_n A_m of different experts are there too. A"
        " mixture of the experts' products is another function.",
        "The softmax is an option; without it the logits themselves are the weights, whatever the"
        " temperature is.",
        "Column m of lora_A_adapter holds A_m row by row, and column m of lora_B_adapter holds B_m"
        " column by column.",
        "There is no rule for an unknown user: the request says what its vector is, and the zero"
        " vector is not the base model.",
        "With the recommender's outputs `final` and `hidden` the vector depends on the item as well"
        " as on the user.",
        "Hard routing is refused: the authors' code inverts the bits of the chosen experts'"
        " numbers.",
        "The answer is the comparison of two tokens' logits (`Yes`, `No`); a classification head"
        " (ctr_head) is not among the saved tensors.",
    ),
)
