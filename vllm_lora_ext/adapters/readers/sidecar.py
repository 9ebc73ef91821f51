"""What formats without an adapter_config.json have in common."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from vllm_lora_ext.adapters.folder import SIDECAR, AdapterFolder, missing_tensor
from vllm_lora_ext.adapters.readers.peft_config import bad_value
from vllm_lora_ext.errors import AdapterError


def check_system(folder: AdapterFolder, name: str) -> None:
    """That `system` in the sidecar, where it is, names this format. Raises `bad_value`."""
    if folder.has_setting("system"):
        system = folder.setting("system", "the format")
        if system != name:
            raise bad_value(f"system in {SIDECAR}", system, name)


def every_layer(found: Collection[str], forms: Sequence[str]) -> None:
    """That every kind of layer stands in all of layers 0 to n-1, as such savers write them.

    Args:
        found: names of what has tensors.
        forms: one per kind, with `{}` for the layer's number.
    Raises:
        AdapterError: `missing_tensor`; `unexpected_tensor`, a name is of no kind.
    """
    numbers = {}
    for form in forms:
        pattern = re.compile(re.escape(form).replace(r"\{\}", r"(\d+)"))
        numbers[form] = {int(m[1]) for name in found if (m := pattern.fullmatch(name))}
    layers = 1 + max((n for some in numbers.values() for n in some), default=0)
    for form in forms:
        for n in range(layers):
            if n not in numbers[form]:
                raise missing_tensor(
                    f"{form.format(n)}.*", f": others reach from layer 0 to {layers - 1}"
                )
    extra = sorted(set(found) - {form.format(n) for form in forms for n in range(layers)})
    if extra:
        raise AdapterError(
            "unexpected_tensor", "there are tensors of a layer that the settings do not name",
            seen=extra[0], limit=[form.format("*") for form in forms][:8],
            fix=f"mend {SIDECAR}, or save the adapter again",
        )  # fmt: skip
