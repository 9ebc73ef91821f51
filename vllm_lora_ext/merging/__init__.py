"""Many adapters in, one ordinary adapter out. Knows adapters only, no vLLM."""

from vllm_lora_ext.merging.factors import Factors, Pair, load_factors, save_peft
from vllm_lora_ext.merging.merge import Merged, ModuleReport, Report, Term, merge
from vllm_lora_ext.merging.methods import METHODS, Method, all_methods, find_method
from vllm_lora_ext.merging.parameters import ALIASES, PARAMETERS
from vllm_lora_ext.merging.soups.load import load_soups

__all__ = [
    "ALIASES", "METHODS", "PARAMETERS", "Factors", "Merged", "Method", "ModuleReport", "Pair",
    "Report", "Term", "all_methods", "find_method", "load_factors", "load_soups", "merge",
    "save_peft",
]  # fmt: skip
