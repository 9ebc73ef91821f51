"""Adapters that are generated: decoded by a CVAE, fused by a VAE, composed from a description."""

from vllm_lora_ext.merging.generate.embed import Embedder, minilm, sentence_embedder
from vllm_lora_ext.merging.generate.icm import Decoder, decode_adapter, read_layout
from vllm_lora_ext.merging.generate.icm_fusion import Fused, Training, fuse
from vllm_lora_ext.merging.generate.sg_lora import ExpertLibrary, LibraryEntry

__all__ = [
    "Decoder",
    "Embedder",
    "ExpertLibrary",
    "Fused",
    "LibraryEntry",
    "Training",
    "decode_adapter",
    "fuse",
    "minilm",
    "read_layout",
    "sentence_embedder",
]  # fmt: skip
