"""Says whether a tag is the version that pyproject.toml, the package and the changelog name.

python scripts/release_check.py v0.1.0
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(tag: str) -> int:
    wrong = [f"{place} says {said}, the tag {tag}" for place, said in versions().items()
             if f"v{said}" != tag]  # fmt: skip
    print("\n".join(wrong) or f"{tag} is what everything says")
    return int(bool(wrong))


def versions() -> dict[str, str]:
    """Place → the version that it names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    package = (ROOT / "vllm_lora_ext" / "__init__.py").read_text(encoding="utf-8")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    return {
        "pyproject.toml": project["version"],
        "vllm_lora_ext/__init__.py": _first(r'^__version__ = "(.+)"$', package),
        "CHANGELOG.md": _first(r"^## (\S+)", changes),
    }


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    return found[1] if found else "nothing"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ""))
