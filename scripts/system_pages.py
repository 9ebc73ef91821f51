"""Writes docs/systems/<name>.md, docs/formats.md and docs/systems.md from the table of formats.

    python scripts/system_pages.py            # write; `make docs`
    python scripts/system_pages.py --check    # exit code 1 when a page differs
    python scripts/system_pages.py --measure  # transformers' numbers of docs/systems/measured.json

A page keeps what stands between its two `by hand` markers. Systems without a reader (merged
adapters, plans) are sections of docs/systems/others.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vllm_lora_ext.adapters.readers.base import Reader
from vllm_lora_ext.adapters.registry import FORMATS

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "systems"
TABLE_PAGE, SYSTEMS = ROOT / "docs" / "formats.md", ROOT / "docs" / "systems.md"
MEASURED, OTHERS = PAGES / "measured.json", PAGES / "others.json"
FIXTURES = ROOT / "tests" / "fixtures" / "routed"
BY_HAND, END_BY_HAND = "<!-- by hand -->", "<!-- end by hand -->"
TABLE, END_TABLE = "<!-- systems: make docs -->", "<!-- end systems -->"
NOTE = "<!-- Written by `make docs` from the reader; only the part by hand is kept. -->"

# What only `convert` knows, or nobody, is a line of docs/formats.md.
PAGED = [reader for reader in FORMATS if reader.formula]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--measure", action="store_true")
    options = parser.parse_args()
    if options.measure:
        measure()
    stale = [path for path, text in files().items() if _old(path) != text]
    for path in stale:
        print(f"{'differs' if options.check else 'written'}: {path.relative_to(ROOT)}")
        if not options.check:
            path.write_text(files()[path], encoding="utf-8")
    return int(options.check and bool(stale))


def files() -> dict[Path, str]:
    """Every generated file with the text that it must have."""
    rows = json.loads(MEASURED.read_text(encoding="utf-8"))["rows"]
    found = {TABLE_PAGE: table_page()}
    for reader in PAGED:
        path = PAGES / f"{reader.name}.md"
        mine = [row for row in rows if row["system"] == reader.name]
        found[path] = page(reader, mine, _by_hand(_old(path)))
    before, after = _around(_old(SYSTEMS), TABLE, END_TABLE)
    found[SYSTEMS] = f"{before}{TABLE}\n\n{overview(rows)}\n{END_TABLE}{after}"
    return found


def page(reader: Reader, rows: list[dict[str, Any]], by_hand: str) -> str:
    """One system's page; `rows` are its measurements."""
    parts = [
        f"# {reader.title}", NOTE, _facts(reader), _refused(reader), _section("Formula",
        f"```text\n{reader.formula.strip()}\n```" if reader.formula else ""),
        _section("Files", _wrap(_sentence(reader.files))), _gates(rows), _settings(reader, rows),
        "" if reader.refused else _serve(reader), _checked(reader, rows),
        _section("Traps", "\n".join(_wrap(_sentence(trap), "- ") for trap in reader.traps)),
        f"{BY_HAND}{by_hand}{END_BY_HAND}",
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def overview(rows: list[dict[str, Any]]) -> str:
    """The table of docs/systems.md: one section per kind of system."""
    served = [reader for reader in PAGED if not reader.refused]
    plain = [reader for reader in served if "no gate" in reader.summary.lower()]
    said = [reader for reader in served if reader.request]
    routed = [reader for reader in served if reader not in plain and reader not in said]
    text = ""
    kinds = {
        "Routed adapters": routed, "Adapters that a request completes": said,
        "Adapters without a gate": plain,
    }  # fmt: skip
    for title, some in kinds.items():
        text += f"### {title}\n\n| system | what it is | transformers | vLLM |\n|---|---|---|---|\n"
        for reader in some:
            mine = [row for row in rows if row["system"] == reader.name]
            numbers = [_worst(mine, side) for side in ("transformers", "engine")]
            text += f"| {_link(reader)} | {_first(reader.summary)} | {' | '.join(numbers)} |\n"
        text += "\n"
    refused = [reader for reader in PAGED if reader.refused]
    text += "### Known and refused\n\n| system | why |\n|---|---|\n"
    text += "".join(f"| {_link(r)} | {_cell(_sentence(r.refused))} |\n" for r in refused) + "\n"
    for section in json.loads(OTHERS.read_text(encoding="utf-8")):
        text += f"### {section['title']}\n\n| system | status |\n|---|---|\n"
        text += "".join(f"| {r['system']} | {r['status']} |\n" for r in section["rows"]) + "\n"
    return text.rstrip() + "\n"


def table_page() -> str:
    """docs/formats.md: what each format is known by, and what becomes of it."""
    ways = {
        "served": "## Served as they are",
        "convert": "## Made an ordinary LoRA by `convert`",
        "refused": "## Refused",
    }
    text = f"# Which of your files works how\n\n{NOTE}\n\n{FORMATS_TEXT}\n"
    for status, title in ways.items():
        last = {"served": "routing.json must say", "convert": "give", "refused": "why"}[status]
        text += f"\n{title}\n\n| format | known by | {last} |\n|---|---|---|\n"
        for row in FORMATS:
            if row.status == status:
                name = f"[{row.title}](systems/{row.name}.md)" if row in PAGED else row.title
                cells = [name, _cell(_escape(row.files)), _cell(_asked(row))]
                text += f"| {' | '.join(cells)} |\n"
    return text


def _asked(row: Reader) -> str:
    """What must be given for a folder of this format, or why it is refused."""
    if row.refused:
        return _sentence(row.refused)
    words = [f"`--{need}`" for need in row.needs] if row.read is None else []
    form = "`{}`" if row.read is not None else "`--set {}=...`"
    hidden = {"sizes"} if "base" in row.needs else set()
    return ", ".join([*words, *(form.format(key) for key in row.settings if key not in hidden)])


FORMATS_TEXT = """A folder is recognised by its config and the names of its tensors together; `vllm-lora-ext inspect`
says what yours is. `.bin` and `.pt` weights go through `vllm-lora-ext convert --allow-pickle` first. What
`routing.json` must say can be given as `--set key=value` too. The options of the second table are those
of `convert`: the base model's folder, the rank of an approximation, the adapter that training began
with, LoRAM's index, the pruned model. Merges and generated adapters are another matter:
[merged_systems.md](merged_systems.md)."""  # noqa: E501


def _facts(reader: Reader) -> str:
    code = f"[{reader.url.removeprefix('https://')}]({reader.url})"
    if not reader.url.startswith("https://"):
        code = f"[{Path(reader.url).name}](../{Path(reader.url).name})"
    lines = [
        _wrap(_escape(reader.summary)), "",
        "| | |", "|---|---|",
        f"| name | `{reader.name}` |",
        f"| defined in | {code} |",
    ]  # fmt: skip
    if reader.paper:
        lines.append(f"| paper | {_cell(reader.paper)} |")
    if reader.request:
        lines.append(f"| a request says | {_cell(reader.request)} |")
    lines.append(f"| status | {'refused' if reader.refused else 'served'} |")
    return "\n".join(lines).strip()


def _refused(reader: Reader) -> str:
    return _section("Why it is refused", _wrap(_sentence(reader.refused)) if reader.refused else "")


def _gates(rows: list[dict[str, Any]]) -> str:
    """Rows of the gate table, of the adapters whose layers all have one gate."""
    gates = {row["fixture"]: row["gate"] for row in rows if row.get("gate")}
    lines = [f"- {name}: `{gate}`" for name, gate in gates.items()]
    text = "As a row of the [gate table](../native_format.md#gates), in the adapters checked:\n\n"
    return _section("Gate", text + "\n".join(lines) if lines else "")


def _settings(reader: Reader, rows: list[dict[str, Any]]) -> str:
    if not reader.settings:
        return ""
    text = "`routing.json`, beside the files, says what they leave out:\n\n"
    text += "| key | meaning |\n|---|---|\n"
    text += "".join(f"| `{key}` | {_cell(value)} |\n" for key, value in reader.settings.items())
    examples = [FIXTURES / row["fixture"] / "adapter" / "routing.json" for row in rows]
    for example in [path for path in examples if path.is_file()][:1]:
        compact = json.dumps(json.loads(example.read_text(encoding="utf-8")))
        text += f"\nFor example:\n\n```json\n{compact}\n```\n"
    return _section("Settings", text.rstrip())


def _serve(reader: Reader) -> str:
    here = f"adapters/{reader.name}"
    lines = [
        f"vllm-lora-ext inspect {here}",
        f"vllm serve BASE --enable-lora --max-lora-rank 64 --lora-modules mine={here}",
    ]
    text = "```bash\n" + "\n".join(lines) + "\n```\n\n`inspect` prints the rank that this adapter"
    text += " needs; [adapters.md](../adapters.md)\ntells about `convert` and `verify`."
    if reader.request:
        text += (
            " [requests.md](../requests.md) shows how a\nrequest says what its numbers depend on."
        )
    return _section("Serve it", text)


def _checked(reader: Reader, rows: list[dict[str, Any]]) -> str:
    if reader.refused:
        return ""
    if not rows:
        return _section(
            "What was checked", "There are no recorded numbers of its own code for it yet."
        )
    text = (
        "| adapter | what | made with | effect | transformers | vLLM |\n|---|---|---|---|---|---|\n"
    )
    for row in rows:
        cells = [row["fixture"], row["what"], row["reference"], f"{row['effect']:.2f}"]
        cells += [_number(row, side) for side in ("transformers", "engine")]
        text += f"| {' | '.join(_cell(cell) for cell in cells)} |\n"
    text += (
        "\n*effect*: mean change of a logit by the adapter. *transformers*: largest difference of a"
    )
    text += " logit\nfrom the reference's. *vLLM*: largest difference of a log-probability."
    return _section("What was checked", text)


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _number(row: dict[str, Any], side: str) -> str:
    found = row.get(side)
    return f"{found['largest']:.0e} ({found['date']})" if found else "not measured"


def _worst(rows: list[dict[str, Any]], side: str) -> str:
    found = [row[side]["largest"] for row in rows if row.get(side)]
    return f"{max(found):.0e}" if found else ""


def _link(reader: Reader) -> str:
    return f"[{reader.title}](systems/{reader.name}.md)"


def _first(text: str) -> str:
    return _cell(re.split(r"(?<=[.!?]) ", text, maxsplit=1)[0])


def _sentence(text: str) -> str:
    """With a capital, unless it begins with a name of code, and a full stop."""
    text = _escape(text.strip())
    if re.match(r"[a-z]+('s)? ", text):
        text = text[0].upper() + text[1:]
    return text + ("" if text.endswith(".") else ".")


def _escape(text: str) -> str:
    """Placeholders such as <module> would vanish as tags."""
    return re.sub(r"<(\w+)>", r"&lt;\1&gt;", text)


def _wrap(text: str, first: str = "") -> str:
    return textwrap.fill(
        text, width=100, initial_indent=first, subsequent_indent=" " * len(first),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _old(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _by_hand(old: str) -> str:
    return _between(old, BY_HAND, END_BY_HAND) if BY_HAND in old else "\n"


def _between(text: str, start: str, end: str) -> str:
    return text.split(start, 1)[1].split(end, 1)[0]


def _around(text: str, start: str, end: str) -> tuple[str, str]:
    before, rest = text.split(start, 1)
    return before, rest.split(end, 1)[1]


def measure() -> None:
    """Runs every fixture in transformers and notes how far we are from the recorded numbers."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "adapters")]
    import torch
    from conftest import load_base
    from test_fixtures import fixture, largest_error

    from vllm_lora_ext.adapters import load_adapter
    from vllm_lora_ext.errors import AdapterError

    measured = json.loads(_old(MEASURED))
    earlier = {row["fixture"]: row for row in measured["rows"]}
    bases: dict[str, Any] = {}
    rows = []
    for folder in sorted(path for path in FIXTURES.iterdir() if path.is_dir()):
        path, meta, expected = fixture(folder.name)
        try:
            adapter = load_adapter(path)
        except AdapterError as error:
            print(f"{folder.name}: {error.text}")
            continue
        if meta["base"] not in bases:
            bases[meta["base"]] = load_base(meta["base"])
        with torch.inference_mode():
            largest = largest_error(bases[meta["base"]], adapter, expected)
        row = earlier.pop(folder.name, {"engine": None})
        rows.append({
            "fixture": folder.name,
            "system": adapter.system,
            "base": meta["base"],
            "reference": meta["reference"],
            "what": "logits of 4 prompts and of 12 greedy tokens after each, float32",
            "effect": round(sum(meta["mean_abs_dlogit"]) / len(meta["mean_abs_dlogit"]), 2),
            "gate": one_gate(adapter),
            "transformers": {"largest": float(f"{largest:.1e}"), "date": _today()},
            "engine": row["engine"],
        })  # fmt: skip
        print(f"{folder.name}: {largest:.1e}")
    with torch.no_grad():
        rows += [row | {"engine": earlier.pop(row["fixture"], {}).get("engine")}
                 for row in measure_against_peft(load_base)]  # fmt: skip
    with torch.no_grad():
        for row in measure_conditioned(load_base):
            rows.append(row | {"engine": earlier.pop(row["fixture"], {}).get("engine")})
    rows += [row for name, row in earlier.items() if not (FIXTURES / name).is_dir()]
    measured["rows"] = rows
    MEASURED.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


def measure_conditioned(load_base: Callable[[str], Any]) -> Iterator[dict[str, Any]]:
    """The rows of the systems that a request completes."""
    from test_conditioned import NAMES, differences
    from test_conditioned import fixture as conditioned

    bases: dict[str, Any] = {}
    for name in NAMES:
        meta, _ = conditioned(name)
        if meta["base"] not in bases:
            bases[meta["base"]] = load_base(meta["base"])
        off = [float(d.abs().max()) for _, d in differences(name, bases[meta["base"]])]
        moved = meta["mean_abs_dlogit"]
        if isinstance(moved, dict):  # by user
            moved = [one for some in moved.values() for one in some]
        print(f"{name}: {max(off):.1e}")
        yield {
            "fixture": name,
            "system": re.split("[-_]", name)[0],
            "base": meta["base"],
            "reference": meta["reference"],
            "what": f"logits of {len(off)} requests, float32",
            "effect": round(sum(moved) / len(moved), 2),
            "gate": None,
            "transformers": {"largest": float(f"{max(off):.1e}"), "date": _today()},
        }


def measure_against_peft(load_base: Callable[[str], Any]) -> Iterator[dict[str, Any]]:
    """The rows of PEFT's own systems that have no fixture: its code runs beside ours."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import peft
    from peft_adapters import adapters, prompts

    from vllm_lora_ext.adapters import load_adapter
    from vllm_lora_ext.adapters.hf import apply_adapter

    name = "base_llama"
    base = load_base(name)
    ids = prompts(base.config.vocab_size)
    plain = [base(i).logits for i in ids]
    with tempfile.TemporaryDirectory() as place:
        for system, folder, settings, wanted in adapters(base, Path(place)):
            adapter = load_adapter(folder, settings=settings)
            with apply_adapter(base, adapter):
                got = [base(i).logits for i in ids]
            both = list(zip(got, wanted, strict=True))
            moved = [float((a - b).abs().mean()) for a, b in zip(wanted, plain, strict=True)]
            largest = max(float((a - b).abs().max()) for a, b in both)
            print(f"{system}: {largest:.1e} from PEFT, moved {sum(moved) / len(moved):.2f}")
            yield {
                "fixture": f"peft-{system}",
                "system": adapter.system,
                "base": name,
                "reference": f"huggingface/peft {peft.__version__}, which made a random adapter, "
                "saved it and ran it",
                "what": f"logits of {len(ids)} random prompts of {ids[0].shape[1]} tokens, float32",
                "effect": round(sum(moved) / len(moved), 2),
                "gate": one_gate(adapter),
                "transformers": {"largest": float(f"{largest:.1e}"), "date": _today()},
            }


def one_gate(adapter: Any) -> str | None:
    """The gate of all layers that have one, or None when they differ."""
    from vllm_lora_ext.summary import gate_text

    gates = [layer.gate for layer in (*adapter.modules.values(), *adapter.blocks.values())]
    texts = {gate_text(gate) for gate in gates if gate.source != "none"}
    return texts.pop() if len(texts) == 1 else None


def _today() -> str:
    return datetime.date.today().isoformat()


if __name__ == "__main__":
    sys.exit(main())
