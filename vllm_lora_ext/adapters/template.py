"""Templates: adapters that only a request completes, by a user's vector or an instruction.

A template is loaded and checked like any adapter, and is served by what it derives: for one user,
or one instruction, an ordinary adapter that goes the way of all others from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import torch

from vllm_lora_ext.adapters.finite import is_finite
from vllm_lora_ext.errors import AdapterError

if TYPE_CHECKING:
    from vllm_lora_ext.adapters.model import RoutedAdapter


class Pooling(Protocol):
    """A gate that is made of an instruction's hidden states, some tokens at a time."""

    def add(self, hidden_TK: torch.Tensor) -> None:
        """The next tokens: [T, hidden], the last layer's output before the final norm."""

    def gate(self) -> torch.Tensor:
        """The gate of all tokens so far: [d] fp32. Raises AdapterError `bad_value`, there are none,
        or it is not finite."""


class Template(Protocol):
    """What a family of adapters has in common.

    Attributes:
        user: length of the user's vector that `derive` needs; None: none.
        instruction: whether `derive` needs a gate that `pooling` makes of an instruction.
        sizes: adapted layer, as the files name it → (in, out).
        rank, router_rows: of every adapter that it derives.
        nbytes: of its tensors.
    """

    @property
    def user(self) -> int | None: ...
    @property
    def instruction(self) -> bool: ...
    @property
    def sizes(self) -> Mapping[str, tuple[int, int]]: ...
    @property
    def rank(self) -> int: ...
    @property
    def router_rows(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

    def derive(self, user: torch.Tensor | None, gate: torch.Tensor | None) -> RoutedAdapter:
        """The adapter for one user, or one instruction; its layers are those of `sizes`.

        Args:
            user: [user] of any float dtype, where the template has one.
            gate: what a pooling made, where the template needs an instruction.
        Raises:
            AdapterError: `bad_value`, something is missing, not asked for, of another length or
                not finite; `not_finite`, what comes out of it; `missing_setting`.
        """

    def pooling(self) -> Pooling:
        """A new one. Only of templates with `instruction`."""


def given(what: str, value_N: torch.Tensor | None, length: int | None) -> torch.Tensor:
    """A vector that a derivation needs, as fp32; [0] where it needs none.

    Args:
        what: name of the vector, for messages.
        length: None: the template has no use for it.
    Raises:
        AdapterError: `bad_value`.
    """
    if length is None and value_N is None:
        return torch.zeros(0)
    seen = "none" if value_N is None else list(value_N.shape)
    if length is None or value_N is None or list(value_N.shape) != [length]:
        raise AdapterError(
            "bad_value", f"the adapter cannot be made with this '{what}'", seen=seen,
            limit="none" if length is None else f"{length} numbers",
            fix=f"leave '{what}' away" if length is None else f"give '{what}' with the request",
        )  # fmt: skip
    if not is_finite(value_N.float()):
        raise AdapterError(
            "bad_value", f"'{what}' has numbers that are not finite in float32",
            seen="NaN or infinity", limit="finite numbers", fix=f"mend '{what}'",
        )  # fmt: skip
    return value_N.float()
