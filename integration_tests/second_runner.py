"""Asks an engine with vLLM's model runner V2 all rows of the matrix, for `test_second_runner`.

    python -m integration_tests.second_runner RESULT.json

vLLM has it on GPUs by default, and on a CPU with Triton's backend for CPUs, which no wheel brings.
Here that backend is a name only: the runner's kernels run in Triton's interpreter, which reads the
environment when Triton is imported.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

os.environ |= {
    "TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # a process of its own would not have the backend
}  # fmt: skip
from triton.backends import backends

backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
from integration_tests import matrix  # noqa: E402
from integration_tests.conftest import TWO_PASS  # noqa: E402
from integration_tests.engines import close, make_engine  # noqa: E402


def main(result: str) -> None:
    with TemporaryDirectory() as folder:
        rows = matrix.rows(Path(folder)) | matrix.two_pass_rows()
        llm = make_engine(matrix.BASE, enforce_eager=True, additional_config=TWO_PASS)
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        assert worker.model_runner.__module__ == "vllm.v1.worker.cpu.model_runner"
        matrix.load(llm)
        found = []
        for again in (False, True):
            outputs = matrix.answer(llm, matrix.every(rows), skip_reading_prefix_cache=not again)
            found.append(matrix.errors(rows, outputs))
        Path(result).write_text(json.dumps(found))
        close(llm)


if __name__ == "__main__":
    main(sys.argv[1])
