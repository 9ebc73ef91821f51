"""GateSpec for readers: what is wrong with a gate is the adapter's fault, and says so."""

from __future__ import annotations

from typing import Any

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.routing import GateSpec, GateSpecError

MAX_GATES = 1 << 16
# Beyond these, float32 makes infinity or NaN of ordinary logits, or a gate that does nothing.
BOUNDS = {
    "temperature": (1e-6, 1e6), "score_temperature": (1e-6, 1e6), "threshold": (-1e6, 1e6),
    "mask_below": (-1e6, 1e6), "constant": (-1e6, 1e6), "normalise_eps": (1e-12, 1e6),
}  # fmt: skip


def make_gate(fields: dict[str, Any], where: str) -> GateSpec:
    """`GateSpec.from_dict`, with an AdapterError (`bad_gate`, `k_too_large`, `unknown_key`).

    Args:
        where: what the gate belongs to, for messages.
    """
    blocks = fields.get("blocks", ())
    if isinstance(blocks, (list, tuple)) and len(blocks) > MAX_GATES:
        raise AdapterError(
            "bad_gate", f"the gate of {where} has too many blocks", seen=len(blocks),
            limit=MAX_GATES, fix="mend 'blocks'",
        )  # fmt: skip
    try:
        spec = GateSpec.from_dict(fields)
    except GateSpecError as error:
        if error.field not in GateSpec.__dataclass_fields__:
            raise AdapterError(
                "unknown_key", f"the gate of {where} has an unknown field '{error.field}'",
                seen=error.seen, limit=error.allowed, fix=f"remove '{error.field}'",
            ) from error  # fmt: skip
        k, gates = fields.get("k"), len(blocks) if isinstance(blocks, (list, tuple)) else 0
        if error.field == "k" and type(k) is int and gates and k > gates:
            raise AdapterError(
                "k_too_large", f"k (top_k) of {where} is larger than the number of experts",
                seen=k, limit=f"1 to {gates}", fix="choose a smaller k",
            ) from error  # fmt: skip
        raise AdapterError(
            "bad_gate", f"'{error.field}' in the gate of {where} is out of range",
            seen=error.seen, limit=error.allowed, fix=f"mend '{error.field}'",
        ) from error  # fmt: skip
    for name, (low, high) in BOUNDS.items():
        value = getattr(spec, name)
        if value is not None and not low <= value <= high:
            raise AdapterError(
                "bad_gate", f"'{name}' in the gate of {where} is out of range", seen=value,
                limit=f"{low:g} to {high:g}", fix=f"mend '{name}'",
            )  # fmt: skip
    return spec
