"""NOLA offline: the factors of its reader, and whether the random basis could be checked."""

from __future__ import annotations

from vllm_lora_ext.adapters.readers.nola import read_pairs
from vllm_lora_ext.merging.factors import Factors, Pair
from vllm_lora_ext.merging.variants.conversion import Conversion


def nola(conversion: Conversion) -> Factors:
    """NOLA (arXiv 2310.02556), its basis drawn again with torch's CPU generator. Exact."""
    config, pairs, checked = read_pairs(conversion.folder)
    scales = {name: config.scale(name) for name in pairs}
    modules = {name: Pair(a, b * scales[name]) for name, (a, b) in pairs.items()}
    if not checked:
        conversion.notes.append(
            "NOLA's basis was drawn again with torch's CPU generator and could not be checked: "
            "another device or torch version would have trained with another basis"
        )
    return Factors(modules, config.base_model, scales=scales)
