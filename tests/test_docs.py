"""The documentation is true: code runs or compiles, flags, commands, settings and links exist."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from vllm_lora_ext.cli import app
from vllm_lora_ext.settings import LoraExtSettings

ROOT = Path(__file__).resolve().parent.parent
ENGINE_TESTS = ROOT / "integration_tests" / "README.md"
PAGES = (
    *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "kernels").glob("*.md"),
    ROOT / "examples" / "toy_reader" / "README.md", ROOT / "tests" / "README.md", ENGINE_TESTS,
)  # fmt: skip
_FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    run: bool
    body: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def _blocks() -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            language, _, rest = match["info"].partition(" ")
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(page, line, language, "run" in rest.split(), match["body"]))
    return found


def _commands(block: Block) -> list[list[str]]:
    """Each command as words, without leading NAME=value, with continued lines joined."""
    commands, line = [], ""
    for more in block.body.replace("\\\n", " ").splitlines():
        line = f"{line}\n{more}" if line else more
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a quotation goes on
            continue
        line = ""
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words.pop(0)
        if words:
            commands.append([Path(words[0]).name, *words[1:]])
    assert not line, f"{block}: a quotation does not end"
    return commands


BLOCKS = _blocks()
PYTHON = [block for block in BLOCKS if block.language == "python"]
SHELL = [block for block in BLOCKS if block.language in ("bash", "sh")]


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_blocks(block: Block, tmp_path: Path) -> None:
    """Blocks tagged `python run` need no engine and run; the others must at least compile."""
    compile(block.body, str(block), "exec")
    if block.run:
        done = subprocess.run(
            [sys.executable, "-c", block.body], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def serve_flags() -> set[str]:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "vllm"), "serve", "--help=all"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"--[a-z0-9][a-z0-9-]*", done.stdout))


def test_vllm_serve_flags_exist(serve_flags: set[str]) -> None:
    seen = 0
    for block in SHELL:
        for words in _commands(block):
            if words[:2] == ["vllm", "serve"]:
                flags = {word.split("=")[0] for word in words if word.startswith("--")}
                assert flags - serve_flags == set(), f"{block} names flags that vLLM lacks"
                seen += 1
    assert seen >= 3


def test_our_commands_and_make_targets_exist() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    seen = set()
    for block in SHELL:
        for words in _commands(block):
            if words[0] == "vllm-lora-ext":
                assert words[1] in commands, f"{block}: {words}"
                options = {opt for p in commands[words[1]].params for opt in p.opts}
                assert {w for w in words if w.startswith("--")} <= options, f"{block}: {words}"
                seen.add(words[1])
            elif words[0] == "make":
                assert words[1] in targets, f"{block}: {words}"
                seen.add(words[1])
    assert {"doctor", "inspect", "check-vllm", "demo", "test"} <= seen


def test_commands_on_files_of_the_checkout_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they are written, in a folder that has `examples/`."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    ran = set()
    for block in SHELL:
        for name, *words in _commands(block):
            if name == "vllm-lora-ext" and any("examples/" in word for word in words):
                done = CliRunner().invoke(app, words)
                assert done.exit_code == 0, f"{block}: {done.output}"
                ran.add(words[0])
    assert ran == {"merge"}


def test_the_page_of_settings_has_the_settings() -> None:
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    table = text.split("```")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", table, re.MULTILINE))
    fields = LoraExtSettings.model_fields
    want = {name: json.dumps(field.default) for name, field in fields.items()}
    assert rows == want


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in _LINK.findall(text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        where = page.parent / path if path else page
        assert where.exists(), f"{page.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", where.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {_anchor(title) for title in titles}, f"{page.name}: {target}"


def test_every_engine_test_stands_below_its_question() -> None:
    named = re.findall(r"\]\(((?:\w+/)?test_\w+\.py)\)", ENGINE_TESTS.read_text(encoding="utf-8"))
    folder = ENGINE_TESTS.parent
    assert sorted(named) == sorted(str(f.relative_to(folder)) for f in folder.rglob("test_*.py"))


def _anchor(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
