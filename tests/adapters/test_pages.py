"""docs/native_format.md runs, docs/errors.md lists exactly the codes that the source raises."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

from make_adapters import BASE_LLAMA

from vllm_lora_ext.adapters import FORMATS
from vllm_lora_ext.model_patches.refused import status_of
from vllm_lora_ext.routing import GateSpec

ROOT = Path(__file__).parents[2]
SOURCES = ("vllm_lora_ext", "routing", "kernels", "model_patches")


def codes_in_source():
    found = {}
    for folder in SOURCES:
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call) or getattr(node.func, "id", "") != "AdapterError":
                    continue
                code = node.args[0]
                assert isinstance(code, ast.Constant), f"{file}:{node.lineno}: write the code out"
                found.setdefault(code.value, f"{file.relative_to(ROOT)}:{node.lineno}")
    return found


def test_every_code_is_listed_and_no_other():
    page = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([a-z_]+)` \|", page, re.MULTILINE)
    assert len(listed) == len(set(listed))
    found = codes_in_source()
    missing = {code: place for code, place in found.items() if code not in listed}
    assert not missing, "add a row to docs/errors.md"
    assert set(listed) == set(found), "remove the row from docs/errors.md"


def test_listed_status_is_the_one_that_is_sent():
    page = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z_]+)` \|.*\| (\d+|\*start\*) \|", page, re.MULTILINE)
    special = {code: status for code, status in rows if status not in ("400", "*start*")}
    assert special == {
        "not_found": "404", "path_not_allowed": "403", "merge_busy": "429", "merge_failed": "500",
        "id_in_use": "409", "slots_pinned": "409", "host_cache_full": "409",
        "device_memory_full": "409", "adapter_changed": "409", "version_conflict": "409",
        "no_token": "401", "wrong_token": "403",
        "load_failed": "500", "ranks_differ": "500", "engine_dead": "503", "files_changed": "409",
    }  # fmt: skip
    assert {code: str(status_of(code).value) for code in special} == special


def test_clients_are_told_what_to_do_about_every_status_but_400():
    errors = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z_]+)` \|.*\| (\d+) \|", errors, re.MULTILINE)
    operations = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (\d{3}(?:, \d{3})*) \| ([^|]+) \|", operations, re.MULTILINE)
    told = {code: statuses.split(", ") for statuses, codes in table
            for code in re.findall("`([a-z_]+)`", codes)}  # fmt: skip
    special = {code: status for code, status in rows if status != "400"}
    assert set(told) == set(special)
    assert all(status in told[code] for code, status in special.items())


def test_the_native_page_runs(tmp_path):
    page = (ROOT / "docs/native_format.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python[^\n]*\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    (tmp_path / "base_llama").symlink_to(BASE_LLAMA)
    program = "\n".join([*blocks, "print(tuple(logits.shape)[-1])"])
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split()
    assert lines[:2] == ["8", "4"]
    assert lines[-1] == "512"


def test_the_native_page_names_every_gate_field():
    page = (ROOT / "docs/native_format.md").read_text(encoding="utf-8")
    fields = re.findall(r"^\| `(\w+)` \|", page.split("## Gates")[1], re.MULTILINE)
    assert set(fields) == set(GateSpec.__dataclass_fields__)


def test_readers_have_one_name_each():
    names = [reader.name for reader in FORMATS]
    assert len(set(names)) == len(names)
    assert all(r.title and r.url and r.files for r in FORMATS)
