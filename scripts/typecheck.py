"""Runs mypy over the package under the import names it has once installed.

`routing/` is imported as `vllm_lora_ext.routing` (see setup.py), which mypy cannot know from
the folders. So it gets a tree of links that looks like the installed package, and its
messages are turned back into the real paths.

    python scripts/typecheck.py [mypy options]
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGE = ROOT / "build" / "typecheck"
PACKAGE = "vllm_lora_ext"
MAPPED = ("routing", "kernels", "model_patches")


def stage() -> None:
    """Lays out `build/typecheck/vllm_lora_ext` as links to the sources."""
    shutil.rmtree(STAGE, ignore_errors=True)
    package = STAGE / PACKAGE
    package.mkdir(parents=True)
    for entry in (ROOT / PACKAGE).iterdir():
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    for name in MAPPED:
        (package / name).symlink_to(ROOT / name)


def main() -> int:
    stage()
    command = [sys.executable, "-m", "mypy", "-p", PACKAGE, *sys.argv[1:]]
    command += ["--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(ROOT / ".mypy_cache")]
    done = subprocess.run(command, cwd=STAGE, text=True, stdout=subprocess.PIPE)
    text = re.sub(rf"^{PACKAGE}/({'|'.join(MAPPED)})/", r"\1/", done.stdout, flags=re.MULTILINE)
    print(text, end="")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
