"""Scores of candidate labels: how likely the model goes on with each of them after a prompt.

A label is one token or several. Its score is the log-probability of its first token (what Menta's
authors compare), the sum over its tokens, or their mean; the three may prefer different labels.
Labels of one prompt are a tree of tokens: every node that has a next token is one request for one
token. The roots go first, so that all that follows finds its prompt in the prefix cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from vllm_lora_ext.adapters import RoutedAdapter
from vllm_lora_ext.adapters.limits import RANKS, slot_rank
from vllm_lora_ext.conditions.checked import Count, checked
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.settings import LoraExtSettings

BY: tuple[Literal["first", "sum", "mean"], ...] = ("first", "sum", "mean")
_MOST = 128  # tokens whose log-probability one request can ask for

_Ids = Annotated[list[Count], Field(min_length=1)]
_Said = Annotated[str, Field(min_length=1)]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: _Said
    content: str


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: _Said | _Ids | None = None
    prompt_ids: _Ids | None = None
    messages: list[_Message] | None = None
    labels: list[_Said | _Ids] = Field(min_length=1)
    id: str | int | None = None


_LINE = TypeAdapter(_Line)
_FIX = 'write {"prompt": TEXT or [ids], "labels": [TEXT or [ids], ...]}'


@dataclass(frozen=True)
class Question:
    """A prompt and the labels that may follow it.

    Args:
        labels: token ids of each, one or more.
        names: the labels as they were given; key: what the line calls itself, if anything.
    """

    prompt: list[int]
    labels: list[list[int]]
    names: list[Any]
    key: str | int | None = None


@dataclass(frozen=True)
class Scores:
    """What the model says of a question's labels.

    Args:
        tokens: natural log-probabilities of each label's tokens, given the prompt and the label's
            earlier tokens.
    """

    tokens: list[list[float]]

    def by(self, how: str) -> list[float]:
        """One score a label: of its `first` token, the `sum` over its tokens, or their `mean`."""
        if how == "first":
            return [label[0] for label in self.tokens]
        sums = [sum(label) for label in self.tokens]
        if how == "sum":
            return sums
        return [total / len(label) for total, label in zip(sums, self.tokens, strict=True)]

    def best(self, how: str) -> int:
        """Index of the best label; of equals the first."""
        scores = self.by(how)
        return scores.index(max(scores))

    def as_dict(self, question: Question, how: str) -> dict[str, Any]:
        """As a line of JSON. Args: how: what `label` is chosen by."""
        key = {} if question.key is None else {"id": question.key}
        best: dict[str, int] = {by: self.best(by) for by in BY}
        return key | {
            "label": question.names[best[how]], "by": how, "best": best,
            "scores": {by: self.by(by) for by in BY}, "token_logprobs": self.tokens,
        }  # fmt: skip


def read_question(value: object, where: str, tokenizer: Callable[[], Any]) -> Question:
    """A line: a prompt (text, ids, or messages of a chat) and labels (texts or ids).

    A prompt's text is tokenised with what the tokenizer puts around a text, a label's without.

    Args:
        where: what the line is called in messages; tokenizer: gives the base model's, for texts.
    Raises:
        AdapterError: `bad_value`.
    """
    line = checked(_LINE, value, where, _FIX)
    given = [p for p in (line.prompt, line.prompt_ids, line.messages) if p is not None]
    if len(given) != 1:
        raise AdapterError(
            "bad_value", f"{where} holds {len(given)} prompts", limit="one of prompt, prompt_ids,"
            " messages", fix=_FIX,
        )  # fmt: skip
    prompt = given[0]
    if line.messages is not None:
        chat = [message.model_dump() for message in line.messages]
        text = tokenizer().apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer()(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer()(prompt)["input_ids"] if isinstance(prompt, str) else prompt
    labels = [
        tokenizer()(label, add_special_tokens=False)["input_ids"]
        if isinstance(label, str) else label for label in line.labels
    ]  # fmt: skip
    for name, label in zip(line.labels, labels, strict=True):
        if not label:
            raise AdapterError(
                "bad_value", f"a label of {where} has no token", seen=name, fix="write another"
            )
    return Question(list(ids), [list(label) for label in labels], list(line.labels), line.id)


def score_labels(llm: Any, questions: Sequence[Question], lora: Any = None) -> list[Scores]:
    """Scores of all labels of all questions.

    Args:
        llm: vLLM's `LLM`, best with prefix caching.
        lora: the `LoRARequest` of the adapter; None: the base model.
    Raises:
        AdapterError: `bad_value`, a token that the model does not know, or a question that is too
            long; and what the adapter is refused for.
    """
    config = llm.llm_engine.vllm_config.model_config
    for number, question in enumerate(questions):
        _check(question, number, config.max_model_len, config.get_vocab_size())
    wanted = [_tree(question) for question in questions]
    found: list[dict[tuple[int, ...], float]] = [{} for _ in questions]
    for roots in (True, False):
        nodes = [
            (i, start, after) for i, tree in enumerate(wanted) for start, after in tree.items()
            if (not start) is roots
        ]  # fmt: skip
        _ask(llm, questions, nodes, lora, found)
    return [
        Scores([[known[tuple(ids[: n + 1])] for n in range(len(ids))] for ids in question.labels])
        for question, known in zip(questions, found, strict=True)
    ]


def engine_options(base: str, adapter: RoutedAdapter | None) -> dict[str, Any]:
    """What vLLM's `LLM` needs to score labels with an adapter, or without one."""
    options: dict[str, Any] = {
        "model": base, "dtype": "float32", "skip_tokenizer_init": True, "disable_log_stats": True,
        "enable_prefix_caching": True, "max_model_len": -1, "seed": 0,
    }  # fmt: skip
    if adapter is None:
        return options
    options |= {
        "enable_lora": True, "max_loras": 1,
        "max_lora_rank": slot_rank(adapter.rank) or RANKS[-1],
    }  # fmt: skip
    rows = adapter.router_rows
    if rows > LoraExtSettings().router_rows(options["max_lora_rank"]):
        options["additional_config"] = {"lora_ext": {"max_router_rows": rows}}
    return options


def _tree(question: Question) -> dict[tuple[int, ...], list[int]]:
    """Beginning of labels → the tokens that come after it in some label."""
    tree: dict[tuple[int, ...], list[int]] = {}
    for label in question.labels:
        for n, token in enumerate(label):
            after = tree.setdefault(tuple(label[:n]), [])
            if token not in after:
                after.append(token)
    return tree


def _ask(
    llm: Any,
    questions: Sequence[Question],
    nodes: Sequence[tuple[int, tuple[int, ...], list[int]]],
    lora: Any,
    found: Sequence[dict[tuple[int, ...], float]],
) -> None:
    """Fills in, by beginning and token, what one call of the engine says."""
    from vllm import SamplingParams

    asked = [
        (i, start, after[first : first + _MOST])
        for i, start, after in nodes for first in range(0, len(after), _MOST)
    ]  # fmt: skip
    if not asked:
        return
    prompts = [{"prompt_token_ids": questions[i].prompt + list(start)} for i, start, _ in asked]
    params = [
        SamplingParams(
            temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False,
            logprob_token_ids=after,
        ) for *_, after in asked
    ]  # fmt: skip
    outputs = llm.generate(prompts, params, lora_request=lora, use_tqdm=False)
    for (i, start, after), output in zip(asked, outputs, strict=True):
        row: Mapping[int, Any] = output.outputs[0].logprobs[0]
        found[i].update({(*start, token): row[token].logprob for token in after})


def _check(question: Question, number: int, longest: int, vocabulary: int) -> None:
    ids = [*question.prompt, *(token for label in question.labels for token in label)]
    if max(ids) >= vocabulary:
        raise AdapterError(
            "bad_value", f"question {number} holds an id that the model does not know",
            seen=max(ids), limit=f"0 to {vocabulary - 1}",
            fix="tokenise it with the model's tokenizer",
        )  # fmt: skip
    length = len(question.prompt) + max(map(len, question.labels))
    if length > longest:
        raise AdapterError(
            "bad_value", f"question {number} is too long with its longest label", seen=length,
            limit=longest, fix="shorten the prompt, or give the engine a larger max_model_len",
        )  # fmt: skip
