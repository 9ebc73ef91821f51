"""Select: some ranks of a module, or some layers of a model."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging.factors import Pair
from vllm_lora_ext.merging.ops.scale import layer_of


def select_ranks(pair: Pair, indices: Sequence[int] | None = None, top: int | None = None) -> Pair:
    """The named ranks, or the `top` ones by length ‖a‖·‖b‖ (in their old order); exact on them.

    Raises:
        AdapterError: `bad_value`, an index that the module does not have.
    """
    if indices is None:
        if top is None or top >= pair.rank:
            return pair
        length_R = pair.a_RK.norm(dim=1) * pair.b_NR.norm(dim=0)
        indices = sorted(torch.topk(length_R, top).indices.tolist())
    outside = [i for i in indices if not 0 <= i < pair.rank]
    if outside or len(set(indices)) != len(indices):
        raise AdapterError(
            "bad_value", "'indices' must name ranks of the module, each once", seen=list(indices),
            limit=f"0 to {pair.rank - 1}", fix="mend the list",
        )  # fmt: skip
    at = torch.tensor(list(indices), dtype=torch.long)
    return Pair(pair.a_RK[at], pair.b_NR[:, at])


def in_layers(module: str, include: Collection[int] | None, exclude: Collection[int]) -> bool:
    """Whether a module stands in the chosen layers; one outside any layer always does.

    Layers are compared as numbers: 1 is not 10 to 19 (Flexora's published script compares text).
    """
    layer = layer_of(module)
    if layer is None:
        return True
    return (include is None or layer in include) and layer not in exclude
