"""How much of what training gained is left in the server, by system: the gain ratio.

    python benchmarks/gain_ratio.py                     # trains each, asks each, writes the table
    python benchmarks/gain_ratio.py --system loramoe --items 20 --steps 30 --out /tmp/one.json
    python benchmarks/gain_ratio.py --draw              # picture and page again, from the results

    (served - base) / (reference - base)

`reference` are right answers of the training model itself in transformers (PEFT for plain LoRA and
DoRA), `served` of the saved folder in vLLM, `base` of vLLM without an adapter; the same held-out
items, greedy. 1 is what it should be; bfloat16 may turn an answer now and then.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
from server import ENVIRONMENT
from smollm import load, prompt_ids
from tasks import Item, is_right
from train_system import NAMES, OUT, STEPS, questions, right, train

RESULT = Path(__file__).parent / "results" / "gain_ratio.json"
ITEMS = 30  # of each task
PAGE = Path(__file__).parent.parent / "docs" / "train.md"
BEGIN, END = "<!-- gain ratio: make gain-ratio -->\n", "<!-- end gain ratio -->"


def references(names: list[str], items: list[Item], steps: int) -> dict[str, int]:
    """Trains every system and counts its right answers in transformers."""
    found = {}
    for name in names:
        adapted, tokenizer = train(name, steps)
        found[name] = right(adapted.get_base_model(), tokenizer, items)
        print(f"{name}: {found[name]}/{len(items)} in transformers", flush=True)
    return found


def served(names: list[str], items: list[Item]) -> dict[str, int]:
    """Right answers in vLLM: one engine for all, and `base` without an adapter."""
    os.environ |= ENVIRONMENT
    from base_model import ensure_base
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        str(ensure_base()), dtype="bfloat16", max_model_len=256, block_size=32,
        enforce_eager=True, enable_lora=True, max_lora_rank=16, max_loras=2,
    )  # fmt: skip
    _, tokenizer = load()
    prompts = [{"prompt_token_ids": prompt_ids(tokenizer, item.question)} for item in items]
    greedy, found = SamplingParams(max_tokens=32, temperature=0.0), {}
    for i, name in enumerate(["base", *names]):
        request = LoRARequest(name, i, str(OUT / name)) if i else None
        said = [answer.outputs[0].text for answer in llm.generate(
            prompts, greedy, lora_request=request
        )]  # fmt: skip
        found[name] = sum(map(is_right, items, said))
    return found


def rows(reference: dict[str, int], vllm: dict[str, int]) -> list[dict[str, Any]]:
    """Without a gain in transformers there is no ratio: None."""
    base = vllm["base"]
    return [
        {
            "system": name, "reference": want, "served": vllm[name],
            "gain_ratio": round((vllm[name] - base) / (want - base), 3) if want != base else None,
        }
        for name, want in reference.items()
    ]  # fmt: skip


def draw(report: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    places = range(len(report["rows"]))
    figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
    for shift, key in ((-0.2, "reference"), (0.2, "served")):
        heights = [100 * row[key] / report["items"] for row in report["rows"]]
        axes.bar([place + shift for place in places], heights, 0.4, label=key)
    axes.axhline(100 * report["base"] / report["items"], color="black", lw=1, label="base")
    axes.set_xticks(places, [row["system"] for row in report["rows"]])
    axes.set(ylabel="held-out right, %", ylim=(0, 100))
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(file, dpi=120)


def table(report: dict[str, Any]) -> str:
    """Of the page."""
    said = [
        f"{report['items']} held-out questions, {report['steps']} steps of training each, seeded;"
        f" the base model answers {report['base']} of them.", "",
        "| system | right in transformers | right in vLLM | gain ratio |", "|---|---|---|---|",
    ]  # fmt: skip
    for row in report["rows"]:
        ratio = "-" if row["gain_ratio"] is None else f"{row['gain_ratio']:g}"
        said.append(f"| {row['system']} | {row['reference']} | {row['served']} | {ratio} |")
    return "\n".join(said) + "\n"


def with_table(page: str, report: dict[str, Any]) -> str:
    """The page with these results."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + table(report) + END + rest.partition(END)[2]


def write(report: dict[str, Any], out: Path) -> None:
    """The picture; and the page, of the results that are kept."""
    draw(report, out.with_suffix(".png"))
    if out.resolve() == RESULT.resolve():
        page = with_table(PAGE.read_text(encoding="utf-8"), report)
        PAGE.write_text(page, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--system", choices=NAMES, action="append", help="only this one")
    parser.add_argument("--items", type=int, default=ITEMS, help="held-out items of each task")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--draw", action="store_true", help="only write what --out holds")
    args = parser.parse_args()
    if args.draw:
        write(json.loads(args.out.read_text(encoding="utf-8")), args.out)
        return
    names = args.system or list(NAMES)
    items = [item for own in questions(args.items).values() for item in own]
    reference = references(names, items, args.steps)
    vllm = served(names, items)
    report = {
        "items": len(items), "steps": args.steps, "base": vllm["base"],
        "rows": rows(reference, vllm),
    }  # fmt: skip
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    write(report, args.out)
    for row in report["rows"]:
        print(row)


if __name__ == "__main__":
    main()
