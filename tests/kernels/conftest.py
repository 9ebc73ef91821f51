"""A checkout is enough to test the kernels: a bare GPU machine has not installed the package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import vllm_lora_ext

if find_spec("vllm_lora_ext.kernels") is None:
    vllm_lora_ext.__path__.append(str(Path(__file__).parents[2]))  # kernels/ and routing/
