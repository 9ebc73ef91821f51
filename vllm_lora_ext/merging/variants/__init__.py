"""Every artefact that is no ordinary LoRA, turned into low-rank factors: one table, one entry."""

from vllm_lora_ext.merging.variants.conversion import Converted
from vllm_lora_ext.merging.variants.extract import extract
from vllm_lora_ext.merging.variants.read import read_variant
from vllm_lora_ext.merging.variants.table import CONVERTERS

__all__ = ["CONVERTERS", "Converted", "extract", "read_variant"]
