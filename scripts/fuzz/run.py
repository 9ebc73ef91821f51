"""Fuzzes the doors: adapter folders, recipes and names of mixes, our own other files, HTTP fields.

    python scripts/fuzz/run.py --seconds 300
    python scripts/fuzz/run.py --only folders

What fuzzes (atheris, schemathesis) is installed once below build/fuzz. Where atheris has no wheel,
hypothesis takes its place, with a long profile of the tests. A finding's input is kept in
build/fuzz/found; `folders.py --show` and its like repeat it. After a run a corpus holds
what reaches something of its own, and nothing else.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
HERE = REPO / "scripts" / "fuzz"
BUILD = REPO / "build" / "fuzz"
REQUIREMENTS = REPO / "requirements" / "fuzz.txt"
EXAMPLES_A_SECOND = 1  # of the hypothesis tests, all formats together
# Of libFuzzer: a hang is an input that takes this long, and so is one that takes this much memory.
BOUNDS = ("-timeout=15", "-rss_limit_mb=4096", "-max_len=20000", "-len_control=0")


def main(argv: list[str]) -> int:
    """The largest exit status."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=int, default=300, help="for each door")
    parser.add_argument("--only", choices=("folders", "recipes", "files", "http"))
    given = parser.parse_args(argv)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (_packages(), REPO)))}
    doors = {"folders": folders, "recipes": recipes, "files": files, "http": http}
    status = 0
    for name, fuzz in doors.items():
        if given.only in (None, name):
            status = max(status, abs(fuzz(given.seconds, environment)))
            print(f"{name}: {'nothing found' if not status else f'status {status}'}", flush=True)
    return status


def folders(seconds: int, environment: dict[str, str]) -> int:
    """Adapter folders, in this process's own machine: nothing is served."""
    return _fuzzed("folders", sorted((REPO / "tests/adapters").glob("test_fuzz_*.py")),
                   seconds, environment)  # fmt: skip


def recipes(seconds: int, environment: dict[str, str]) -> int:
    """Recipes as the load route reads them, and names of mixes; nothing is merged."""
    return _fuzzed("recipes", [REPO / "tests/serving/test_mix_name.py"], seconds, environment)


def files(seconds: int, environment: dict[str, str]) -> int:
    """Traces, LoRA Soups, bundles and their routers, libraries and what merges leave in a store."""
    return _fuzzed("files", [REPO / "tests/adapters/test_found_by_fuzzing.py"],
                   seconds, environment)  # fmt: skip


def _fuzzed(name: str, instead: list[Path], seconds: int, environment: dict[str, str]) -> int:
    """A target's script until the time is up; its corpus stays small.

    Args:
        instead: tests by hypothesis, where there is no atheris.
    """
    paths = os.pathsep.join((str(REPO / "tests"), environment["PYTHONPATH"]))
    environment = environment | {"PYTHONPATH": paths}
    if importlib.util.find_spec("atheris") is None and not (BUILD / "packages/atheris").exists():
        examples = str(max(seconds * EXAMPLES_A_SECOND, 45))
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "--timeout", "0",
                   *map(str, instead)]  # fmt: skip
        return subprocess.run(
            command, cwd=REPO, env=environment | {"LORA_EXT_FUZZ": examples}
        ).returncode
    found, corpus = BUILD / "found", BUILD / "corpus" / name
    for folder in (found, corpus):
        folder.mkdir(parents=True, exist_ok=True)
    script = [sys.executable, str(HERE / f"{name}.py")]
    command = [*script, str(corpus), *BOUNDS, f"-max_total_time={seconds}"]
    command += [f"-artifact_prefix={found}/{name}-", "-print_final_stats=1"]
    status = subprocess.run(command, cwd=BUILD, env=environment).returncode
    return status or _minimised(script, corpus, environment)


def _minimised(script: list[str], corpus: Path, environment: dict[str, str]) -> int:
    """Without the inputs of a corpus that reach nothing that smaller ones do not reach."""
    before, small = len(list(corpus.iterdir())), corpus.with_suffix(".small")
    shutil.rmtree(small, ignore_errors=True)
    small.mkdir()
    paths = [str(folder.relative_to(BUILD)) for folder in (small, corpus)]  # no blanks in them
    command = [*script, "--merge", *paths, *BOUNDS]
    subprocess.run(command, cwd=BUILD, env=environment, stderr=subprocess.DEVNULL)
    stay = len(list(small.iterdir()))
    print(f"{corpus.name}: {stay} of {before} inputs stay in the corpus", flush=True)
    if not stay:
        return 1
    shutil.rmtree(corpus)
    small.rename(corpus)
    return 0


def http(seconds: int, environment: dict[str, str]) -> int:
    """A server of its own, and requests that its OpenAPI allows or nearly allows."""
    command = [sys.executable, "-m", "scripts.fuzz.http_fields", "--seconds", str(seconds)]
    return subprocess.run(command, cwd=REPO, env=environment).returncode


def _packages() -> Path:
    """What fuzzes, in a folder of its own."""
    folder = BUILD / "packages"
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        command = [*pip, "--no-deps", "--target", str(folder), "-r", str(REQUIREMENTS)]
        subprocess.run(command, check=True)
    return folder


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
