"""Reinforcement learning with one engine that serves while it is taught.

Each step samples answers from the newest version of an adapter, rewards them, trains on them (group
advantages as in GRPO, on policy), and hands the next version to the engine as tensors in memory: no
file is written, no cache is cleared, no request waits. Questions of the exam are still being
answered when the next version goes live: they end on theirs, in the same batches. Every answer is
checked to have come from the version that it was asked of.

    plain     a PEFT LoRA that learns one task of the demo after a short supervised start
    routed    routers over the demo's three skills, from "all the same" to the right one

    python examples/rl_loop.py               # both; examples/results/rl_loop.{json,png}
    python examples/rl_loop.py --policy plain --steps 5
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base_model import ensure_base
from rl_policies import Plain, Policy, Rollout, Routed
from smollm import prompt_ids
from tasks import Item, held_out, is_right, training

STEPS, WARM = {"plain": 20, "routed": 16}, 5
QUESTIONS, GROUP = 6, 8  # answers to each question of a step
EXAM, EXAM_EVERY = 40, 2
MAX_TOKENS = 16
CLOSE = 0.2  # how far log-probabilities of 16-bit weights may differ, on the average
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Asked:
    """A question on its way."""

    item: Item
    prompt: list[int]
    version: str  # of the adapter, when it was asked


class Actor:
    """The engine, and the newest version of the adapter in it."""

    def __init__(self, llm: Any, name: str) -> None:
        self._engine, self._name = llm.llm_engine, name
        self._tokenizer = llm.get_tokenizer()
        self._asked: dict[str, Asked] = {}
        self._done: dict[str, Any] = {}
        self._request: Any = None
        self.version = ""
        self.count = 0

    def publish(self, tensors: dict[str, Any], config: dict[str, Any]) -> None:
        """From now on questions go to these weights, which follow the ones before."""
        self._request = self._engine.add_adapter(
            self._name, tensors, config, expected_version=self.version or None
        )
        before, self.version = self.version, self._engine.adapter_version(self._request)
        assert self.version != before, "the step has changed no weight"

    def ask(self, questions: Iterable[tuple[Item, Any]]) -> list[str]:
        """Puts questions, each with its sampling parameters, to the newest version; their names."""
        names = []
        for item, params in questions:
            name, self.count = f"{self._name}-{self.count}", self.count + 1
            prompt = prompt_ids(self._tokenizer, item.question)
            self._engine.add_request(
                name, {"prompt_token_ids": prompt}, params, lora_request=self._request
            )
            self._asked[name] = Asked(item, prompt, self.version)
            names.append(name)
        return names

    def begin(self) -> None:
        """One step of what was asked."""
        self._done |= {out.request_id: out for out in self._engine.step() if out.finished}

    def answers(self, names: Sequence[str]) -> list[tuple[Asked, Any]]:
        """Questions and answers, each of the version that it was asked of."""
        while not all(name in self._done for name in names):
            self.begin()
        found = [(self._asked.pop(name), self._done.pop(name)) for name in names]
        for asked, output in found:
            assert output.adapter_version == asked.version, "an answer of another version"
        return found

    def close(self) -> None:
        """Frees the adapter."""
        self._engine.remove_lora(self._request.lora_int_id)


def reward(item: Item, said: str) -> float:
    """1 for the right answer, up to a half for one that looks like it."""
    if is_right(item, said):
        return 1.0
    return difflib.SequenceMatcher(None, said.strip(), item.answer).ratio() / 2


def rollouts(answers: list[tuple[Asked, Any]]) -> tuple[list[Rollout], float]:
    """Of groups of answers to one question, those that teach something; the mean reward."""
    rewards = [reward(asked.item, output.outputs[0].text) for asked, output in answers]
    found = []
    for start in range(0, len(answers), GROUP):
        group = rewards[start : start + GROUP]
        mean, spread = statistics.mean(group), statistics.pstdev(group)
        if spread < 1e-6:
            continue  # all the same: no answer is better than another
        for (asked, output), value in zip(answers[start : start + GROUP], group, strict=True):
            ids = list(output.outputs[0].token_ids)
            sampled = zip(ids, output.outputs[0].logprobs, strict=True)
            logprobs = [entry[token].logprob for token, entry in sampled]
            advantage = (value - mean) / (spread + 0.1)
            found.append(Rollout(asked.item, asked.prompt, ids, logprobs, advantage))
    return found, statistics.mean(rewards)


class Exam:
    """Held-out questions, answered while the loop goes on; `marks`: share of right ones by step."""

    def __init__(self, actor: Actor, items: list[Item]) -> None:
        from vllm import SamplingParams

        greedy = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
        self._actor, self._questions = actor, [(item, greedy) for item in items]
        self._open: tuple[int, list[str]] | None = None
        self.marks: dict[int, float] = {}

    def begin(self, step: int) -> None:
        """Asks the newest version; the answers are still on their way afterwards."""
        self._open = step, self._actor.ask(self._questions)
        self._actor.begin()

    def collect(self) -> None:
        """The answers, if any are on their way."""
        if self._open is None:
            return
        (step, names), self._open = self._open, None
        answers = self._actor.answers(names)
        right = sum(is_right(asked.item, output.outputs[0].text) for asked, output in answers)
        self.marks[step] = round(right / len(answers), 4)


def sampled(policy: Policy, dice: random.Random) -> list[tuple[Item, Any]]:
    """Questions of a step, as many of each of the policy's tasks, each asked as a group."""
    from vllm import SamplingParams

    pools = [training(task) for task in policy.tasks]
    items = [dice.choice(pools[i % len(pools)]) for i in range(QUESTIONS)]
    return [
        (item, SamplingParams(max_tokens=MAX_TOKENS, logprobs=0, seed=dice.randrange(1 << 30)))
        for item in items
        for _ in range(GROUP)
    ]


def learn(
    llm: Any, policy: Policy, steps: int, exam_every: int = EXAM_EVERY, exam_items: int = EXAM
) -> dict[str, Any]:
    """The loop.

    Args:
        llm: an engine with room for the adapter; it may serve others meanwhile.
        exam_items: questions of each task.
    Returns:
        The curve: by step the reward, by exam the share of right answers.
    Raises:
        AssertionError: an answer came from another version than it was asked of.
    """
    began, dice = time.perf_counter(), random.Random(0)
    actor = Actor(llm, f"policy-{policy.name}")
    exam = Exam(actor, [item for task in policy.tasks for item in held_out(task, exam_items)])
    rewards, distances = [], []
    actor.publish(*policy.adapter())
    for step in range(steps):
        names = actor.ask(sampled(policy, dice))
        exam.collect()  # of the version before, answered in the same batches
        useful, mean = rollouts(actor.answers(names))
        rewards.append(round(mean, 4))
        if step % exam_every == 0:
            exam.begin(step)
        if useful:
            distances.append(round(policy.improve(useful), 4))
            actor.publish(*policy.adapter())
        print(f"{policy.name} {step + 1:3}  reward {mean:.3f}  exam {exam.marks}  "
              f"distance {distances[-1:]}", flush=True)  # fmt: skip
    exam.collect()
    exam.begin(steps)
    exam.collect()
    actor.close()
    assert statistics.mean(distances) < CLOSE, "the engine computes something else"
    return {
        "reward": rewards, "distance": distances, "exam": exam.marks, "answers": actor.count,
        "seconds": round(time.perf_counter() - began),
    }  # fmt: skip


def make_engine() -> Any:
    """The demo's base model in the engine that serves all versions."""
    from server import ENVIRONMENT

    os.environ.update(ENVIRONMENT)
    from vllm import LLM

    return LLM(
        str(ensure_base()), dtype="bfloat16", enable_lora=True, max_loras=2, max_lora_rank=16,
        max_model_len=128, max_num_seqs=64, block_size=32, disable_log_stats=True,
        enforce_eager=True,  # a compiler takes longer than it gives back in minutes
    )  # fmt: skip


def write(curves: dict[str, Any], out: Path) -> None:
    """Numbers and picture."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "rl_loop.json").write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")
    draw(curves, out / "rl_loop.png")


def draw(curves: dict[str, Any], file: Path) -> None:
    """One panel a policy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    titles = {"plain": "plain LoRA (PEFT), one task", "routed": "routers over three skills"}
    figure, axes = plt.subplots(1, len(curves), figsize=(4.6 * len(curves), 3.2), dpi=130,
                                squeeze=False, sharey=True)  # fmt: skip
    for panel, (name, curve) in zip(axes[0], curves.items(), strict=True):
        panel.plot(curve["reward"], color="#9ab8d8", label="mean reward of the rollouts")
        steps = list(map(int, curve["exam"]))
        panel.plot(steps, list(curve["exam"].values()), "o-", color="#1a7f37", ms=4,
                   label="right answers, held-out questions")  # fmt: skip
        panel.set_title(titles[name], fontsize=10)
        panel.set_xlabel("version of the adapter")
        panel.set_ylim(0, 1.04)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False, fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", choices=list(STEPS), action="append", help="only this one")
    parser.add_argument("--steps", type=int, help="instead of the policy's own number")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    args = parser.parse_args()
    llm = make_engine()
    curves: dict[str, Any] = {}
    for name in args.policy or STEPS:
        policy = Plain(WARM) if name == "plain" else Routed()
        curves[name] = learn(llm, policy, args.steps or STEPS[name])
        write(curves, args.out)
    for name, curve in curves.items():
        first, *_, last = curve["exam"].values()
        print(f"{name}: {first:.0%} to {last:.0%} right, {curve['answers']} answers, each from the"
              f" version it was asked of, {curve['seconds']} s")  # fmt: skip
        if last <= first:
            sys.exit(f"FAILED {name}: nothing was learnt")


if __name__ == "__main__":
    main()
