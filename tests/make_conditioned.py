"""Random adapters that a request completes, and their formulas written down a second time.

    folder = write_random("reclora_token", tmp_path / "a", seed=3)
    y_TN = delta(folder, "model.layers.0.self_attn.q_proj", x_TK, given)

The formulas are plain loops in float64 over the raw tensors and JSON of a folder; nothing of the
readers is used.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from make_adapters import normal, pick
from make_multi import write_plain
from make_routed import linears
from safetensors.torch import load_file, save_file

BASE, HIDDEN, HEAD = "base_llama_mha", 64, 32
NAMES = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
FORMATS = (
    "alora", "mmlora", "reclora_ctr", "reclora_token", "reclora_lora", "reclora_finetune", "wavllm",
)  # fmt: skip
LLAMA = "gpt_model.model_llama."
Rng = np.random.Generator
Tensors = dict[str, torch.Tensor]


class Given(NamedTuple):
    """What a request brings: `rows_TC` of columns, a user's vector, or an instruction's states."""

    rows_TC: torch.Tensor
    user_N: torch.Tensor
    hidden_TK: torch.Tensor


def write_random(
    name: str, folder: str | Path, seed: int, base: str = BASE, layers: Sequence[str] = tuple(NAMES)
) -> Path:
    """A folder of one of `FORMATS`, all of whose sizes depend on `seed` and the base only.

    Args:
        layers: which of `NAMES` it may adapt.
    """
    rng, where = np.random.default_rng([seed, len(name)]), Path(folder)
    if name == "alora":
        shape = {"r": pick(rng, (2, 5)), "alpha": pick(rng, (4, 7)), "targets": ("q_proj",)}
        write_plain(where, seed, base, use_rslora=bool(seed % 2), **shape)
        config = json.loads((where / "adapter_config.json").read_text())
        config["alora_invocation_tokens"] = [int(t) for t in rng.integers(4, 90, 3)]
        (where / "adapter_config.json").write_text(json.dumps(config))
        return where
    kinds = [str(k) for k in rng.permutation(list(layers))[: int(rng.integers(1, 3))]]
    depth = int(rng.integers(1, 4))
    if name == "mmlora":
        tensors, settings = _mmlora(rng, base, kinds, depth)
    elif name == "wavllm":
        tensors, settings = _wavllm(rng, base, depth)
    else:
        tensors, settings = _reclora(rng, base, name.split("_")[1], kinds, depth)
    where.mkdir(parents=True)
    save_file(tensors, where / f"{'final' if name == 'wavllm' else 'model'}.safetensors")
    (where / "routing.json").write_text(json.dumps(settings))
    return where


def _sizes(base: str, kind: str, layer: int) -> tuple[int, int]:
    name = f"model.layers.{layer}.{NAMES[kind]}"
    return linears(base, (NAMES[kind].split(".")[1],))[name]


def _matrix(rng: Rng, rows: int, width: int) -> torch.Tensor:
    return normal(rng, rows, width) / math.sqrt(width)


def _linear(rng: Rng, stem: str, out: int, width: int, bias: bool = True) -> Tensors:
    made = {f"{stem}.weight": _matrix(rng, out, width)}
    return made | ({f"{stem}.bias": normal(rng, out)} if bias else {})


def _norm(rng: Rng, stem: str, width: int) -> Tensors:
    return {f"{stem}.weight": 1 + 0.3 * normal(rng, width), f"{stem}.bias": normal(rng, width)}


def _mmlora(rng: Rng, base: str, kinds: list[str], depth: int) -> tuple[Tensors, dict[str, Any]]:
    tensors: Tensors = {}
    ranks = {"V": pick(rng, (1, 4)), "L": pick(rng, (3, 7))}
    for layer in range(depth):
        for kind in kinds:
            width, out = _sizes(base, kind, layer)
            for letter, rank in ranks.items():
                stem = f"model.layers.{layer}.{NAMES[kind]}.{letter}_Slora_"
                tensors[f"{stem}A.weight"] = _matrix(rng, rank, width)
                tensors[f"{stem}B.weight"] = _matrix(rng, out, rank)
    settings = {"scaling_visual": 2, "scaling_language": pick(rng, (2, 0.5))}
    return tensors, settings | ({"system": "mmlora"} if depth % 2 else {})


def _wavllm(rng: Rng, base: str, depth: int) -> tuple[Tensors, dict[str, Any]]:
    """Of the attention's layers those with as many outputs as hidden states: one gate has all."""
    rank, inner = pick(rng, (2, 5)), pick(rng, (7, 20))
    hidden, _ = _sizes(base, "q", 0)
    tensors = _linear(rng, f"{LLAMA}scale_fc_1", inner, hidden)
    tensors |= _linear(rng, f"{LLAMA}scale_fc_2", hidden, inner)
    tensors |= _linear(rng, f"{LLAMA}scale_weight_attention", 1, hidden)
    for layer in range(depth):
        for kind in (k for k in "qkvo" if _sizes(base, k, layer) == (hidden, hidden)):
            stem = f"{LLAMA}layers.{layer}.attention.w{kind}_lora_"
            tensors[f"{stem}A"] = _matrix(rng, hidden, rank)
            tensors[f"{stem}B"] = _matrix(rng, rank, hidden)
    return tensors, {"rope_layout": pick(rng, ("interleaved", "halves")), "system": "wavllm"}


def _reclora(
    rng: Rng, base: str, mode: str, kinds: list[str], depth: int
) -> tuple[Tensors, dict[str, Any]]:
    user, experts, r = pick(rng, (3, 8)), pick(rng, (2, 5)), pick(rng, (1, 3))
    settings = {
        "mode": "finetune" if mode == "finetune" else "ctr", "layers": kinds, "lora_r": r,
        "lora_alpha": pick(rng, (4, 5)), "lora_assemble_num": experts, "ctr_hidden_size": user,
    }  # fmt: skip
    if mode == "finetune":
        settings |= {"all_init_one": bool(rng.random() < 0.5)}
    else:
        settings |= {
            "enable_softmax": bool(rng.random() < 0.7), "temperature": pick(rng, (1.0, 0.6)),
            "enable_sqrt_after_softmax": bool(rng.random() < 0.5), "routing_mode": "soft",
            "which_in_gate": {"ctr": "None"}.get(mode, mode),
        }  # fmt: skip
    tensors: Tensors = {}
    for layer in range(depth):
        for kind in kinds:
            stem, sizes = f"lorec_layers.{kind}.{layer}.", _sizes(base, kind, layer)
            tensors |= _reclora_layer(rng, mode, stem, sizes, (user, experts, r), settings)
    return tensors, settings


def _reclora_layer(
    rng: Rng, mode: str, stem: str, sizes: tuple[int, int], shape: tuple[int, int, int],
    settings: dict[str, Any],
) -> Tensors:  # fmt: skip
    (width, out), (user, experts, r) = sizes, shape
    if mode == "finetune":
        bias = settings["all_init_one"]
        return (
            _norm(rng, f"{stem}ctr_final_layer.0", user)
            | _linear(rng, f"{stem}ctr_final_layer.1", experts, user)
            | _linear(rng, f"{stem}lora_A_adapter", r, experts, bias)
            | _linear(rng, f"{stem}lora_B_adapter", out, experts, bias)
            | {f"{stem}lora_A.weight": _matrix(rng, r, width)}
            | {f"{stem}lora_B.weight": _matrix(rng, out, r)}
        )
    tensors = {
        f"{stem}lora_A_adapter.weight": normal(rng, r * width, experts) / math.sqrt(width),
        f"{stem}lora_B_adapter.weight": normal(rng, r * out, experts),
    }
    if mode == "ctr":
        return (
            tensors
            | _norm(rng, f"{stem}ctr_final_layer.0", user)
            | _linear(rng, f"{stem}ctr_final_layer.1", 6, user)
            | _linear(rng, f"{stem}ctr_final_layer.4", experts, 6)
        )
    if mode == "token":
        return (
            tensors
            | _norm(rng, f"{stem}gating_final_layer.0", width + user)
            | _linear(rng, f"{stem}gating_final_layer.1", experts, width + user)
        )
    return (
        tensors
        | _linear(rng, f"{stem}key_layer.0", 8, r * (width + out))
        | _linear(rng, f"{stem}key_layer.2", user, 8)
        | _linear(rng, f"{stem}query_layer", user, user)
        | _linear(rng, f"{stem}attention_layer.0.dnn.0", 4 * user, 4 * user)
        | _linear(rng, f"{stem}attention_layer.0.dnn.3", 4 * user, 4 * user)
        | _linear(rng, f"{stem}attention_layer.1", 1, 4 * user)
    )


class Files:
    """A folder's tensors in float64, its config and its settings; nothing is checked."""

    def __init__(self, folder: Path) -> None:
        file = sorted(folder.glob("*.safetensors"))[0]
        self.tensors = {n: t.double() for n, t in load_file(file).items()}
        self.config, self.settings = (
            json.loads((folder / name).read_text()) if (folder / name).exists() else {}
            for name in ("adapter_config.json", "routing.json")
        )

    def layers(self) -> set[str]:
        """The adapted layers, as a transformers model names them."""
        found = set()
        for name in self.tensors:
            if m := re.match(r"lorec_layers\.(\w+)\.(\d+)\.", name):
                found.add(f"model.layers.{m[2]}.{NAMES[m[1]]}")
            elif m := re.match(rf"{re.escape(LLAMA)}layers\.(\d+)\.attention\.w(\w)_lora", name):
                found.add(f"model.layers.{m[1]}.self_attn.{m[2]}_proj")
            elif m := re.search(r"(model\.layers\.\d+\.\w+\.\w+)\.([VL]_S)?lora_[AB]", name):
                found.add(m[1])
        return found

    def pair(self, layer: str, letter: str) -> torch.Tensor:
        """PEFT's A or B, under any of its names."""
        form = rf"(base_model\.model\.)?{re.escape(layer)}\.lora_{letter}(\.default)?\.weight"
        (found,) = (name for name in self.tensors if re.fullmatch(form, name))
        return self.tensors[found]

    def linear(self, stem: str, x: torch.Tensor) -> torch.Tensor:
        bias = self.tensors.get(f"{stem}.bias")
        y = x @ self.tensors[f"{stem}.weight"].T
        return y if bias is None else y + bias

    def norm(self, stem: str, x: torch.Tensor) -> torch.Tensor:
        z = (x - x.mean()) / torch.sqrt(((x - x.mean()) ** 2).mean() + 1e-5)
        return z * self.tensors[f"{stem}.weight"] + self.tensors[f"{stem}.bias"]


def delta(folder: Path, layer: str, x_TK: torch.Tensor, given: Given) -> torch.Tensor:
    """[T, out] float64: what the adapter adds, token by token."""
    f = Files(folder)
    number, kind = int(layer.split(".")[2]), next(k for k, n in NAMES.items() if layer.endswith(n))
    x_TK, user_N = x_TK.double(), given.user_N.double()
    if "mode" in f.settings:
        stem = f"lorec_layers.{kind}.{number}."
        return torch.stack([_reclora_delta(f, stem, x, user_N) for x in x_TK])
    if "rope_layout" in f.settings:
        a, b = (f.tensors[f"{LLAMA}layers.{number}.attention.w{kind}_lora_{c}"] for c in "AB")
        y_TN = x_TK @ a @ b * _wavllm_gate(f, given.hidden_TK.double())
        if kind in "qk" and f.settings["rope_layout"] == "interleaved":
            y_TN = y_TN[:, _halves(y_TN.shape[1])]
        return y_TN
    rows = given.rows_TC.double()
    if f.config:
        c, a, b = f.config, f.pair(layer, "A"), f.pair(layer, "B")
        scale = c["lora_alpha"] / (math.sqrt(c["r"]) if c.get("use_rslora") else c["r"])
        acts = rows[:, :1] if c.get("alora_invocation_tokens") else 1
        return acts * (x_TK @ a.T @ b.T) * scale
    total = torch.zeros(())
    for i, (letter, key) in enumerate((("V", "scaling_visual"), ("L", "scaling_language"))):
        a, b = (f.tensors[f"{layer}.{letter}_Slora_{c}.weight"] for c in "AB")
        total = total + rows[:, i : i + 1] * (x_TK @ a.T @ b.T) * f.settings[key]
    return total


def _halves(rows: int) -> list[int]:
    """Row of the release that stands at each row of transformers."""
    half = HEAD // 2
    return [
        h * HEAD + 2 * i + j for h in range(rows // HEAD) for j in range(2) for i in range(half)
    ]


def _wavllm_gate(f: Files, hidden_TK: torch.Tensor) -> torch.Tensor:
    v = f.linear(f"{LLAMA}scale_fc_1", hidden_TK)
    v = f.linear(f"{LLAMA}scale_fc_2", v * 0.5 * (1 + torch.erf(v / math.sqrt(2))))
    a = torch.softmax(f.linear(f"{LLAMA}scale_weight_attention", v)[:, 0], dim=0)
    return sum(w * row for w, row in zip(a, v, strict=True)).clamp(0, 3)


def _reclora_delta(f: Files, stem: str, x: torch.Tensor, user: torch.Tensor) -> torch.Tensor:
    s = f.settings
    scale, r = s["lora_alpha"] / s["lora_r"], s["lora_r"]
    if s["mode"] == "finetune":
        c = f.linear(f"{stem}ctr_final_layer.1", f.norm(f"{stem}ctr_final_layer.0", user))
        a, b = (f.linear(f"{stem}lora_{letter}_adapter", c) for letter in "AB")
        return scale * b * f.linear(f"{stem}lora_B", a * f.linear(f"{stem}lora_A", x))
    big_a, big_b = (f.tensors[f"{stem}lora_{letter}_adapter.weight"] for letter in "AB")
    g = _reclora_logits(f, stem, x, user, big_a, big_b)
    if s["enable_softmax"]:
        g = torch.softmax(g / s["temperature"], dim=0)
        g = torch.sqrt(g) if s["enable_sqrt_after_softmax"] else g
    a = sum(g[m] * big_a[:, m].reshape(r, -1) for m in range(len(g)))
    b = sum(g[m] * big_b[:, m].reshape(r, -1) for m in range(len(g)))
    return scale * (a @ x) @ b


def _reclora_logits(
    f: Files, stem: str, x: torch.Tensor, user: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    match f.settings["which_in_gate"]:
        case "token":
            z = f.norm(f"{stem}gating_final_layer.0", torch.cat([x, user]))
            return f.linear(f"{stem}gating_final_layer.1", z)
        case "lora":
            q, logits = f.linear(f"{stem}query_layer", user), []
            for m in range(a.shape[1]):
                k = f.linear(f"{stem}key_layer.0", torch.cat([a[:, m], b[:, m]])).clamp(min=0)
                k = f.linear(f"{stem}key_layer.2", k)
                h = torch.cat([q, k, q - k, q * k])
                for n in (0, 3):
                    h = f.linear(f"{stem}attention_layer.0.dnn.{n}", h).clamp(min=0)
                logits.append(f.linear(f"{stem}attention_layer.1", h)[0])
            return torch.stack(logits) - max(logits)
    h = f.norm(f"{stem}ctr_final_layer.0", user)
    h = f.linear(f"{stem}ctr_final_layer.1", h).clamp(min=0)
    return f.linear(f"{stem}ctr_final_layer.4", h)
