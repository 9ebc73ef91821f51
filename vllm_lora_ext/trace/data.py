"""Trace: the gates of one request, and their JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vllm_lora_ext.adapters.strict_json import parse_object
from vllm_lora_ext.errors import AdapterError

FORMAT = "vllm-lora-ext trace 1"
MAX_BYTES = 256 << 20  # of gates as fp32, in one process
_MOST_WEIGHT = torch.finfo(torch.float32).max
_KEYS = {
    "format", "adapter", "system", "base", "prompt_tokens", "token_ids", "tokens", "modules",
}  # fmt: skip


@dataclass(frozen=True)
class Usage:
    """How one module used its experts, over the tokens that were computed.

    Args:
        share: per expert, the share of tokens that chose it.
        mean_weight: per expert, its mean weight; not chosen counts as 0.
        entropy: in bits, of the mean |weight| made a distribution over the experts: 0 when one
            expert does all the work, log2(experts) when all do the same.
    """

    share: list[float]
    mean_weight: list[float]
    entropy: float


@dataclass(frozen=True)
class Trace:
    """The weights that the gates of one request gave their experts.

    Args:
        token_ids: T ids, the prompt and what was generated and computed; -1 where unknown. The
            last generated token has not been through the model, so it is not among them.
        weights: name of a routed layer (`model.layers.0.mlp.up_proj`), or of an MLP block whose
            experts are mixed after the non-linearity → [T, E] fp32 gate values. 0: not chosen;
            NaN: the token was not computed in this request (its KV came from elsewhere).
        prompt_tokens: how many of the tokens are the prompt's.
        tokens: T texts, where a tokenizer was at hand.
    """

    token_ids: list[int]
    weights: dict[str, torch.Tensor] = field(repr=False)
    prompt_tokens: int
    adapter: str = ""
    system: str = ""
    base: str = ""
    tokens: list[str] | None = None

    def with_tokens(self, tokens: Sequence[str]) -> Trace:
        """The same with the text of every token."""
        return replace(self, tokens=list(tokens))

    def usage(self) -> dict[str, Usage]:
        """Per module, how often and how strongly each expert was used."""
        return {name: _usage(weight_TE) for name, weight_TE in self.weights.items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready. Per module and token: the chosen experts and, beside them, their weights;
        null for a token that was not computed."""
        return {
            "format": FORMAT, "adapter": self.adapter, "system": self.system, "base": self.base,
            "prompt_tokens": self.prompt_tokens, "token_ids": self.token_ids,
            "tokens": self.tokens,
            "modules": {name: _sparse(weight_TE) for name, weight_TE in self.weights.items()},
        }  # fmt: skip

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Trace:
        """The inverse of `to_json`.

        Raises:
            AdapterError: `bad_json`, `unknown_version`, `bad_value`; `too_large`, a short text may
                stand for more than any process keeps.
        """
        given = parse_object(text.encode("utf-8", "surrogatepass"), "the trace")
        if given.get("format") != FORMAT:
            raise AdapterError(
                "unknown_version", "this is no trace of a known version", seen=given.get("format"),
                limit=FORMAT,
            )  # fmt: skip
        if set(given) != _KEYS:
            raise _bad("a key", ", ".join(sorted(_KEYS)), sorted(_KEYS ^ set(given)))
        ids, tokens = given["token_ids"], given["tokens"]
        if not _ints(ids) or not (tokens is None or _texts(tokens, len(ids))):
            raise _bad("token_ids or tokens", "T whole numbers, T texts or null")
        count = given["prompt_tokens"]
        if type(count) is not int or not 0 <= count <= len(ids):
            raise _bad("prompt_tokens", f"0 to {len(ids)}", count)
        if not isinstance(given["modules"], dict):
            raise _bad("modules", "an object")
        adapter, system, base = given["adapter"], given["system"], given["base"]
        if not all(isinstance(name, str) for name in (adapter, system, base)):
            raise _bad("adapter, system or base", "a text")
        _check_size(given["modules"], len(ids))
        weights = {name: _dense(name, m, len(ids)) for name, m in given["modules"].items()}
        return cls(ids, weights, count, adapter, system, base, tokens)

    @classmethod
    def merged(cls, parts: Iterable[Trace]) -> Trace:
        """One trace of the same request from engine processes that hold different layers, or the
        same: every rank of a tensor-parallel group decides alike."""
        first, *rest = parts
        weights = dict(first.weights)
        for part in rest:
            weights = {**part.weights, **weights}
        return replace(first, weights=dict(sorted(weights.items(), key=lambda i: natural(i[0]))))


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    parts = name.split(".")
    return [(int(p), "") if p.isdecimal() and len(p) < 20 else (-1, p) for p in parts]


def _usage(weight_TE: torch.Tensor) -> Usage:
    seen_TE = weight_TE[~weight_TE.isnan().any(dim=1)]
    if not len(seen_TE):
        zeros = [0.0] * weight_TE.shape[1]
        return Usage(zeros, zeros, 0.0)
    strength_E = seen_TE.abs().double().mean(dim=0)
    total = strength_E.sum().item()
    parts = [s / total for s in strength_E.tolist() if s > 0] if total else []
    return Usage(
        (seen_TE != 0).double().mean(dim=0).tolist(),
        seen_TE.double().mean(dim=0).tolist(),
        abs(sum(p * math.log2(p) for p in parts)),
    )


def _sparse(weight_TE: torch.Tensor) -> dict[str, Any]:
    experts: list[list[int] | None] = []
    weights: list[list[float] | None] = []
    for row in weight_TE.tolist():
        if any(w != w for w in row):
            experts.append(None)
            weights.append(None)
            continue
        chosen = [e for e, w in enumerate(row) if w]
        experts.append(chosen)
        weights.append([float(f"{row[e]:.9g}") for e in chosen])  # nine digits keep any fp32
    return {"num_experts": weight_TE.shape[1], "experts": experts, "weights": weights}


def _check_size(modules: dict[str, Any], num_tokens: int) -> None:
    counts = [_num_experts(name, given) for name, given in modules.items()]
    size = 4 * num_tokens * sum(counts)
    if size > MAX_BYTES:
        raise AdapterError(
            "too_large", "the trace needs more memory than is given to traces",
            seen=f"{size >> 20} MB", limit=f"{MAX_BYTES >> 20} MB", fix="trace a shorter request",
        )  # fmt: skip


def _num_experts(name: str, given: Any) -> int:
    if not isinstance(given, dict) or set(given) != {"num_experts", "experts", "weights"}:
        raise _bad(name, "an object of num_experts, experts and weights")
    count = given["num_experts"]
    if type(count) is not int or not 1 <= count <= 1 << 16:
        raise _bad(f"num_experts of {name}", f"1 to {1 << 16}", count)
    return count


def _dense(name: str, given: dict[str, Any], num_tokens: int) -> torch.Tensor:
    """[num_tokens, num_experts] of a module that `_check_size` has let pass."""
    count, experts, weights = given["num_experts"], given["experts"], given["weights"]
    lists = isinstance(experts, list) and isinstance(weights, list)
    if not lists or not len(experts) == len(weights) == num_tokens:
        raise _bad(name, f"experts and weights of {num_tokens} tokens")
    weight_TE = torch.full((num_tokens, count), float("nan"), dtype=torch.float32)
    for t, (chosen, values) in enumerate(zip(experts, weights, strict=True)):
        if chosen is None and values is None:
            continue
        fits = _ints(chosen) and _numbers(values) and len(chosen) == len(values)
        if not fits or len(set(chosen)) < len(chosen) or not all(0 <= e < count for e in chosen):
            raise _bad(f"token {t} of {name}", f"experts 0 to {count - 1}, a number for each")
        weight_TE[t] = 0.0
        weight_TE[t, chosen] = torch.tensor([float(v) for v in values], dtype=torch.float32)
    return weight_TE


def _ints(value: Any) -> bool:
    return isinstance(value, list) and all(type(i) is int for i in value)


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(i) in (int, float) and abs(i) <= _MOST_WEIGHT for i in value
    )


def _texts(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(type(t) is str for t in value)


def _bad(what: str, limit: str, seen: object = None) -> AdapterError:
    return AdapterError("bad_value", f"{what} in the trace is wrong", seen=seen, limit=limit)
