"""What the fuzz targets share: how an input is changed, which codes an error may have, the run."""

from __future__ import annotations

import copy
import json
import random
import re
import resource
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

ROOT = Path(__file__).parents[2]
CODES = set(re.findall(r"^\| `([a-z_]+)` \|", (ROOT / "docs/errors.md").read_text(), re.MULTILINE))
JUNK: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 8, 0.5, -0.5, 1e300, -1e300, 2**31, 2**63, 2**70, "", "x",
    "8", "LORA", "ROUTED_LORA", "router", "top_k", "\ud800", "../x", "[", "(a+)+$", [], [None],
    [2, 2], [[1]], {}, {"a": 1}, {"default": {}}, [10**6] * 3, ["q_proj"], "F32", "F8_E8M0", "I64",
)  # fmt: skip


MOST_DATA = 1 << 20
MOST_MEMORY_KIB = 512 << 10  # more than before, for files of some KiB


class Memory:
    """What this process may take from now on."""

    def __init__(self) -> None:
        self._before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def check(self) -> None:
        more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self._before
        assert more < MOST_MEMORY_KIB, f"{more} KiB for a file of some KiB"


def with_data(header: bytes, weights: bytes) -> bytes:
    """A safetensors file of a header: its length, and data up to where the header says it ends."""
    data = weights[8 + int.from_bytes(weights[:8], "little") :]
    try:
        ends = [entry["data_offsets"][1] for entry in json.loads(header).values()
                if isinstance(entry, dict) and "data_offsets" in entry]  # fmt: skip
        end = max([int(end) for end in ends], default=0)
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, RecursionError):
        end = len(data)
    end = end if 0 <= end <= MOST_DATA else len(data)
    return len(header).to_bytes(8, "little") + header + data[:end].ljust(end, b"\0")


def header_of(weights: bytes) -> bytes:
    """The header of a safetensors file."""
    return weights[8 : 8 + int.from_bytes(weights[:8], "little")]


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """Changes the JSON as JSON mostly, and its bytes sometimes."""
    rng = random.Random(seed)
    try:
        value = json.loads(data[2:])
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or rng.random() < 0.2:
        changed: bytes = atheris.Mutate(data, len(data))
        return changed[:most]
    for _ in range(rng.choice((1, 1, 2, 3))):
        _change(value, rng)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass")
    return (data[:2] + text)[:most]


def _change(value: dict[str, Any], rng: random.Random) -> None:
    """One key of an object, however deep: gone, another, twice, or of another value."""
    inner: Any = value
    while isinstance(inner, dict) and inner:
        key = rng.choice(list(inner))
        if isinstance(inner[key], dict | list) and inner[key] and rng.random() < 0.6:
            inner = inner[key]
            continue
        match rng.randrange(5):
            case 0:
                del inner[key]
            case 1:
                inner[rng.choice((key + "x", key.replace("A", "B"), "", "r", "\ud800"))] = (
                    inner.pop(key)
                )
            case 2:
                again = rng.choice((key + ".0", key.replace("0", "1")))
                inner[again] = copy.deepcopy(inner[key])
            case _:
                inner[key] = copy.deepcopy(rng.choice(JUNK))
        return
    if isinstance(inner, list):
        at = rng.randrange(len(inner))
        inner[at : at + rng.randrange(2)] = copy.deepcopy([rng.choice(JUNK)] * rng.randrange(3))


def run(argv: list[str], target: Callable[[bytes], None], seeds: Callable[[Path], None]) -> None:
    """Fuzzes until libFuzzer's options say stop; or repeats one input; or takes over from a corpus
    what reaches something of its own.

    Args:
        argv: of a target's script: CORPUS [options], --show INPUT, or --merge SMALL CORPUS.
        seeds: writes what the fuzzer begins with into a folder.
    """
    if argv[1] == "--show":
        target(Path(argv[2]).read_bytes())
        return
    if argv[1] == "--merge":
        again = shlex.join([sys.executable, argv[0]])  # libFuzzer starts itself by a shell
        argv = [again, "-merge=1", *argv[2:]]
    elif not argv[1].startswith("-"):
        Path(argv[1]).mkdir(parents=True, exist_ok=True)
        seeds(Path(argv[1]))
    atheris.Setup(argv, target, custom_mutator=mutate)
    atheris.Fuzz()
