"""GateSpec: how one linear layer's experts are chosen and weighted, as a row of one table.

    y = W x + B · ( g(x) ⊙ (A x) )
    g = expand( constant · mask( weight( select( score(u) ) ) ), block )

All G gates of a layer are described by one frozen `GateSpec`; its tensors (router matrix, bias,
threshold head) stand beside it in the adapter, never in it. `routing.reference` computes it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Source = Literal[
    "none", "router", "self", "prototype", "request", "position", "classifier", "attention"
]
Score = Literal["identity", "softmax", "sigmoid", "l2", "abs"]
Select = Literal["all", "top_k", "threshold", "top_p"]
Weight = Literal["score", "renormalise", "softmax", "one", "sqrt"]
Key = Literal["signed", "abs"]
Bias = Literal["none", "select", "value"]
Normalise = Literal["none", "layer"]

ROUTED = ("router", "prototype")  # u is a matrix times x
GIVEN = ("request", "position", "classifier")  # u comes with each row


class GateSpecError(ValueError):
    """A field of a GateSpec is out of range. `field` names it, `seen` and `allowed` say how."""

    def __init__(self, field: str, seen: object, allowed: str) -> None:
        self.field, self.seen, self.allowed = field, seen, allowed
        super().__init__(f"{field} is {seen!r}; allowed: {allowed}")


@dataclass(frozen=True)
class GateSpec:
    """One row of the gate table.

    Args:
        source: what the logits `u` [T, G] are: `router` and `prototype`, a matrix [G, in] times x;
            `self`, the projection A x itself (then G = R and every block is 1); `request`,
            `position` and `classifier`, numbers that come with each row, given by the request, by
            where the token stands, or by a classifier of the base model's last hidden state;
            `attention`, no number multiplies: A x gets its attention over earlier tokens' A x added
            (`routing.attention`), blocks are heads, and no other field may be set;
            `none`, no gate (g = 1, a plain LoRA; everything else keeps its default).
        normalise: `layer`, the router reads LayerNorm(x) without an affine part (`InputNorm`
            stands beside the router); normalise_eps is added to the variance.
        blocks: ranks per gate, one entry per gate; their sum is R.
        score: elementwise or over the G gates, in fp32. `l2` divides by the L2 norm over the gates.
        score_temperature: divides the logits before a softmax score.
        bias: a stored vector [G] added to the score. `select`: only the choice sees it (FlyLoRA);
            `value`: the gate's value carries it too (SMoRA).
        select: which gates stay. `top_k` takes `k`, ties to the lower index; `threshold` keeps
            score >= threshold; `top_p` keeps a gate while the sum of the scores ranked before it
            is below `top_p`: the largest ones up to and including the one that reaches it.
        key: what the selection looks at: the signed score (with its bias) or its magnitude.
        k: gates kept by top_k, 1..G.
        threshold: static threshold; with `threshold_head`, the maximum that the head scales.
        threshold_head: the threshold is `threshold * sigmoid(h x + c)`, learned, one per token
            (AdaMoLE); head weight [1, in] and bias [1] stand in the adapter.
        subtract_threshold: a kept gate's value is score - threshold (AdaMoLE).
        top_p: 0 < top_p <= 1.
        weight: value of a kept gate: its score, the score divided by the kept scores' sum,
            a softmax over the kept scores divided by `temperature`, one, or the square root of its
            score (0 for a negative one).
        temperature: of that softmax.
        mask_below: gates whose score (without bias) is below this are zeroed after weighting
            (MoRAM's delta).
        constant: multiplies every gate.
        product: A and B are mixed apart, `y = (sum_n g_n B_n) (sum_m g_m A_m) x` (RecLoRA); all
            blocks have one rank.
    Raises:
        GateSpecError: a field is out of range or contradicts another.
    """

    source: Source = "none"
    normalise: Normalise = "none"
    normalise_eps: float = 1e-5
    blocks: tuple[int, ...] = ()
    score: Score = "identity"
    score_temperature: float = 1.0
    bias: Bias = "none"
    select: Select = "all"
    key: Key = "signed"
    k: int = 0
    threshold: float = 0.0
    threshold_head: bool = False
    subtract_threshold: bool = False
    top_p: float = 1.0
    weight: Weight = "score"
    temperature: float = 1.0
    mask_below: float | None = None
    constant: float = 1.0
    product: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.blocks, (list, tuple)):
            raise GateSpecError("blocks", self.blocks, "a list of ranks, one per gate")
        object.__setattr__(self, "blocks", tuple(self.blocks))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise GateSpecError(name, getattr(self, name), " | ".join(choices))
        for name in _FLOATS:
            value = getattr(self, name)
            if not _is_finite(value) and not (name == "mask_below" and value is None):
                raise GateSpecError(name, value, "a finite number")
        for name in ("score_temperature", "temperature", "normalise_eps"):
            if getattr(self, name) <= 0:
                raise GateSpecError(name, getattr(self, name), "> 0")
        for name in ("threshold_head", "subtract_threshold", "product"):
            if not isinstance(getattr(self, name), bool):
                raise GateSpecError(name, getattr(self, name), "true or false")
        if self.source == "none":
            if self != _PLAIN:
                raise GateSpecError("source", "none", "no other field set; a gate needs a source")
            return
        self._check_gate()

    def _check_gate(self) -> None:
        if not self.blocks or any(type(b) is not int or b < 1 for b in self.blocks):
            raise GateSpecError("blocks", self.blocks, "one rank >= 1 per gate")
        if self.source == "self" and any(b != 1 for b in self.blocks):
            raise GateSpecError("blocks", self.blocks, "1 for every rank when source is 'self'")
        if self.source == "attention":
            if len(set(self.blocks)) != 1:
                raise GateSpecError("blocks", self.blocks, "one size for all heads")
            for name in self.to_dict().keys() - {"source", "blocks"}:
                raise GateSpecError(name, getattr(self, name), "no other field with 'attention'")
        if self.product and len(set(self.blocks)) != 1:
            raise GateSpecError("blocks", self.blocks, "one rank for all gates of a product")
        if self.normalise != "none" and self.source not in ROUTED:
            raise GateSpecError("normalise", self.normalise, "'none' without a router")
        if self.select == "top_k":
            if type(self.k) is not int or not 1 <= self.k <= self.num_gates:
                raise GateSpecError("k", self.k, f"1 to {self.num_gates}, the number of gates")
        elif type(self.k) is not int or self.k != 0:
            raise GateSpecError("k", self.k, "only with select 'top_k'")
        for name, (switch, needed) in _ONLY_WITH.items():
            # A setting that does nothing is a mistake: the author meant it to do something.
            if getattr(self, name) != getattr(_PLAIN, name) and getattr(self, switch) != needed:
                raise GateSpecError(name, getattr(self, name), f"only with {switch} '{needed}'")
        if self.select == "all" and self.key != "signed":
            raise GateSpecError("key", self.key, "'signed' when select is 'all'")
        if not 0 < self.top_p <= 1:
            raise GateSpecError("top_p", self.top_p, "0 < top_p <= 1")
        if self.select != "threshold" and (self.threshold_head or self.subtract_threshold):
            raise GateSpecError("select", self.select, "'threshold' when threshold fields are set")

    @property
    def num_gates(self) -> int:
        """G, the number of gates; 0 for a plain LoRA."""
        return len(self.blocks)

    @property
    def weighs(self) -> bool:
        """Whether numbers multiply A x, which can be shown."""
        return self.source not in ("none", "attention")

    @property
    def router_rows(self) -> int:
        """Rows of the router, which the shrink computes like more rows of A."""
        return self.num_gates if self.source in ROUTED else 0

    @property
    def columns(self) -> int:
        """Numbers that must come with each row for this gate."""
        return self.num_gates if self.source in GIVEN else 0

    @property
    def head_rows(self) -> int:
        """1 for a learned threshold, whose row comes after the router's and has its own place."""
        return int(self.threshold_head)

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, JSON-ready."""
        fields = {k: v for k, v in asdict(self).items() if v != getattr(_PLAIN, k)}
        if "blocks" in fields:
            fields["blocks"] = list(self.blocks)
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> GateSpec:
        """The inverse of `to_dict`. Unknown names raise GateSpecError."""
        unknown = sorted(set(fields) - set(cls.__dataclass_fields__))
        if unknown:
            raise GateSpecError(unknown[0], fields[unknown[0]], ", ".join(cls.__dataclass_fields__))
        return cls(**fields)


def _is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int that no float can hold
        return False


_CHOICES: dict[str, tuple[str, ...]] = {
    "source": get_args(Source),
    "score": get_args(Score),
    "select": get_args(Select),
    "weight": get_args(Weight),
    "key": get_args(Key),
    "bias": get_args(Bias),
    "normalise": get_args(Normalise),
}
_FLOATS = (
    "score_temperature", "threshold", "top_p", "temperature", "mask_below", "constant",
    "normalise_eps",
)  # fmt: skip
_ONLY_WITH = {
    "normalise_eps": ("normalise", "layer"),
    "score_temperature": ("score", "softmax"),
    "threshold": ("select", "threshold"),
    "top_p": ("select", "top_p"),
    "temperature": ("weight", "softmax"),
}
_PLAIN = object.__new__(GateSpec)
for _name, _field in GateSpec.__dataclass_fields__.items():
    object.__setattr__(_PLAIN, _name, _field.default)
