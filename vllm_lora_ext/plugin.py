"""Entry point of `vllm.general_plugins`: runs in every vLLM process, once each.

vLLM swallows an error while *importing* a plugin and would then serve plain vLLM in silence, so
this module imports nothing that can fail; an error inside `register` stops vLLM.
"""

from __future__ import annotations

import logging
import multiprocessing
import os

logger = logging.getLogger("vllm.lora_ext")
_registered = False


def register() -> None:
    """Checks every patch target, then applies the patches.

    A target that is not the code its patch was written for: nothing is patched, one warning says
    so, and no engine with LoRA starts.
    """
    global _registered
    from vllm_lora_ext.settings import disabled

    if _registered or disabled():
        return
    from vllm_lora_ext.model_patches import check
    from vllm_lora_ext.model_patches.register import PATCHES

    root = check.installed_root()
    assert root is not None, "vLLM calls this, so it is installed"
    wrong = [f for f in check.check_tree(root) if f.state != "ok"]
    if wrong and os.environ.get("VLLM_LORA_EXT_UNCHECKED") != "1":
        first = wrong[0]
        _refuse(
            f"vllm-lora-ext does not know this vLLM ({check.installed_version()}; checked on "
            f"{', '.join(check.recorded())}): {first.target} is {first.state} ({first.detail})"
            f"{f' and {len(wrong) - 1} more' if len(wrong) > 1 else ''}. Nothing was patched, and "
            "an engine with LoRA does not start. "
            "Install a checked vLLM, or set VLLM_LORA_EXT_DISABLE=1 to run without the plugin, "
            "or VLLM_LORA_EXT_UNCHECKED=1 to patch at your own risk; `vllm-lora-ext doctor` "
            "shows every target."
        )
    else:
        for patch in PATCHES:
            patch.apply()
        logger.debug("vllm-lora-ext: %d patches applied", len(PATCHES))
    _registered = True


def _refuse(text: str) -> None:
    from vllm_lora_ext.model_patches.unknown import refuse_lora

    refuse_lora(text)
    if multiprocessing.parent_process() is None:  # once, not again in every process of vLLM's
        logger.warning("%s", text)
