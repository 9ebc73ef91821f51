"""Writes docs/matrix.md: which kinds of adapters were seen right with which features of the engine.

    python scripts/matrix_page.py            # write; the end of `make matrix`
    python scripts/matrix_page.py --check    # exit code 1 when the page differs

`make matrix` runs `integration_tests/test_matrix.py` and leaves its numbers in docs/matrix.json.
Cells that other tests prove, or that nothing here can test, stand below.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORD, PAGE = ROOT / "docs" / "matrix.json", ROOT / "docs" / "matrix.md"
ROWS = (
    "base", "plain", "DoRA", "merged", "routed linear", "rank-wise", "MixLoRA block",
    "several, scaled", "spans", "Activated LoRA", "user", "instruction", "X-LoRA",
)  # fmt: skip
_LINEAR = ("base", "plain", "routed linear", "rank-wise", "MixLoRA block")
_MADE = ("user", "instruction")
_SAID = ("several, scaled", "spans", "Activated LoRA")
# Column → test → rows that it proves; each in one batch with the others.
PROVED: dict[str, dict[str, Iterable[str]]] = {
    "Compiled (the default)": {
        "integration_tests/test_authors_numbers.py::test_every_log_probability_and_greedy_token":
            _LINEAR,
        "integration_tests/test_conditioned.py::test_the_authors_numbers_in_one_batch": _SAID,
        "integration_tests/test_templates.py::test_the_authors_numbers_in_one_batch": _MADE,
        "integration_tests/test_two_pass.py::test_pefts_numbers": ("X-LoRA",),
        "integration_tests/test_dora.py::test_pefts_numbers_in_one_batch": ("DoRA",),
        "integration_tests/test_merged.py::test_case_is_served_with_the_tool_s_delta": ("merged",),
    },
    "`--enforce-eager`": {
        "integration_tests/test_authors_numbers.py::test_five_systems_and_base_rows_in_one_batch":
            _LINEAR,
        "integration_tests/test_two_pass.py::test_beside_every_other_kind": (*_SAID, "X-LoRA"),
        "integration_tests/test_matrix.py::test_an_engine_of_its_own": ("DoRA", "merged", *_MADE),
    },
    "Chunked prefill": {
        "integration_tests/test_ladder.py::test_compiled_and_chunked_equal_eager_and_whole":
            ("base", "routed linear"),
        "integration_tests/test_conditioned.py::test_the_authors_numbers_in_one_batch": _SAID,
        "integration_tests/test_dora.py::test_pefts_numbers_in_one_batch": ("DoRA",),
        "integration_tests/test_templates.py::test_the_authors_numbers_in_one_batch": ("user",),
        "integration_tests/test_templates.py::test_an_instruction_longer_than_a_chunk":
            ("instruction",),
        "integration_tests/test_two_pass.py"
        "::test_a_long_prompt_in_chunks_and_from_the_prefix_cache": ("X-LoRA",),
        "integration_tests/test_matrix.py::test_an_engine_of_its_own":
            ("plain", "merged", "rank-wise", "MixLoRA block"),
    },
    "Prefix cache": {
        "integration_tests/test_ladder.py::test_alone_equals_mixed_and_cached_equals_first":
            ("base", "routed linear"),
        "integration_tests/test_conditioned.py::test_mixes_share_what_they_agree_on": _SAID,
        "integration_tests/test_dora.py::test_pefts_numbers_in_one_batch": ("DoRA", "plain"),
        "integration_tests/test_templates.py::test_a_rotation_of_users_over_few_slots": ("user",),
        "integration_tests/test_templates.py::test_the_authors_numbers_in_one_batch":
            ("instruction",),
        "integration_tests/test_two_pass.py"
        "::test_a_long_prompt_in_chunks_and_from_the_prefix_cache": ("X-LoRA",),
        "integration_tests/test_matrix.py::test_an_engine_of_its_own":
            ("merged", "rank-wise", "MixLoRA block"),
    },
    "Tensor parallel 2, `mp`": {
        "integration_tests/test_tensor_parallel.py"
        "::test_log_probabilities_and_greedy_tokens_are_those_of_one_rank":
            (*_LINEAR, "DoRA", "merged"),
        "integration_tests/test_tensor_parallel.py::test_what_requests_say_reaches_every_rank":
            (*_SAID, *_MADE, "X-LoRA"),
    },
    "Tensor parallel 2, Ray, fully sharded": {
        "integration_tests/test_tensor_parallel.py"
        "::test_log_probabilities_and_greedy_tokens_are_those_of_one_rank": (*_LINEAR, "merged"),
        "integration_tests/test_tensor_parallel.py::test_what_requests_say_reaches_every_rank":
            (*_SAID, *_MADE, "X-LoRA"),
    },
}  # fmt: skip
REFUSED = {
    "Tensor parallel 2, Ray, fully sharded": {
        "DoRA": "unsupported_feature",
    },
}
# What no machine without a GPU can show, and what shows a part of it.
NOT_HERE = {
    "Sleep and wake-up": "vLLM sleeps on GPUs only; `tests/model_patches/test_sleep.py` holds which"
    " memory stays",
    "V2 model runner, compiled": "its kernels are Triton's, for GPUs; above they are interpreted,"
    " on vLLM's V2 runner for CPUs",
    "FP8 bases of vLLM's own `fp8`": "it does not load on a CPU; FP8 of compressed-tensors does,"
    " above",
    "Hybrid bases, Mamba 1 (Jamba)": "vLLM's wheel for CPUs has no `selective_scan_fwd`: the base"
    " model's first step ends the engine, with or without an adapter",
    "bitsandbytes bases": "vLLM 0.32 has no such method of its own; adapters read a layer's output"
    " and never its weights, but for DoRA, which is refused on quantised weights"
    " (`unsupported_feature`)",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    made = page(json.loads(RECORD.read_text(encoding="utf-8")))
    stale = not PAGE.exists() or PAGE.read_text(encoding="utf-8") != made
    if stale and not options.check:
        PAGE.write_text(made, encoding="utf-8")
        print(f"written: {PAGE.relative_to(ROOT)}")
    return int(options.check and stale)


def page(recorded: dict[str, Any]) -> str:
    """The page's text; `recorded` as `integration_tests.matrix.Record` writes it."""
    lines = [_HEAD, _row(["", *ROWS]), _row(["---"] * (len(ROWS) + 1))]
    lines += [_row([name, *_proved(name)]) for name in PROVED]
    lines += [_row([name, *_recorded(column)]) for name, column in recorded.items()]
    lines += ["", "## What was run", ""]
    for name, column in recorded.items():
        said = sorted({c["note"] for c in column["cells"].values() if "note" in c})
        why = sorted({c["why"] for c in column["cells"].values() if "why" in c})
        more = "".join(f"; {text}" for text in (*said, *why))
        lines.append(
            f"- **{name}**: `{column['test']}`, {column['date']}, vLLM {column['vllm']}{more}"
        )
    lines += ["", "## What other tests prove", ""]
    for name, tests in PROVED.items():
        lines += [f"- **{name}**", *(f"  - `{t}`: {', '.join(rows)}" for t, rows in tests.items())]
    lines += ["", "## What cannot be tested without a GPU", ""]
    lines += [f"- **{name}**: {why}." for name, why in NOT_HERE.items()]
    return "\n".join(lines) + "\n"


def _proved(name: str) -> list[str]:
    known = {row for rows in PROVED[name].values() for row in rows}
    codes = REFUSED.get(name, {})
    return ["yes" if row in known else f"`{codes[row]}`" if row in codes else "" for row in ROWS]


def _recorded(column: dict[str, Any]) -> list[str]:
    return [_cell(column["cells"].get(row)) for row in ROWS]


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    if cell["state"] == "right":
        return f"{cell['number']:.0e}" if cell["number"] else "equal"
    return f"`{cell['why']}`" if cell["state"] == "refused" else cell["state"]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


_HEAD = """\
# Kinds of adapters × features of the engine

<!-- Written by scripts/matrix_page.py from docs/matrix.json: `make matrix`. -->

Every column is a kind of adapter, every row a feature of vLLM. All kinds of a row were asked in one
batch, of one engine on a CPU, in float32. A number is the largest difference of any log-probability
from the authors' own code, PEFT or transformers, whose greedy tokens were met exactly; *equal*:
tokens equal to those of requests that are proved elsewhere; *yes*: a test outside of this table
proves it, below; a code: it is refused with that code, as meant.
"""


if __name__ == "__main__":
    sys.exit(main())
