"""Writes docs/support.md's tables: which vLLM, Python, torch and runner were seen, and when.

    python scripts/support_page.py                      # the tables from docs/support.json
    python scripts/support_page.py --check              # exit code 1 when the page differs
    python scripts/support_page.py --look 0.30.0 0.31.0   # first hold the patches against these

`--look` fetches one wheel at a time and deletes it; nothing of it is run. What was *run* is written
into docs/support.json by hand, with its date: a machine cannot see which tests a person let run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from email.parser import Parser
from pathlib import Path
from typing import Any

from vllm_lora_ext.model_patches.check import check_tree, recorded
from vllm_lora_ext.vllm_sources import sources_of

ROOT = Path(__file__).resolve().parent.parent
RECORD, PAGE = ROOT / "docs" / "support.json", ROOT / "docs" / "support.md"
START, END = "<!-- support: make support -->", "<!-- end support -->"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--look", nargs="+", default=[], metavar="RELEASE")
    options = parser.parse_args()
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    for release in options.look:
        record["releases"][release] = look(release)
        ordered = sorted(record["releases"].items(), key=lambda item: _key(item[0]), reverse=True)
        record["releases"] = dict(ordered)
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    old = PAGE.read_text(encoding="utf-8")
    new = page(old, record)
    if new != old and not options.check:
        PAGE.write_text(new, encoding="utf-8")
    if new != old:
        print(f"{'differs' if options.check else 'written'}: {PAGE.relative_to(ROOT)}")
    return int(options.check and new != old)


def look(release: str) -> dict[str, Any]:
    """What a release's wheel says of itself, and how many of the patches' targets are as known."""
    with tempfile.TemporaryDirectory(prefix="vllm-lora-ext-") as scratch:
        root, version = sources_of(release, Path(scratch))
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
            metadata = Parser().parsestr(archive.read(name).decode())
        states = Counter(finding.state for finding in check_tree(root, version))
        required = metadata.get_all("Requires-Dist") or []
        torch = [found[1] for r in required if (found := re.match(r"torch\s*==\s*([\w.+]+)", r))]
        return {
            "wheel": metadata["Name"],
            "python": metadata["Requires-Python"],
            "torch": torch[0] if torch else "",
            "targets": dict(sorted(states.items())),
            "looked": datetime.date.today().isoformat(),
        }


def page(old: str, record: Mapping[str, Any]) -> str:
    """The page with its tables written anew."""
    before, rest = old.split(START, 1)
    after = rest.split(END, 1)[1]
    return f"{before}{START}\n\n{_releases(record)}\n\n{_runs(record['runs'])}\n\n{END}{after}"


def _releases(record: Mapping[str, Any]) -> str:
    lines = [
        "| vLLM | Python | torch | targets as known, changed, missing | LoRA starts | looked at |",
        "|---|---|---|---|---|---|",
    ]
    known = recorded()
    for release, row in record["releases"].items():
        counts = ", ".join(str(row["targets"].get(s, 0)) for s in ("ok", "changed", "missing"))
        starts = "yes" if release in known else "no: refused with one line"
        lines.append(
            f"| {release} | `{row['python']}` | {row['torch'] or 'its own'} | {counts} | {starts} |"
            f" {row['looked']} |"
        )
    return "\n".join(lines)


def _runs(runs: Sequence[Mapping[str, str]]) -> str:
    columns = ("vLLM", "machine", "Python", "torch", "runner", "what ran", "when")
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(run[column] for column in columns)} |" for run in runs]
    return "\n".join(lines)


def _key(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", release))


if __name__ == "__main__":
    sys.exit(main())
