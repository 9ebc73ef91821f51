"""A reward model beside its engine: what a text is, who reads it, and what is made of that.

The engine runs the experts; the router, which is a model of its own, runs here, in transformers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from vllm_lora_ext.adapters.reward_model import RewardAdapter, RewardExpert, Router
from vllm_lora_ext.conditions.checked import Count, checked
from vllm_lora_ext.errors import AdapterError

_TOGETHER = 16  # texts in one pass of the router
_USER, _REPLY, _END = "<extra_0>", "<extra_1>", "<extra_2>"
_FIX = 'send {"router_ids": [...], "inner_ids": [...]}, or {"messages": [...]}'

_Ids = Annotated[list[Count], Field(min_length=1)]


class _AsIds(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    router_ids: _Ids
    inner_ids: _Ids


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["user", "assistant"]
    content: str = Field(min_length=1)


class _AsMessages(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    messages: list[_Message] = Field(min_length=2)


_IDS, _CHAT = TypeAdapter(_AsIds), TypeAdapter(_AsMessages)


@dataclass(frozen=True)
class Bounds:
    """What a model reads: so many token ids, below `vocabulary`."""

    longest: int
    vocabulary: int

    def check(self, ids: list[int], where: str) -> None:
        """Raises AdapterError `bad_value`."""
        if max(ids) >= self.vocabulary:
            raise AdapterError(
                "bad_value", f"{where} holds an id that the model does not know", seen=max(ids),
                limit=f"0 to {self.vocabulary - 1}", fix="tokenise it with the model's tokenizer",
            )  # fmt: skip
        if len(ids) > self.longest:
            raise AdapterError(
                "bad_value", f"{where} is too long", seen=len(ids), limit=self.longest,
                fix="send less of the chat, or start the engine with a larger --max-model-len",
            )  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """One text, as the router and as the experts read it: token ids."""

    router_ids: list[int]
    inner_ids: list[int]


@dataclass(frozen=True)
class Pass:
    """One pass of the engine: the expert `number` of a category over the ids of text `text`."""

    text: int
    category: str
    number: int
    ids: list[int]


@dataclass(frozen=True)
class Reward:
    """What is said of one text.

    Args:
        category_probs: of all categories, in the router's order.
        reward: None where the category has no files, and so no experts.
    """

    category: str
    category_probs: list[float]
    reward: float | None


class Judge:
    """All of a reward model but its experts' passes.

    Args:
        base: the experts' base model, whose architecture the router has too: a folder, or a name.
        device: where the router runs.
        engine: what the experts' engine reads.
    Raises:
        AdapterError: `not_found`, `wrong_base`: the reward model is none for this base.
    """

    def __init__(self, adapter: RewardAdapter, base: str, device: str, engine: Bounds) -> None:
        self.adapter, self._base, self._engine = adapter, base, engine
        self._router = RouterModel(adapter.router, base, device)

    def read(self, value: object, where: str) -> Reading:
        """A text from outside: its ids, or the messages of a chat whose last one is the reply.

        Raises:
            AdapterError: `bad_value`, which names `where` it is wrong.
        """
        if isinstance(value, dict) and "messages" in value:
            router, inner = _templated(checked(_CHAT, value, where, _FIX), where)
            reading = Reading(self._tokens(router, where), self._tokens(inner, where))
        else:
            ids = checked(_IDS, value, where, _FIX)
            reading = Reading(ids.router_ids, ids.inner_ids)
        self._router.bounds.check(reading.router_ids, f"{where}.router_ids")
        self._engine.check(reading.inner_ids, f"{where}.inner_ids")
        return reading

    def route(self, readings: Sequence[Reading]) -> torch.Tensor:
        """[texts, categories]: the router's probabilities."""
        return self._router([reading.router_ids for reading in readings])

    def passes(self, readings: Sequence[Reading], probs_TC: torch.Tensor) -> list[Pass]:
        """What the engine is to run: the experts of a text one after the other."""
        chosen = zip(readings, self._chosen(probs_TC), strict=True)
        return [
            Pass(text, name, number, reading.inner_ids)
            for text, (reading, name) in enumerate(chosen)
            for number in range(len(self._experts(name)))
        ]

    def each_expert(self) -> Iterator[tuple[str, int, RewardExpert]]:
        """Category, number and LoRA of every expert."""
        for name in self.adapter.categories:
            for number, expert in enumerate(self._experts(name)):
                yield name, number, expert

    def rewards(
        self, probs_TC: torch.Tensor, passes: Sequence[Pass], hidden: Sequence[torch.Tensor]
    ) -> list[Reward]:
        """Args: hidden: the last token's hidden state of each pass, after the final norm, [D]."""
        rows: dict[int, list[torch.Tensor]] = {}
        for one, hidden_D in zip(passes, hidden, strict=True):
            rows.setdefault(one.text, []).append(hidden_D.float())
        found = []
        for text, name in enumerate(self._chosen(probs_TC)):
            reward = None
            if text in rows:
                reward = self.adapter.categories[name].head(torch.stack(rows[text]))
            found.append(Reward(name, probs_TC[text].tolist(), reward))
        return found

    def _experts(self, category: str) -> Sequence[RewardExpert]:
        """In the head's order; none of a category without files."""
        found = self.adapter.categories.get(category)
        return () if found is None else found.experts

    def _chosen(self, probs_TC: torch.Tensor) -> list[str]:
        return [self.adapter.names[i] for i in probs_TC.argmax(-1).tolist()]

    def _tokens(self, text: str, where: str) -> list[int]:
        try:
            return list(self._tokenizer(text)["input_ids"])
        except (OSError, ValueError) as error:
            raise AdapterError(
                "bad_value", f"{where}.messages needs a tokenizer, and the base model has none",
                seen=self._base, fix='send {"router_ids": [...], "inner_ids": [...]}',
            ) from error  # fmt: skip

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._base)


def _templated(chat: _AsMessages, where: str) -> tuple[str, str]:
    """The two texts that DMoERM makes of a chat: every user turn, and the last turn with its reply.

    Raises:
        AdapterError: `bad_value`, there is no reply to a user at the end.
    """
    turns = chat.messages
    if [turn.role for turn in turns[-2:]] != ["user", "assistant"]:
        raise AdapterError(
            "bad_value", f"{where}.messages does not end with a user's turn and its reply",
            seen=[turn.role for turn in turns[-2:]], limit=["user", "assistant"],
            fix="put the reply last",
        )  # fmt: skip
    router = "".join(_USER + turn.content for turn in turns if turn.role == "user")
    return router, f"{_USER}{turns[-2].content}{_REPLY}{turns[-1].content}{_END}"


class RouterModel:
    """The router in transformers, in the dtype in which it was saved.

    Args:
        base: a model whose config is the router's.
    Attributes:
        bounds: what it reads.
    Raises:
        AdapterError: `wrong_base`, its tensors are not those of the base's architecture.
    """

    def __init__(self, router: Router, base: str | os.PathLike[str], device: str) -> None:
        from transformers import AutoConfig, AutoModel

        self._router = router
        try:
            config = AutoConfig.from_pretrained(base)
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise AdapterError(
                "not_found", f"transformers cannot load the base model's config: {first}",
                seen=os.fspath(base), fix="name a folder with a model, or a model of the hub",
            ) from error  # fmt: skip
        dtype = next(iter(router.weights.values())).dtype
        model = AutoModel.from_config(config, dtype=dtype).eval()
        try:
            model.load_state_dict(router.weights, assign=True)
        except RuntimeError as error:
            wrong = str(error).strip().splitlines()[-1].strip()
            raise AdapterError(
                "wrong_base", f"the router's tensors are not those of this base model: {wrong}",
                seen=os.fspath(base), limit="a base of the router's architecture and sizes",
                fix="name the base model from which the reward model was trained",
            ) from error  # fmt: skip
        self._model = model.to(device)
        longest = getattr(config, "max_position_embeddings", None) or 1 << 20
        self.bounds = Bounds(longest, model.get_input_embeddings().num_embeddings)

    def __call__(self, prompts: Sequence[list[int]]) -> torch.Tensor:
        """[B, categories] on the CPU: probabilities."""
        found = [
            self._together(prompts[first : first + _TOGETHER])
            for first in range(0, len(prompts), _TOGETHER)
        ]
        return torch.cat(found)

    def _together(self, prompts: Sequence[list[int]]) -> torch.Tensor:
        # Attention is causal: what pads a prompt on its right is not seen from inside of it.
        longest = max(map(len, prompts))
        ids_BT = torch.tensor([ids + [0] * (longest - len(ids)) for ids in prompts])
        last_B = torch.tensor([len(ids) - 1 for ids in prompts])
        with torch.inference_mode():
            device = self._model.device
            hidden_BTD = self._model(ids_BT.to(device), use_cache=False).last_hidden_state
            hidden_BD = hidden_BTD[torch.arange(len(prompts), device=device), last_B.to(device)]
            return self._router.probabilities(hidden_BD.cpu())
