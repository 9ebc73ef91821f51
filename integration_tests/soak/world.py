"""What a soak's clients ask for, and what each must be answered: known before the traffic begins.

An answer is what the same server says when it is asked alone; the adapters' own are held against
transformers too. They count up to their first near tie, which rounding may decide otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from integration_tests.engines import base_path
from integration_tests.reference_model import logits
from integration_tests.soak.api import Answer, Api, Question
from tests.bad_adapters import BAD, build_bad
from tests.make_adapters import random_adapter, router_spec
from vllm_lora_ext.adapters.model import RoutedAdapter
from vllm_lora_ext.adapters.readers.native import write_native
from vllm_lora_ext.adapters.registry import load_adapter
from vllm_lora_ext.merging import Factors, Pair, save_peft
from vllm_lora_ext.routing import GateSpec

BASE = "base_llama"
SHORT, LONG = 12, 80
PROMPTS = tuple(
    tuple(torch.randint(4, 380, (n,), generator=torch.Generator().manual_seed(n)).tolist())
    for n in (7, 33, 60)
)
RANKS = {"plain-0": 5, "plain-1": 6, "plain-2": 7, "plain-3": 5}
PLAIN, ROUTED = tuple(RANKS), ("routed-0", "routed-1")
TWINS = ("plain-0", "plain-3")  # of one shape: one's weights fit beside the other's config
STATIC = ("soak-one", "soak-two")  # loaded all the time; mixes and spans are made of them
LIVE = ("soak-live-0", "soak-live-1")  # replaced all the time
MIXES = tuple(
    f"{method}:soak-one*{one}+soak-two*{two}"
    for method, one, two in (("cat", 0.6, 0.4), ("cat", 1, -0.5), ("cat", 0.25, 1),
                             ("svd[r=5]", 0.7, 0.6), ("ties[d=0.4,r=8]", 1, 1))
)  # fmt: skip
SAYS: tuple[dict[str, Any], ...] = (
    {"adapters": [{"name": "soak-one", "scale": 0.5}]},
    {"adapters": [{"name": "soak-one"}, {"name": "soak-two", "scale": -0.7}]},
    {"adapters": [{"name": "soak-one", "spans": [[0, 5]]}]},
    {"adapters": [{"name": "soak-one", "spans": [[2, 20]]},
                  {"name": "soak-two", "spans": [[20, None]]}]},
    {"adapters": [{"name": "soak-two", "scale": 1.5, "spans": [[30, 36], [50, None]]}]},
)  # fmt: skip
REFUSED = (
    "truncated", "a_nan", "b_inf", "router_nan", "layer_unknown", "other_hidden_size", "other_base",
)  # fmt: skip


@dataclass(frozen=True)
class Bad:
    folder: Path
    code: str


@dataclass
class World:
    """Folders and answers.

    Attributes:
        folders: content → its folder; versions: digest → content.
        answers: of contents (by name, as the model), mixes, and what requests say.
    """

    root: Path
    folders: dict[str, Path] = field(default_factory=dict)
    bad: list[Bad] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    answers: dict[tuple[str, str, tuple[int, ...]], tuple[int, ...]] = field(default_factory=dict)

    @property
    def contents(self) -> tuple[str, ...]:
        return (*PLAIN, *ROUTED)

    def version(self, content: str) -> str:
        return next(version for version, of in self.versions.items() if of == content)

    def of_content(self, content: str, prompt: tuple[int, ...]) -> tuple[int, ...]:
        """The tokens of whatever name stands for a content."""
        return self.answers[content, "", prompt]

    def of(self, question: Question) -> tuple[int, ...]:
        """The tokens of the base model, a mix, or of what a request says."""
        return self.answers[_key(question)]


def _key(question: Question) -> tuple[str, str, tuple[int, ...]]:
    return question.model, str(question.says or ""), question.prompt


def make(root: Path) -> World:
    """The folders: adapters of rank 5 to 8, and some that must be refused."""
    world = World(root)
    config = AutoConfig.from_pretrained(base_path(BASE))
    for number, (name, rank) in enumerate(RANKS.items()):
        adapter = random_adapter(config, 20 + number, GateSpec(), rank=rank, strength=0.3)
        modules = {n: Pair(m.a_RK, m.b_NR) for n, m in adapter.modules.items()}
        world.folders[name] = root / name
        save_peft(Factors(modules, BASE), root / name)
    for number, name in enumerate(ROUTED):
        adapter = random_adapter(config, 30 + number, router_spec(), strength=0.3, base_model=BASE)
        world.folders[name] = write_native(adapter, root / name)
    for name in REFUSED:
        world.bad.append(Bad(root / "bad" / name, BAD[name].code))
        build_bad(name, root / "bad" / name)
    return world


def learn(world: World, api: Api) -> None:
    """Asks for everything alone; `STATIC` is loaded from then on.

    Raises:
        AssertionError: the server does not answer as transformers does.
    """
    for content in world.contents:
        loaded = api.load("soak-probe", world.folders[content])
        assert loaded.ok, loaded
        world.versions[loaded.version] = content
        adapter = load_adapter(world.folders[content])
        for prompt in PROMPTS:
            tokens = _alone(api, Question("soak-probe", prompt), LONG)
            world.answers[content, "", prompt] = tokens
            assert tokens[:SHORT] == _reference(adapter, prompt, tokens[:SHORT]), content
        assert api.unload("soak-probe").ok
    hold(world, api, STATIC)
    for question in questions():
        world.answers[_key(question)] = _alone(api, question, LONG)


def hold(world: World, api: Api, names: tuple[str, ...]) -> None:
    """Loads them, each with a content of its own."""
    for name, content in zip(names, PLAIN, strict=False):
        assert api.load(name, world.folders[content]).ok


def killed_mixes(turn: int) -> list[str]:
    """What is being merged when a server is killed."""
    return [f"cat:soak-one*{(turn + 2) / 8}+soak-two*{(i + 1) / 8}" for i in range(8)]


def learn_mixes(world: World, api: Api, mixes: list[str]) -> None:
    """As `learn`, of more mixes, for a short answer each."""
    for question in (Question(mix, PROMPTS[0]) for mix in mixes):
        world.answers[_key(question)] = _alone(api, question, SHORT)


def questions() -> list[Question]:
    """Of the base model, of mixes, and that say something."""
    asked = [Question("base", prompt) for prompt in PROMPTS]
    asked += [Question(mix, prompt) for mix in MIXES for prompt in PROMPTS[:2]]
    asked += [Question("base", prompt, says) for says in SAYS for prompt in PROMPTS[1:]]
    return asked


def forget(api: Api, but: tuple[str, ...] = ()) -> None:
    """Unloads a soak's names."""
    for name in api.adapters():
        if name.startswith("soak-") and name not in but:
            assert api.unload(name).ok


def _alone(api: Api, question: Question, n: int) -> tuple[int, ...]:
    answer = api.ask(question, n)
    assert isinstance(answer, Answer) and answer.ok, (question, answer)
    return answer.tokens[: answer.sure]


def _reference(
    adapter: RoutedAdapter, prompt: tuple[int, ...], given: tuple[int, ...]
) -> tuple[int, ...]:
    """What transformers says after each of the given tokens."""
    ids = [*prompt, *given]
    best = logits(BASE, adapter, ids).argmax(-1)[len(prompt) - 1 : len(ids) - 1]
    return tuple(best.tolist())
