"""Memory that a step frees stays in the process: no page of it is cleared again in the next."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# The C library alone: under a larger library, what else lies on the heap decides from one process
# to the next whether the default gives pages back.
STEPS = """
import ctypes, resource, sys
from vllm_lora_ext.model_patches.heap import keep_memory

libc = ctypes.CDLL(None)
# PR_SET_THP_DISABLE: a huge page would be one fault, where the machine gives them to everybody.
libc.prctl(41, 1, 0, 0, 0)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
if sys.argv[1] == "keep":
    keep_memory()

def step():
    buffers = [libc.malloc(30 << 20) for _ in range(3)]
    for buffer in buffers:
        ctypes.memset(buffer, 1, 30 << 20)
    for buffer in buffers:
        libc.free(buffer)

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
