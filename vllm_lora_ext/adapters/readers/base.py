"""What a reader is: how a format is recognised, and what becomes of a folder of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from vllm_lora_ext.adapters.folder import AdapterFolder
from vllm_lora_ext.adapters.model import RoutedAdapter

# What a folder may leave out and `convert` takes: the base model's weights; the rank of an
# approximation; the adapter that training began with; LoRAM's index; the pruned model's weights.
Need = Literal["base", "rank", "init", "index", "pruned"]


def of_type(*names: str) -> Callable[[AdapterFolder], bool]:
    """A `detect` for formats that have a `peft_type` of their own."""
    return lambda folder: folder.config.get("peft_type") in names


@dataclass(frozen=True)
class Reader:
    """One published format: served as it is, or made an ordinary LoRA offline, or refused.

    Args:
        name: the system's name, `RoutedAdapter.system`.
        title: how its authors call it.
        url: where it is defined.
        files: what a folder of this format holds, for messages and documentation.
        peft_types: values of `peft_type` that its configs carry; empty when it has no config.
        detect: whether a folder is of this format, from tensor names and config together. Must
            raise nothing.
        read: the adapter; must take or skip every tensor, and may leave `source` and `digest`
            empty. Raises AdapterError. None: the format is not served as it is.
        paper: title and where it can be read; empty when there is none.
        summary: one or two sentences: what its gate does, in the words of the field.
        formula: what one adapted layer computes, as plain text.
        settings: name → meaning of what the files leave out and the sidecar `routing.json` (or
            `convert --set`) must say.
        traps: what is easily taken wrongly about this format, a sentence each.
        request: what of a request its numbers depend on, beside the tokens; empty: nothing.
        needs: what `convert` may have to be given to make an ordinary LoRA of such a folder; with
            `read` None that is the only way to serve it.
        refused: why nothing can be made of it; empty for the others.
        general: how far it steps back: a claim counts where no less general reader has one.
        two_pass: whether its gates come from a pass without the adapter (`Classifier`).
    """

    name: str
    title: str
    url: str
    files: str
    peft_types: tuple[str, ...]
    detect: Callable[[AdapterFolder], bool]
    read: Callable[[AdapterFolder], RoutedAdapter] | None = None
    paper: str = ""
    summary: str = ""
    formula: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    traps: tuple[str, ...] = ()
    request: str = ""
    needs: tuple[Need, ...] = ()
    refused: str = ""
    general: int = 0
    two_pass: bool = False

    @property
    def status(self) -> Literal["served", "convert", "refused"]:
        """What becomes of a folder of this format."""
        if self.refused:
            return "refused"
        return "convert" if self.read is None else "served"
