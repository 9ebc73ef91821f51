"""Memory that a step frees stays in the process: no page of it is cleared again in the next."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, sys
import torch
from vllm_lora_ext.model_patches.heap import keep_memory

if sys.argv[1] == "keep":
    keep_memory()

def step():
    buffers = [torch.ones(30 << 18) for _ in range(3)]  # 30 MiB each

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(6):
    step()
before = faults()
for _ in range(5):
    step()
print((faults() - before) // 5)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's heap")
def test_no_page_faults_between_steps():
    def per_step(how: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert per_step("keep") < 100 < per_step("default")
