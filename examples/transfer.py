"""The stages of `trans_lora.py`: discriminator, questions, labels, training."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from synthesis import PER_ROUND, Engine, fresh, judged, same, split
from tasks import Item

SEEDS = 8  # questions that the writers of more may see
REAL = 200  # of the task's other questions, for the discriminator
CHECKED = 40  # of them, and of the made-up ones, only measure it
DISCRIMINATOR_STEPS, DISCRIMINATOR_RATE = 40, 2e-3
ROUNDS = 24  # at most, to find enough questions
SEED = 5


@dataclass(frozen=True)
class Inputs:
    """What is given: two bases, an adapter, the task's questions, and what to measure with."""

    source: Path
    adapter: Path
    target: Path
    real: list[str]
    test: list[Item]

    @property
    def seeds(self) -> list[str]:
        return self.real[:SEEDS]


@dataclass
class Report:
    """The JSON file, filled in as the run goes, and what is said meanwhile."""

    console: Console
    data: dict[str, Any] = field(default_factory=dict)
    begin: float = field(default_factory=time.perf_counter)

    def note(self, stage: str, text: str, **values: Any) -> None:
        seconds = round(time.perf_counter() - self.begin)
        self.data[stage] = values
        self.data.setdefault("seconds_until", {})[stage] = seconds
        self.console.print(f"[dim]{seconds:4} s[/]  [bold]{stage}[/]: {escape(text)}")


def train_lora(
    base: Path, items: list[Item], like: Path, out: Path, steps: int, rate: float, label: str
) -> Path:
    """A LoRA with the rank, scale and modules of `like` on the upper layers of `base`."""
    import torch
    from peft import LoraConfig
    from smollm import load
    from train_adapters import fit, save, with_lora

    torch.manual_seed(SEED)
    given = LoraConfig.from_pretrained(like)
    model, tokenizer = load(folder=base)
    layers = model.config.num_hidden_layers
    config = LoraConfig(
        r=given.r, lora_alpha=given.lora_alpha, target_modules=given.target_modules,
        use_rslora=given.use_rslora,
    )  # fmt: skip
    peft_model = with_lora(model, config, range(layers // 2, layers))
    fit(peft_model, tokenizer, [(0, i) for i in items], steps=steps, rate=rate, label=label)
    save(peft_model, out, base.name)
    return out


def discriminator(inputs: Inputs, source: Engine, work: Path, report: Report) -> Path:
    """Trained on the task's questions and as many of the source base's own."""
    real = inputs.real[SEEDS:]
    seen = {same(q) for q in [*inputs.seeds, *(item.question for item in inputs.test)]}
    made_up: list[str] = []
    for _ in range(ROUNDS):
        made_up += fresh(source.synthesise(inputs.seeds), seen)
        if len(made_up) >= len(real):
            break
    made_up = made_up[: len(real)]
    if len(made_up) < 2 * CHECKED:
        raise SystemExit(f"the old base wrote only {len(made_up)} different questions; --no-filter")
    learned = judged(real[CHECKED:], made_up[CHECKED:])
    folder = train_lora(
        inputs.source, learned, inputs.adapter, work / "discriminator",
        DISCRIMINATOR_STEPS, DISCRIMINATOR_RATE, "discriminator",
    )  # fmt: skip
    shares = [
        100 * len(split(some, source.real(some, folder))[0]) / CHECKED
        for some in (real[:CHECKED], made_up[:CHECKED])
    ]
    report.note(
        "discriminator",
        f"trained on {len(learned)} questions; of others it takes {shares[0]:.0f} % of the real "
        f"and {shares[1]:.0f} % of the made-up ones as real",
        trained_on=len(learned), checked_on=2 * CHECKED, real_taken_as_real_percent=shares[0],
        made_up_taken_as_real_percent=shares[1], made_up_examples=made_up[:8],
    )  # fmt: skip
    return folder


def gather(
    inputs: Inputs, writer: Engine, source: Engine, judge: Path | None, count: int, report: Report
) -> list[str]:
    """`count` different questions by `writer` that `judge` takes as real."""
    test = {same(item.question) for item in inputs.test}
    seen = {same(q) for q in inputs.seeds}
    kept: list[str] = []
    refused: list[str] = []
    written = in_test = rounds = 0
    with report.console.status("writing and judging questions") as status:
        while len(kept) < count and rounds < ROUNDS:
            rounds += 1
            new = fresh(writer.synthesise(inputs.seeds), seen)
            written += PER_ROUND
            # For a clean measurement only: in earnest nobody has these.
            in_test += sum(same(q) in test for q in new)
            new = [q for q in new if same(q) not in test]
            real = source.real(new, judge) if judge else [1.0] * len(new)
            accepted, others = split(new, real)
            kept += accepted
            refused += others
            status.update(f"writing and judging questions: {len(kept)} of {count}")
    share = 100 * len(kept) / max(1, len(kept) + len(refused))
    report.note(
        "questions",
        f"{written} written, {len(kept) + len(refused)} different ones, {share:.0f} % kept; "
        f"{in_test} of the held-out ones left out",
        written=written, different=len(kept) + len(refused), kept_percent=round(share, 1),
        held_out_left_out=in_test, kept_examples=kept[:12], refused_examples=refused[:12],
    )  # fmt: skip
    if len(kept) < count // 4:
        raise SystemExit(f"only {len(kept)} questions found; --no-filter or --writer may help")
    return kept[:count]


def label(
    inputs: Inputs,
    source: Engine,
    questions: list[str],
    max_tokens: int,
    file: Path,
    report: Report,
) -> list[Item]:
    """The source adapter's answers, kept in `file`; those that it did not finish teach nothing."""
    answers = source.answers(questions, inputs.adapter, max_tokens)
    pairs = [Item(q, a) for q, a in zip(questions, answers, strict=True) if a]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(asdict(pair)) + "\n" for pair in pairs), encoding="utf-8")
    report.note(
        "labels", f"{len(pairs)} of {len(questions)} answered by the source adapter",
        pairs=len(pairs), examples=[[i.question, i.answer] for i in pairs[:8]],
    )  # fmt: skip
    return pairs
