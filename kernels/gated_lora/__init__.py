"""`y += B (g(x) ⊙ (A x))` for a batch whose rows use different adapters.

Two launches, whatever the router: the first computes `[A; router] x`, the second turns the router's
rows into gates and adds the gated expansion to y. `gated_lora_` does both, and what must be summed
over ranks between them; `begin` and `finish_` are its two halves outside of torch's ops, for layers
that overlap the first, and may `prefetch` behind it.
"""

from vllm_lora_ext.kernels.gated_lora.factors import Factors
from vllm_lora_ext.kernels.gated_lora.op import (
    EmbeddingSite,
    activated_lora,
    begin,
    embedding_lora_,
    extended_linear,
    finish_,
    gated_lora_,
    gated_lora_into_,
    prefetch,
    prefetch_in_order,
    register_site,
)
from vllm_lora_ext.kernels.gated_lora.reference import gated_lora_reference
from vllm_lora_ext.kernels.gated_lora.site import Site
from vllm_lora_ext.kernels.gated_lora.step import StepMap

__all__ = [
    "EmbeddingSite",
    "Factors",
    "Site",
    "StepMap",
    "activated_lora",
    "begin",
    "embedding_lora_",
    "extended_linear",
    "finish_",
    "gated_lora_",
    "gated_lora_into_",
    "gated_lora_reference",
    "prefetch",
    "prefetch_in_order",
    "register_site",
]
