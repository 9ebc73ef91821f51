"""A second start on a CPU loads what the first one compiled.

Target: `vllm.compilation.decorators._try_load_aot_compiled_fn`. On a CPU vLLM compiles with
torch's own Inductor backend (mode DYNAMO_TRACE_ONCE), whose artefact is whole once it is read. The
loader then asks it to `finalize_loading`, which only the artefacts of vLLM's backend can, so that
every artefact of a CPU is thrown away, with a warning, and the model compiled again.

Only under LoRA, where the key of the cache says what such an artefact depends on (`identity`).
Elsewhere vLLM stays as it is.
"""

from __future__ import annotations

from typing import Any

from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable


def _finalize_loading(self: Any, vllm_config: Any) -> None:
    """Nothing is left to do. Raises RuntimeError, on which vLLM compiles, where it always did."""
    if vllm_config.lora_config is None or vllm_config.device_config.device_type != "cpu":
        raise RuntimeError("vLLM does not load graphs that torch's own backend compiled")


def apply() -> None:
    """Gives torch's artefacts the method that vLLM calls."""
    artefact: Any = BundledAOTAutogradSerializableCallable
    artefact.finalize_loading = _finalize_loading
