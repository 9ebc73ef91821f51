"""Gates that the base model's last hidden state of the same token gives (X-LoRA).

    S = softmax(MLP(h) / T), one row of E for every adapted layer or one for all of them

h is what the model hands to its output matrix, the final norm done, in a pass without the adapter.
Selecting comes after the softmax and renormalises nothing; a second softmax is an option.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch.nn import functional

from vllm_lora_ext.adapters.finite import is_finite, not_finite
from vllm_lora_ext.errors import AdapterError


@dataclass(frozen=True)
class Classifier:
    """A multi-layer perceptron, in fp32, and what its logits become.

    Args:
        weights, biases: of its layers, first to last: [out, in], and [out] or None. The last
            layer's rows are those of all gates, E for each row of gates.
        experts: E.
        relu: whether a ReLU stands between the layers.
        softmax: over the E logits of a row, divided by temperature; else they are taken as they
            are.
        top_k: how many of a row's E stay, the others are 0; None: all.
        softmax_again: a second softmax, over those of a row that are not 0.
        frozen: whether all tokens behind a request's prompt take the gates of its last one, an
            approximation that needs no further pass without the adapter.
    """

    weights: tuple[torch.Tensor, ...] = field(repr=False)
    biases: tuple[torch.Tensor | None, ...] = field(repr=False)
    experts: int
    relu: bool = True
    softmax: bool = True
    temperature: float = 1.0
    top_k: int | None = None
    softmax_again: bool = False
    frozen: bool = False

    @property
    def hidden_size(self) -> int:
        """Of the base model."""
        return self.weights[0].shape[1]

    @property
    def gates(self) -> int:
        """How many numbers a token gets."""
        return self.weights[-1].shape[0]

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [t for t in (*self.weights, *self.biases) if t is not None]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    def map(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Classifier:
        """The same with other tensors: on a device, in page-locked memory."""
        biases = tuple(None if bias is None else move(bias) for bias in self.biases)
        return replace(self, weights=tuple(map(move, self.weights)), biases=biases)

    def scalings(self, hidden_TK: torch.Tensor) -> torch.Tensor:
        """[T, rows, E] fp32, before any selection. hidden_TK: [T, hidden] of any float dtype."""
        x = hidden_TK.float()
        last = len(self.weights) - 1
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = functional.linear(x, weight, bias)
            if self.relu and i < last:
                x = x.relu()
        x = x.unflatten(1, (-1, self.experts))
        return (x / self.temperature).softmax(-1) if self.softmax else x

    def gates_of(self, hidden_TK: torch.Tensor) -> torch.Tensor:
        """[T, gates] fp32: what the adapted layers read."""
        scalings_TLE = self.scalings(hidden_TK)
        if self.top_k is not None:
            best = scalings_TLE.topk(self.top_k, dim=-1).indices
            kept = torch.zeros_like(scalings_TLE, dtype=torch.bool).scatter_(-1, best, True)
            scalings_TLE = scalings_TLE.masked_fill(~kept, 0.0)
        if self.softmax_again:
            absent = scalings_TLE == 0
            again = scalings_TLE.masked_fill(absent, float("-inf")).softmax(-1)
            scalings_TLE = again.masked_fill(absent, 0.0)
        return scalings_TLE.flatten(1)


def check_classifier(classifier: Classifier) -> None:
    """What must hold of any classifier.

    Raises:
        AdapterError: `bad_shape`, its layers do not follow one another; `not_finite`.
    """
    width = classifier.hidden_size
    for i, (weight, bias) in enumerate(zip(classifier.weights, classifier.biases, strict=True)):
        sizes = [weight.ndim == 2, weight.shape[-1] == width, 0 not in weight.shape]
        sizes.append(bias is None or bias.shape == weight.shape[:1])
        if not all(sizes):
            raise _bad_shape(f"layer {i}", weight, f"[out, {width}], and a bias [out] or none")
        width = weight.shape[0]
    if width % classifier.experts:
        raise _bad_shape("the last layer", classifier.weights[-1], f"n times {classifier.experts}")
    for tensor in classifier.tensors:
        if not is_finite(tensor):
            raise not_finite("the classifier", tensor)


def _bad_shape(what: str, tensor: torch.Tensor, limit: str) -> AdapterError:
    return AdapterError(
        "bad_shape", f"{what} of the classifier has the wrong shape", seen=list(tensor.shape),
        limit=limit, fix="save the adapter again",
    )  # fmt: skip
