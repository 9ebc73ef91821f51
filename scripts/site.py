"""Lays the pages of the site out in build/pages: README as the start, docs/ as the root.

    python scripts/site.py && mkdocs build --strict     # `make site`

Links are written for a reader of the repository; here those that leave docs/ get their new place.
What is no page of the site (code, numbers) becomes a file beside it, or plain text.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "pages"
_LINK = re.compile(r"(?P<text>!?\[[^\]]*\])\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_INFO = re.compile(r"^(```\w+) .*$", re.MULTILINE)  # what tests do with a block
_FILES = {".png", ".json"}


def main() -> int:
    shutil.rmtree(OUT, ignore_errors=True)
    pages = places()
    files: set[Path] = set()
    for source, place in pages.items():
        text = source.read_text(encoding="utf-8")
        parts = _FENCE.split(text)
        parts[::2] = [_moved(part, source, place, pages, files) for part in parts[::2]]
        parts[1::2] = [_INFO.sub(r"\1", part, count=1) for part in parts[1::2]]
        target = OUT / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("".join(parts), encoding="utf-8")
    for file in sorted(files):
        target = OUT / _of_file(file)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    print(f"{len(pages)} pages, {len(files)} files in {OUT}")
    return 0


def places() -> dict[Path, Path]:
    """Page of the repository → its place on the site."""
    docs = ROOT / "docs"
    found = {page: page.relative_to(docs) for page in sorted(docs.rglob("*.md"))}
    for name in ("CHANGELOG.md", "CONTRIBUTING.md", "kernels/README.md", "kernels/COMPILED.md"):
        found[ROOT / name] = Path(name)
    return {ROOT / "README.md": Path("index.md"), **found}


def _moved(text: str, source: Path, place: Path, pages: dict[Path, Path], files: set[Path]) -> str:
    def change(match: re.Match[str]) -> str:
        target, anchor = match["target"], match["anchor"] or ""
        if re.match(r"[a-z]+:", target):
            return match[0]
        where = (source.parent / target).resolve()
        if where in pages:
            new = pages[where]
        elif where.suffix in _FILES and where.is_file():
            files.add(where)
            new = _of_file(where)
        else:
            return match["text"].lstrip("!")[1:-1]
        return f"{match['text']}({os.path.relpath(new, place.parent)}{anchor})"

    return _LINK.sub(change, text)


def _of_file(file: Path) -> Path:
    docs = ROOT / "docs"
    inside = docs in file.parents
    return file.relative_to(docs) if inside else Path("files") / file.relative_to(ROOT)


if __name__ == "__main__":
    sys.exit(main())
