"""What an image is known by in vLLM's cache of encoder outputs, where LoRA is on towers.

vLLM writes the adapter's name before the input's hash. A name may stand for other weights later,
and two names for the same: so it is the adapter's version that stands there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any


def key_by_version(request: Any, version: str) -> bool:
    """Renames the multimodal inputs of a request of an adapter; whether that changed any.

    Args:
        request: vLLM's `Request`, of which no worker knows yet.
    """
    before = request.mm_features or []
    request.mm_features = [replace(f, identifier=f"{version}:{f.mm_hash}") for f in before]
    return any(
        a.identifier != b.identifier for a, b in zip(before, request.mm_features, strict=True)
    )
