"""The pages of systems and formats are what the readers say, and their links lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
from make_adapters import FIXTURES

from vllm_lora_ext.adapters import FORMATS, load_adapter

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "systems"


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("system_pages", ROOT / "scripts/system_pages.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = _script()
ROWS = json.loads((PAGES / "measured.json").read_text(encoding="utf-8"))["rows"]


@pytest.mark.parametrize("path", script.files(), ids=lambda path: path.name)
def test_pages_are_up_to_date(path: Path) -> None:
    assert path.is_file(), "run `make docs`"
    assert path.read_text(encoding="utf-8") == script.files()[path], "run `make docs`"


@pytest.mark.parametrize("reader", script.PAGED, ids=lambda reader: reader.name)
def test_readers_describe_themselves(reader) -> None:
    assert reader.summary and reader.files and reader.formula
    assert reader.paper or reader.name == "native"


def test_every_format_is_a_line_of_the_page_of_formats() -> None:
    page = script.table_page()
    for row in FORMATS:
        assert row.title in page and row.name, row.name
        assert (row in script.PAGED) == (f"(systems/{row.name}.md)" in page)


@pytest.mark.parametrize("path", sorted(PAGES.glob("*.md")), ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (path.parent / target.split("#")[0]).exists(), target


def test_what_stands_by_hand_is_kept() -> None:
    reader = script.PAGED[0]
    old = script.page(reader, [], "\nMine, and <!-- a comment -->.\n")
    assert "Mine, and <!-- a comment -->." in old
    assert script.page(reader, [], script._by_hand(old)) == old


def test_a_refused_system_has_its_reason_and_no_command() -> None:
    refused = [reader for reader in script.PAGED if reader.refused]
    assert refused
    for reader in refused:
        page = script.page(reader, [], "\n")
        assert "Why it is refused" in page and "vllm serve" not in page
        assert " ".join(reader.refused.split())[:40].lower() in " ".join(page.split()).lower()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["fixture"])
def test_measured_rows_fit_their_fixtures(row) -> None:
    assert row["effect"] > 0.1
    for side, bound in (("transformers", 1e-3), ("engine", 2e-3)):
        if row[side] is not None:
            assert 0 <= row[side]["largest"] < bound
            assert re.fullmatch(r"\d{4}-\d\d-\d\d", row[side]["date"])
    folder = FIXTURES / "routed" / row["fixture"] / "adapter"
    if folder.is_dir():
        adapter = load_adapter(folder)
        assert adapter.system == row["system"]
        assert script.one_gate(adapter) == row["gate"]


def test_every_fixture_is_measured() -> None:
    folders = {path.parent.name for path in (FIXTURES / "routed").glob("*/expected.safetensors")}
    assert folders <= {row["fixture"] for row in ROWS}, "scripts/system_pages.py --measure"
