"""torch.compile stays on under LoRA on the CPU platform.

Target: `CpuPlatform.check_and_update_config`, which sets the compilation mode to NONE as soon as
LoRA is on: stock's LoRA ops are plain Python that a single trace would freeze. Ours are opaque to
the compiler and read the step's mapping when they run, so the reason is gone; kept, the rule alone
halves the speed of base requests.
"""

from __future__ import annotations

from typing import Any

from vllm.platforms.cpu import CpuPlatform


def apply() -> None:
    """Hides the LoRA config from that one method."""
    stock = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        lora_config, vllm_config.lora_config = vllm_config.lora_config, None
        try:
            stock(cls, vllm_config)
        finally:
            vllm_config.lora_config = lora_config

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
