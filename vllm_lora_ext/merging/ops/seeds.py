"""Randomness that depends on names, not on the order of adapters or modules, nor on TP rank."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, *names: str) -> torch.Generator:
    """A CPU generator for one (module, adapter, part), derived from their names by SHA-256."""
    text = "\0".join([str(seed), *names]).encode()
    digest = hashlib.sha256(text).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
