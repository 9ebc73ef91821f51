"""Every system's formula written down a second time, from the papers and the authors' code.

    folder = Folder(path)
    for layer in folder.layers():
        y_N = delta(folder, layer, x_K)

Plain loops over one token's experts in float64, from the raw tensors and JSON of a folder. Nothing
of `routing` or of the readers is used: names, shapes and scales are taken from the files again.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn import functional

PREFIX = "base_model.model."
_MODULE = re.compile(r"(?:base_model\.model\.)?(model\.layers\.\d+\.(?:self_attn|mlp)\.[^.]+)\..+")
_MOE_PEFT = re.compile(r"(?:loramoe|mola|mixlora)\.(layers\.\d+\.(?:self_attn|mlp)\.[^.]+)\..+")
_LEGACY = {"gate_proj": "w1_proj", "down_proj": "w2_proj", "up_proj": "w3_proj"}
Weights = Mapping[int, float]
Expert = tuple[torch.Tensor, torch.Tensor]  # A [r, in], B [out, r]


class Folder:
    """An adapter's files as they are; nothing is checked."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self._json("adapter_config.json")
        self.settings = self._json("routing.json")
        self._subfolders: dict[str, Folder] = {}

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        files = sorted(self.path.glob("*.safetensors"))
        return load_file(files[0]) if files else {}

    def _json(self, name: str) -> dict[str, Any]:
        file = self.path / name
        return json.loads(file.read_text()) if file.exists() else {}

    def sub(self, name: str) -> Folder:
        return self._subfolders.setdefault(name, Folder(self.path / name))

    @cached_property
    def system(self) -> str:
        """By the mark that is plainest to a reader of the files."""
        kinds = {
            "SRMOLE": "smora", "LORAMOE": "loramoe_moepeft", "MOLA": "mola_moepeft",
            "MMOELORA": "moelora", "MMOELORAS": "moelora", "ROUTED_LORA": "native",
            "MOLE": "adamole",
        }  # fmt: skip
        kind = self.config.get("peft_type")
        if kind not in (None, "LORA"):
            return kinds.get(kind, kind.lower())
        if kind is None:
            marks = {"moe_gate": "meteora", ".router.weight": "lora_mixer"}
            return next((s for m, s in marks.items() if self._has(m)), "arrow")
        marks = {
            "lora_topk_bias": "flylora", "router.router": "mola", "lora_A0.": "loramoe",
            "lora_B0.": "hydralora", "loranew_": "moram", ".coefficients": "nola",
        }  # fmt: skip
        found = next((system for mark, system in marks.items() if self._has(mark)), "")
        return found or ("moram" if "r_sum" in self.config else "plain")

    def _has(self, mark: str) -> bool:
        return any(mark in name for name in self.tensors)

    def layers(self) -> set[str]:
        """Names of all layers that a tensor belongs to, base weights left out."""
        if self.system == "arrow":
            return self.sub(self.settings["task_adapter_names"][0]).layers()
        found = set()
        for name in self.tensors:
            if self.system == "meteora" and not re.search(r"lora_|moe_gate", name):
                continue
            if match := _MODULE.fullmatch(name):
                found.add(match[1])
            elif match := _MOE_PEFT.fullmatch(name):
                found.add(f"model.{match[1]}")
        if self.system == "mixlora":
            return {name for name in found if ".self_attn." in name}
        return found

    def blocks(self) -> set[str]:
        """MixLoRA's MLP blocks."""
        marks = (re.match(r"mixlora\.layers\.(\d+)\.(mlp\.moe_)?gate\.w", n) for n in self.tensors)
        return {f"model.layers.{match[1]}.mlp" for match in marks if match}


class Layer:
    """One layer's tensors in fp64, by the name behind the layer's own."""

    def __init__(self, folder: Folder, name: str) -> None:
        self.folder, self.name = folder, name
        self.config, self.settings = folder.config, folder.settings
        self._made: dict[str, Any] = {}

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """What does not depend on the token, made once."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _spellings(self, part: str) -> list[str]:
        short = self.name.removeprefix("model.")
        if self.folder.system in ("loramoe_moepeft", "mola_moepeft", "mixlora"):
            return [f"{self.folder.system.removesuffix('_moepeft')}.{short}.{part}"]
        named = re.sub(r"\.weight$", ".default.weight", part)
        return [f"{prefix}{self.name}.{p}" for prefix in (PREFIX, "") for p in {part, named}]

    def has(self, part: str) -> bool:
        return any(name in self.folder.tensors for name in self._spellings(part))

    def raw(self, part: str) -> torch.Tensor:
        found = [name for name in self._spellings(part) if name in self.folder.tensors]
        assert len(found) == 1, f"{self.name}.{part}: {found}"
        return self.folder.tensors[found[0]]

    def __getitem__(self, part: str) -> torch.Tensor:
        found: torch.Tensor = self.once(part, lambda: self.raw(part).double())
        return found

    def scale(self, rank: str = "r") -> float:
        c = self.config
        return c["lora_alpha"] / (math.sqrt(c[rank]) if c.get("use_rslora") else c[rank])

    def sub(self, name: str) -> Layer:
        """The same layer in a subfolder."""
        return Layer(self.folder.sub(name), self.name)


def softmax(values: Sequence[float]) -> list[float]:
    top = max(values)
    powers = [math.exp(v - top) for v in values]
    return [p / sum(powers) for p in powers]


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def largest(values: Sequence[float], k: int) -> list[int]:
    """Indices of the k largest."""
    return sorted(range(len(values)), key=lambda i: -values[i])[:k]


def mix(weights: Weights, experts: Sequence[Expert], x: torch.Tensor) -> torch.Tensor:
    """sum_e w_e B_e A_e x."""
    total = torch.zeros(experts[0][1].shape[0], dtype=torch.float64)
    for e, weight in weights.items():
        a, b = experts[e]
        total += weight * (b @ (a @ x))
    return total


def renormalised(p: Sequence[float], chosen: Sequence[int]) -> dict[int, float]:
    total = sum(p[e] for e in chosen)
    return {e: p[e] / total for e in chosen}


def floats(vector: torch.Tensor) -> list[float]:
    return [float(v) for v in vector]


def plain(f: Layer, x: torch.Tensor) -> torch.Tensor:
    return f["lora_B.weight"] @ (f["lora_A.weight"] @ x) * f.scale()


def smora(f: Layer, x: torch.Tensor) -> torch.Tensor:
    c = f.config
    scores = [sigmoid(v) for v in floats(f["lora_router.weight"] @ x)]
    bias = f["lora_biases"]
    q = [scores[i // c["rank_partition"]] + float(bias[i]) for i in range(c["r"])]
    chosen = largest(q, c["activate_r"])
    total = sum(q[i] for i in chosen)
    y = torch.zeros(f["lora_B.weight"].shape[0], dtype=torch.float64)
    for i in chosen:
        gate = q[i] / total * c["activate_r"]
        y += gate * float(f["lora_A.weight"][i] @ x) * f["lora_B.weight"][:, i]
    return y * c["lora_alpha"] / c["activate_r"]


def flylora(f: Layer, x: torch.Tensor) -> torch.Tensor:
    c, a, b = f.config, f["lora_A.weight"], f["lora_B.weight"]
    rank, last = a.shape[0], f.name.rsplit(".", 1)[1]
    assert rank == c["rank_pattern"].get(last, c["r"])
    alpha = c["alpha_pattern"].get(last, c["lora_alpha"])
    z = floats(a @ x)
    key = [v + float(d) for v, d in zip(z, f["lora_topk_bias"], strict=True)]
    if f.settings["select"] == "abs":
        key = [abs(v) for v in key]
    y = torch.zeros(b.shape[0], dtype=torch.float64)
    for i in largest(key, c["top_k"]):
        y += z[i] * b[:, i]
    return y * alpha / (math.sqrt(rank) if c["use_rslora"] else rank)


def moram(f: Layer, x: torch.Tensor) -> torch.Tensor:
    c, s = f.config, f.settings
    rows = [(f["lora_A.weight"], f["lora_B.weight"], 1.0)]
    if f.has("loranew_A.weight"):
        rows.append((f["loranew_A.weight"], f["loranew_B.weight"], f.scale()))
    z = [v for a, _, _ in rows for v in floats(a @ x)]
    columns = [(b[:, i], scale) for _, b, scale in rows for i in range(b.shape[1])]
    norm = math.sqrt(sum(v * v for v in z))
    n = [v / norm for v in z]
    k = c["moram_topk"] if c.get("moram_topk") is not None else s["top_k"]
    chosen = largest(n, min(max(k, 2), len(n)))
    y = torch.zeros(len(columns[0][0]), dtype=torch.float64)
    for i, w in zip(chosen, softmax([n[i] / s["tau"] for i in chosen]), strict=True):
        if s["delta"] <= 0 or n[i] >= s["delta"]:
            y += w * z[i] * columns[i][1] * columns[i][0]
    return y


def mola(f: Layer, x: torch.Tensor) -> torch.Tensor:
    layer, s = int(f.name.split(".")[2]), f.settings
    k = s["top_k"] if isinstance(s["top_k"], int) else s["top_k"][layer]
    p = softmax(floats(f["router.router.weight"] @ x))
    names = [(f"lora_A_{e}.weight", f"lora_B_{e}.weight") for e in range(len(p))]
    experts = [(f[a], f[b]) for a, b in names]
    y = mix(renormalised(p, largest(p, k)), experts, x)
    return y * f.config["lora_alpha"] / f.config["r"][layer]


def loramoe(f: Layer, x: torch.Tensor) -> torch.Tensor:
    p = softmax(floats(f["lora_route.weight"] @ x))
    experts = [(f[f"lora_A{e}.weight"], f[f"lora_B{e}.weight"]) for e in range(len(p))]
    return mix(dict(enumerate(p)), experts, x) * f.scale()


def hydralora(f: Layer, x: torch.Tensor) -> torch.Tensor:
    p = softmax(floats(f["lora_route.weight"] @ x))
    experts = [(f["lora_A.weight"], f[f"lora_B{e}.weight"]) for e in range(len(p))]
    return mix(dict(enumerate(p)), experts, x) * f.scale()


def moe_peft(f: Layer, x: torch.Tensor) -> torch.Tensor:
    if f.folder.system == "loramoe_moepeft" and ".self_attn." in f.name:
        return plain(f, x)
    p = softmax(floats(f["moe_gate.weight"] @ x))
    stems = [f"experts.{e}.lora_" for e in range(f.config["num_experts"])]
    experts = [(f[f"{stem}A.weight"], f[f"{stem}B.weight"]) for stem in stems]
    k = f.config["top_k"] if f.folder.system == "mola_moepeft" else len(p)
    return mix(renormalised(p, largest(p, k)), experts, x) * f.scale()


def adamole(f: Layer, x: torch.Tensor) -> torch.Tensor:
    c = f.config
    p = softmax(floats(f["lora_gating.weight"] @ x))
    names = [(f"lora_A.{e}.weight", f"lora_B.{e}.weight") for e in range(c["num_experts"])]
    experts = [(f[a], f[b]) for a, b in names]
    if c["peft_type"] == "ADAMOLE":
        highest = 1 / len(p) if c["max_threshold"] is None else c["max_threshold"]
        logit = float(f["lora_threshold.weight"][0] @ x) + float(f["lora_threshold.bias"])
        t = highest * sigmoid(logit)
        above = {e: v - t for e, v in enumerate(p) if v >= t}
        total = sum(above.values())
        weights = {e: v / total for e, v in above.items()} if total else {}
    elif c.get("top_k") is not None:
        weights = renormalised(p, largest(p, c["top_k"]))
    else:
        weights = renormalised(p, [e for e, v in enumerate(p) if v >= c["threshold"]])
    return mix(weights, experts, x) * f.scale("lora_rank")


def meteora(f: Layer, x: torch.Tensor) -> torch.Tensor:
    s = f.settings
    logits = floats(f["moe_gate.weight"] @ x)
    chosen = largest(logits, s["top_k"])
    weights = softmax([logits[e] / s["temperature"] for e in chosen])
    tasks = [f.folder.sub(name).config for name in s["expert_order"]]
    y = torch.zeros(f["lora_B.weight"].shape[0], dtype=torch.float64)
    for e, w in zip(chosen, weights, strict=True):
        r, alpha = tasks[e]["r"], tasks[e]["lora_alpha"]
        own = slice(e * r, e * r + r)
        root = math.sqrt(r) if tasks[e]["use_rslora"] else r
        y += w * alpha / root * (f["lora_B.weight"][:, own] @ (f["lora_A.weight"][own] @ x))
    return y


def lora_mixer(f: Layer, x: torch.Tensor) -> torch.Tensor:
    s = f.settings
    p = softmax([v / s.get("temperature", 1) for v in floats(f["router.weight"] @ x)])
    chosen = largest(p, s["top_k"])
    weights = renormalised(p, chosen) if s.get("renormalise", True) else {e: p[e] for e in chosen}
    return sum(w * plain(f.sub(s["expert_order"][e]), x) for e, w in weights.items())


def moelora(f: Layer, x: torch.Tensor) -> torch.Tensor:
    c = f.config
    if c["peft_type"] == "MMOELORA":
        gate, embedding = f["lora_gate.GateL.weight"], f["lora_task_embedding.weight"]
    else:
        names = ("lora_gate.GateL.weight", "lora_task_embedding.weight")
        gate, embedding = (f.folder.tensors[name].double() for name in names)
    g = softmax(floats(gate @ embedding[f.settings["task_id"]]))
    stems = [(f"lora_A.loraA.{e}.mlp", f"lora_B.loraB.{e}.mlp") for e in range(c["expert_num"])]
    experts = [(f[f"{a}.weight"], f[f"{b}.weight"]) for a, b in stems]
    return mix(dict(enumerate(g)), experts, x) * c["lora_alpha"] / c["r"]


def poly(f: Layer, x: torch.Tensor) -> torch.Tensor:
    c = f.config
    logits = f["poly_router.module_logits"][f.settings["task_id"]]
    rows = logits.view(c["n_splits"], c["n_skills"])
    slices, low = x.view(c["n_splits"], -1), torch.zeros(c["r"], dtype=torch.float64)
    weights = [[sigmoid(v) for v in floats(row)] for row in rows]
    weights = [[v / sum(row) for v in row] for row in weights]
    for q, row in enumerate(weights):
        for s, w in enumerate(row):
            low += w * slices[q] @ f["poly_lora_A"][q, s]
    out = [
        sum(w * low @ f["poly_lora_B"][q, s] for s, w in enumerate(row))
        for q, row in enumerate(weights)
    ]
    return torch.cat(out) / c["r"]


def arrow(f: Layer, x: torch.Tensor) -> torch.Tensor:
    s = f.settings
    scaled, prototypes = f.once("experts", lambda: _arrow_experts(f, s))
    scores = [abs(float(prototype @ x)) for prototype in prototypes]
    chosen = largest(scores, s["top_k"])
    weights = softmax([scores[e] / s["router_temperature"] for e in chosen])
    return mix(dict(zip(chosen, weights, strict=True)), scaled, x)


def _arrow_experts(f: Layer, s: dict[str, Any]) -> tuple[list[Expert], list[torch.Tensor]]:
    tasks = [f.sub(name) for name in s["task_adapter_names"]]
    general = [f.sub(name) for name in s.get("gks_adapter_names", ())]
    if s.get("use_gks") is False:  # not said is true where there are any
        general = []
    scaled, prototypes = [], []
    for task in tasks:
        a, b = task["lora_A.weight"], task["lora_B.weight"]
        if general:
            a = a - sum(g["lora_A.weight"] for g in general) / len(general)
            b = b - sum(g["lora_B.weight"] for g in general) / len(general)
        prototypes.append(_prototype(a, b, s))
        scaled.append((a, b * task.scale()))
    return scaled, prototypes


def _prototype(a: torch.Tensor, b: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    delta = b @ a
    if settings.get("prototypes") == "svd":
        return torch.linalg.svd(delta).Vh[0]
    # PEFT draws the start in fp32 and stops after 15 steps, wherever that is.
    generator = torch.Generator().manual_seed(settings["rng_seed"])
    v = torch.randn(a.shape[1], generator=generator).double()
    for _ in range(15):
        v = delta.T @ (delta @ v)
        v = v / v.norm()
    return v


def native(f: Layer, x: torch.Tensor) -> torch.Tensor:
    """docs/native_format.md: y += B (g * (A x)), g by the rows of the gate table."""
    a, b = f["lora_A.weight"], f["lora_B.weight"]
    routing, words = f.config["routing"], f.name.split(".")
    tails = [".".join(words[i:]) for i in range(len(words))]
    own = next((routing["modules"][t] for t in tails if t in routing["modules"]), None)
    gate = routing["default"] if own is None else own
    source, z = gate.get("source", "none"), a @ x
    if source == "none":
        return b @ z
    u = floats(z) if source == "self" else floats(f["router.weight"] @ x)
    score = _native_score(u, gate)
    value, key = list(score), list(score)
    kind = gate.get("bias", "none")
    if kind != "none":
        key = [v + d for v, d in zip(score, floats(f["router.bias"]), strict=True)]
        value = key if kind == "value" else value
    if gate.get("key") == "abs":
        key = [abs(v) for v in key]
    threshold = gate.get("threshold", 0.0)
    if gate.get("threshold_head"):
        threshold *= sigmoid(float(f["threshold.weight"][0] @ x) + float(f["threshold.bias"]))
    chosen = _native_choice(key, gate, threshold)
    if gate.get("subtract_threshold"):
        value = [v - threshold for v in value]
    weights = _native_weights(value, chosen, gate)
    g = torch.zeros(len(u), dtype=torch.float64)
    for i, w in weights.items():
        below = gate.get("mask_below")
        g[i] = 0.0 if below is not None and score[i] < below else w * gate.get("constant", 1.0)
    return b @ (g.repeat_interleave(torch.tensor(gate["blocks"])) * z)


def _native_score(u: list[float], gate: dict[str, Any]) -> list[float]:
    match gate.get("score", "identity"):
        case "softmax":
            return softmax([v / gate.get("score_temperature", 1) for v in u])
        case "sigmoid":
            return [sigmoid(v) for v in u]
        case "l2":
            return [v / math.sqrt(sum(w * w for w in u)) for v in u]
        case "abs":
            return [abs(v) for v in u]
    return u


def _native_choice(key: list[float], gate: dict[str, Any], threshold: float) -> list[int]:
    match gate.get("select", "all"):
        case "top_k":
            return largest(key, gate["k"])
        case "threshold":
            return [i for i, v in enumerate(key) if v >= threshold]
        case "top_p":
            chosen, total = [], 0.0
            for i in largest(key, len(key)):
                if total >= gate.get("top_p", 1.0):
                    break
                chosen.append(i)
                total += key[i]
            return chosen
    return list(range(len(key)))


def _native_weights(
    value: list[float], chosen: list[int], gate: dict[str, Any]
) -> dict[int, float]:
    match gate.get("weight", "score"):
        case "renormalise":
            return renormalised(value, chosen) if sum(value[i] for i in chosen) else {}
        case "softmax":
            w = softmax([value[i] / gate.get("temperature", 1) for i in chosen])
            return dict(zip(chosen, w, strict=True))
        case "one":
            return dict.fromkeys(chosen, 1.0)
    return {i: value[i] for i in chosen}


def _matched(pattern: dict[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT: the first key that matches the name's tail."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def adalora(f: Layer, x: torch.Tensor) -> torch.Tensor:
    alpha, e = f.config["lora_alpha"], f["lora_E"][:, 0]
    scale = (alpha if alpha > 0 else len(e)) / (f.config["init_r"] + 1e-5)
    return f["lora_B"] @ (e * (f["lora_A"] @ x)) * scale


def loha(f: Layer, x: torch.Tensor) -> torch.Tensor:
    c = f.config
    alpha = _matched(c.get("alpha_pattern"), f.name, c["alpha"])
    delta = (f["hada_w1_a"] @ f["hada_w1_b"]) * (f["hada_w2_a"] @ f["hada_w2_b"])
    return delta @ x * alpha / _matched(c.get("rank_pattern"), f.name, c["r"])


def lokr(f: Layer, x: torch.Tensor) -> torch.Tensor:
    c, sides = f.config, []
    for side in ("lokr_w1", "lokr_w2"):
        sides.append(f[side] if f.has(side) else f[f"{side}_a"] @ f[f"{side}_b"])
    alpha = _matched(c.get("alpha_pattern"), f.name, c["alpha"])
    rank = _matched(c.get("rank_pattern"), f.name, c["r"])
    return torch.kron(*sides) @ x * alpha / rank


def delora(f: Layer, x: torch.Tensor) -> torch.Tensor:
    a, b = f["delora_A"], f["delora_B"]
    low = a @ (f["delora_w_norm"] * x)
    low = low / a.norm(dim=1).clamp_min(1e-4) / b.norm(dim=0).clamp_min(1e-4)
    return b @ low * float(f["delora_lambda"]) / a.shape[0]


def gralora(f: Layer, x: torch.Tensor) -> torch.Tensor:
    c, a, b = f.config, f["gralora_A"], f["gralora_B"]
    k, small, slices = c["gralora_k"], a.shape[2] // c["gralora_k"], x.view(c["gralora_k"], -1)
    out = []
    for m in range(k):
        y = torch.zeros(b.shape[2], dtype=torch.float64)
        for n in range(k):
            low = slices[n] @ a[n][:, m * small : (m + 1) * small]
            y += low @ b[m][n * small : (n + 1) * small]
        out.append(y)
    total = torch.cat(out)
    if c["hybrid_r"]:
        total = total + f["gralora_B_general.weight"] @ (f["gralora_A_general.weight"] @ x)
    return total * c["alpha"] / (a.shape[2] + c["hybrid_r"])


def miss(f: Layer, x: torch.Tensor) -> torch.Tensor:
    block, out = f["miss_block"], _size(f)[1]
    folded = torch.zeros(block.shape[0], dtype=torch.float64)
    for j, value in enumerate(x):
        folded[j % block.shape[0]] += value
    y = folded @ block
    return torch.stack([y[i % block.shape[1]] for i in range(out)])


def _size(f: Layer) -> list[int]:
    table = f.settings["sizes"]
    return table[f.name] if f.name in table else table[f.name.rsplit(".", 1)[1]]


def vera(f: Layer, x: torch.Tensor) -> torch.Tensor:
    c = f.config
    width, out = _size(f)
    if c["save_projection"]:
        a, b = (f.folder.tensors[f"base_model.vera_{side}"].double() for side in "AB")
    else:
        a, b = f.once("drawn", lambda: _vera_projections(f))
    low = f["vera_lambda_d"] * (a[:, :width] @ x)
    return f["vera_lambda_b"] * (b[:out] @ low)


def _vera_projections(f: Layer) -> list[torch.Tensor]:
    sizes = [_size(Layer(f.folder, name)) for name in f.folder.layers()]
    generator = torch.Generator().manual_seed(f.config["projection_prng_key"])
    rank, drawn = f.config["r"], []
    for shape in ((rank, max(s[0] for s in sizes)), (max(s[1] for s in sizes), rank)):
        matrix = torch.empty(shape)
        torch.nn.init.kaiming_uniform_(matrix, a=0, generator=generator)
        drawn.append(matrix.double())
    return drawn


def vblora(f: Layer, x: torch.Tensor) -> torch.Tensor:
    a, b = f.once("pieces", lambda: (_vblora_side(f, "A"), _vblora_side(f, "B")))
    return b.T @ (a @ x)


def _vblora_side(f: Layer, side: str) -> torch.Tensor:
    """[r, in] or [r, out]: A, or B transposed, piece by piece."""
    bank, k = f.folder.tensors["base_model.vblora_vector_bank"].double(), f.config["topk"]
    stem = f"vblora_logits_{side}"

    def piece(i: int, j: int) -> torch.Tensor:
        if f.has(stem):
            chosen = largest(floats(f[stem][i, j]), k)
            weights = softmax([float(f[stem][i, j, c]) for c in chosen])
        else:
            chosen = [int(c) for c in f.raw(f"{stem}_topk_indices")[i, j]]
            assert len(chosen) == k
            weights = floats(f[f"{stem}_topk_weights"][i, j])
            weights.append(1 - sum(weights))
        return sum(w * bank[c] for c, w in zip(chosen, weights, strict=True))

    rows, columns = f.raw(stem if f.has(stem) else f"{stem}_topk_indices").shape[:2]
    table = [[piece(i, j) for j in range(columns)] for i in range(rows)]
    if side == "B":
        table = [[table[i][j] for i in range(rows)] for j in range(columns)]
    return torch.stack([torch.cat(row) for row in table])


def nola(f: Layer, x: torch.Tensor) -> torch.Tensor:
    a, b = f.once("expanded", lambda: (_nola_side(f, "A"), _nola_side(f, "B")))
    return b @ (a @ x) * f.scale()


def _nola_side(f: Layer, side: str) -> torch.Tensor:
    matrix, values = f[f"lora_{side}.weight"].clone(), f[f"lora_{side}.coefficients"]
    generator = torch.Generator().manual_seed(int(f.raw(f"lora_{side}.seed")))
    for value in values:
        drawn = torch.empty(matrix.shape).uniform_(-1, 1, generator=generator)
        matrix += value * drawn.double() / math.sqrt(f.config["nola_num_basis"])
    return matrix


def unilora(f: Layer, x: torch.Tensor) -> torch.Tensor:
    theta = f.folder.tensors["base_model.unilora_theta_d"].double()
    a, b = (
        theta[f.raw(f"unilora_indices_{side}").long()] * f[f"unilora_scales_{side}"]
        for side in "AB"
    )
    return b @ (a @ x)


_FORMULAS: dict[str, Callable[[Layer, torch.Tensor], torch.Tensor]] = {
    "plain": plain, "mixlora": plain, "smora": smora, "flylora": flylora, "moram": moram,
    "mola": mola, "loramoe": loramoe, "hydralora": hydralora, "loramoe_moepeft": moe_peft,
    "mola_moepeft": moe_peft, "adamole": adamole, "meteora": meteora, "lora_mixer": lora_mixer,
    "moelora": moelora, "poly": poly, "arrow": arrow, "native": native, "adalora": adalora,
    "loha": loha, "lokr": lokr, "delora": delora, "gralora": gralora, "miss": miss, "vera": vera,
    "vblora": vblora, "nola": nola, "unilora": unilora,
}  # fmt: skip


def delta(layer: Layer, x_K: torch.Tensor) -> torch.Tensor:
    """[out] fp64: what the adapter adds to this layer's output for one token [in]."""
    return _FORMULAS[layer.folder.system](layer, x_K.double())


def mixlora_block(
    folder: Folder, block: str, x_K: torch.Tensor, weights: Mapping[str, torch.Tensor], act: str
) -> torch.Tensor:
    """[hidden] fp64: the whole MLP block's output for one token.

    Args:
        weights: the base's gate_proj, up_proj and down_proj, [out, in].
        act: the model's activation.
    """
    c, x = folder.config, x_K.double()
    number, old = block.split(".")[2], c["routing_strategy"] == "mixtral"
    stem = f"mixlora.layers.{number}"

    def low_rank(linear: str, e: int, h: torch.Tensor) -> torch.Tensor:
        name = f"{stem}.mlp.{linear}.experts.{e}"
        name = f"{stem}.experts.{e}.{_LEGACY[linear]}" if old else name
        if f"{name}.lora_A.weight" not in folder.tensors:
            return torch.zeros(weights[linear].shape[0], dtype=torch.float64)
        a, b = (folder.tensors[f"{name}.lora_{side}.weight"].double() for side in "AB")
        inner = c.get("expert_lora") or {}
        if "task_type" in inner or a.shape[0] != inner.get("r", a.shape[0]):
            inner = {}  # the package that writes task_type trains without it
        r, alpha = inner.get("r", c["r"]), inner.get("lora_alpha", c["lora_alpha"])
        root = math.sqrt(r) if inner.get("use_rslora", c.get("use_rslora")) else r
        return b @ (a @ h) * alpha / root

    def expert(e: int) -> torch.Tensor:
        gate, up, down = (weights[n].double() for n in ("gate_proj", "up_proj", "down_proj"))
        inner = _activation(c.get("act_fn") or act, gate @ x + low_rank("gate_proj", e, x))
        inner = inner * (up @ x + low_rank("up_proj", e, x))
        return down @ inner + low_rank("down_proj", e, inner)

    name = f"{stem}.gate.weight" if old else f"{stem}.mlp.moe_gate.weight"
    p = softmax(floats(folder.tensors[name].double() @ x))
    if c["routing_strategy"] != "mixlora-dynamic":
        chosen = renormalised(p, largest(p, c["top_k"]))
    else:
        p, chosen, total = [v / (c["temperature"] or 1) for v in p], {}, 0.0
        for e in largest(p, len(p)):
            if total >= c["top_p"]:
                break
            chosen[e] = p[e]
            total += p[e]
    return sum(v * expert(e) for e, v in chosen.items())


def _activation(name: str, x: torch.Tensor) -> torch.Tensor:
    known: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "silu": functional.silu, "gelu": functional.gelu, "relu": functional.relu,
    }  # fmt: skip
    return known[name](x)
