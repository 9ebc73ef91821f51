"""What a reader is: how a format is recognised and turned into a RoutedAdapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from vllm_lora_ext.adapters.folder import AdapterFolder
from vllm_lora_ext.adapters.model import RoutedAdapter


@dataclass(frozen=True)
class Reader:
    """One published format.

    Args:
        name: the system's name, `RoutedAdapter.system`.
        title: how its authors call it.
        url: where it is defined.
        files: what a folder of this format holds, for messages and documentation.
        peft_types: values of `peft_type` that its configs carry; empty when it has no config.
        detect: whether a folder is of this format, from tensor names and config together. Must
            raise nothing.
        read: the adapter; must take or skip every tensor, and may leave `source` and `digest`
            empty. Raises AdapterError.
        paper: title and where it can be read; empty when there is none.
        summary: one or two sentences: what its gate does, in the words of the field.
        formula: what one adapted layer computes, as plain text.
        settings: name → meaning of what the files leave out and the sidecar `routing.json` (or
            `convert --set`) must say.
        traps: what is easily taken wrongly about this format, a sentence each.
        request: what of a request its numbers depend on, beside the tokens; empty: nothing.
        refused: why a known format is not served; empty for the others. `read` then raises.
        two_pass: whether its gates come from a pass without the adapter (`Classifier`).
    """

    name: str
    title: str
    url: str
    files: str
    peft_types: tuple[str, ...]
    detect: Callable[[AdapterFolder], bool]
    read: Callable[[AdapterFolder], RoutedAdapter]
    paper: str = ""
    summary: str = ""
    formula: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    traps: tuple[str, ...] = ()
    request: str = ""
    refused: str = ""
    two_pass: bool = False
