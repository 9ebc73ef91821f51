"""A vLLM that the register does not know: it runs, but not with LoRA.

Nothing of it is patched. Its own LoRA would serve something else than was asked for, so an engine
with LoRA does not start; every other engine does, since the plugin has no part in it.
"""

from __future__ import annotations

from typing import Any


def refuse_lora(text: str) -> None:
    """From now on no configuration with LoRA can be made. Raises RuntimeError, not even that."""
    try:
        from vllm.config import LoRAConfig
    except ImportError:
        raise RuntimeError(text) from None

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(text)

    LoRAConfig.__init__ = refuse
