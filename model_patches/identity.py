"""The plugin is part of every key under which compiled code is kept.

Target: `LoRAConfig.compute_hash`. vLLM puts it into the key of each of its compile caches where
LoRA is on, and only there: without LoRA the plugin changes no graph, and the key stays stock's.

What has to be in it: which plugin this is, since stock and every version of the plugin build other
layers from the same flags; and on a CPU what vLLM leaves out because its own artefacts of a CPU
are never loaded (see `warm_start`): the kind of processor and one switch.
"""

from __future__ import annotations

import hashlib
from functools import cache, wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import vllm.envs as envs
from vllm.config.lora import LoRAConfig
from vllm.platforms import current_platform

from vllm_lora_ext import __version__

_ROOMS = ("routing", "kernels", "model_patches")
_SOURCES = {".py", ".cpp", ".h"}


@cache
def plugin_identity() -> str:
    """Hash of the plugin's version and of every source that what is compiled can depend on.

    The same on every machine with the same files, wherever they lie.
    """
    found = hashlib.sha256(__version__.encode())
    for room in _ROOMS:
        spec = find_spec(f"vllm_lora_ext.{room}")
        assert spec is not None and spec.submodule_search_locations
        root = Path(next(iter(spec.submodule_search_locations)))
        for file in sorted(f for f in root.rglob("*") if f.suffix in _SOURCES):
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            found.update(f"\n{room}/{file.relative_to(root).as_posix()} {content}".encode())
    return found.hexdigest()


def tag_torch_caches() -> None:
    """From now on torch's own compile caches of this process have the plugin in their keys, too.

    They hold the calls that the CPU backend's `inductor` wrote, and are shared by all programs of a
    user where vLLM gives them no folder of their own.
    """
    tag = f"vllm-lora-ext:{plugin_identity()[:16]}"
    config: Any = torch.compiler.config
    if tag not in config.cache_key_tag:
        config.cache_key_tag += tag


def _machine() -> tuple[Any, ...]:
    """What a graph for a CPU depends on beside vLLM's own factors."""
    if not current_platform.is_cpu():
        return ()
    features = sorted(k for k, v in torch.cpu.get_capabilities().items() if v is True)
    return torch.backends.cpu.get_cpu_capability(), features, envs.VLLM_ZENTORCH_WEIGHT_PREPACK


def apply() -> None:
    """Adds to the hash of the LoRA config."""
    stock = LoRAConfig.compute_hash

    @wraps(stock)
    def compute_hash(self: LoRAConfig) -> str:
        factors = (stock(self), plugin_identity(), _machine())
        return hashlib.sha256(repr(factors).encode()).hexdigest()

    LoRAConfig.compute_hash = compute_hash
