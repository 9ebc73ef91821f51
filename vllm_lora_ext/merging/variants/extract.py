"""A LoRA out of two checkpoints: the truncated SVD of their difference, layer by layer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.factors import Factors, Pair
from vllm_lora_ext.merging.ops.truncate import factorise
from vllm_lora_ext.merging.variants.conversion import Converted
from vllm_lora_ext.merging.variants.files import Checkpoint

_NOT_LINEAR = ("embed_tokens", "lm_head", "wte", "wpe")


def extract(
    finetuned: str | os.PathLike[str],
    base: str | os.PathLike[str],
    rank: int,
    *,
    modules: Iterable[str] | None = None,
    sv_epsilon: float = 0.0,
    allow_pickle: bool = False,
) -> Converted:
    """The best LoRA of `rank` between two checkpoints, as mergekit-extract-lora makes it.

    One layer is in memory at a time.

    Args:
        finetuned, base: a safetensors file or a folder of them.
        modules: layers; without it, every matrix of both that differs, but no embeddings.
        sv_epsilon: singular values not above it are dropped, so ranks may differ.
        allow_pickle: also read `.bin` and `.pt` files, weights only.
    Raises:
        AdapterError: those of `Checkpoint`; `shape_mismatch`, `bad_value`, `empty_adapter`.
    """
    if rank < 1 or sv_epsilon < 0:
        raise AdapterError(
            "bad_value", "rank and sv_epsilon are out of range", seen=[rank, sv_epsilon],
            limit="rank from 1, sv_epsilon from 0",
        )  # fmt: skip
    tuned, plain = Checkpoint(finetuned, allow_pickle), Checkpoint(base, allow_pickle)
    pairs, errors = {}, {}
    for module in modules if modules is not None else _common(tuned, plain):
        after, before = tuned.weight(module), plain.weight(module)
        if after.shape != before.shape:
            raise AdapterError(
                "shape_mismatch", f"{module} has other sizes in the two checkpoints",
                seen=list(after.shape), limit=list(before.shape), fix="give one model twice",
            )  # fmt: skip
        delta = after - before
        if not bool(delta.any()):
            continue
        pair = factorise(delta, rank, None).pair
        kept = pair.a_RK.norm(dim=1) * pair.b_NR.norm(dim=0) > sv_epsilon  # singular values
        pairs[module] = Pair(pair.a_RK[kept], pair.b_NR[:, kept])
        errors[module] = float((pairs[module].delta() - delta).norm() / delta.norm())
    if not pairs:
        raise AdapterError(
            "empty_adapter", "the two checkpoints do not differ in any linear layer",
            fix="check which checkpoints they are",
        )  # fmt: skip
    exact = all(error < 1e-6 for error in errors.values())
    return Converted(Factors(pairs, os.fspath(base)), "mergekit_extract", None if exact else errors)


def _common(tuned: Checkpoint, plain: Checkpoint) -> Iterator[str]:
    there = set(plain.names)
    for name in tuned.names:
        module = name.removesuffix(".weight")
        matrix = name.endswith(".weight") and name in there and len(tuned.shape(name)) == 2
        if matrix and module.rsplit(".", 1)[-1] not in _NOT_LINEAR:
            yield module
