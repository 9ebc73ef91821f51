"""Kinds of adapters × what a pooling server answers; `make matrix`.

Adapters are loaded over HTTP, so that one that is refused leaves the others alone.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    Qwen2Config,
    Qwen2ForTokenClassification,
)

from integration_tests import matrix, other_bases
from integration_tests.matrix import Record
from integration_tests.other_bases import Kind
from integration_tests.server import Server, add_tokenizer, command, free_port, serving, words
from integration_tests.test_pooling import RewardOfTokens
from tests.make_adapters import TARGETS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900), matrix.whole]
CONFIG: dict[str, Any] = {  # the attention of base_llama
    "vocab_size": matrix.VOCABULARY, "hidden_size": 128, "intermediate_size": 192,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "tie_word_embeddings": False, "pad_token_id": 0,
}  # fmt: skip
HEAD = 4  # so much larger than by default: what an adapter does shows in a probability
TOKENS = ("--pooler-config", '{"task": "token_classify"}')
LOADING = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}


@dataclass(frozen=True)
class Task:
    """
    Args:
        title: of the row; made: of the model.
        read: transformers' output → what is asked for.
        route: where, with which `body` for a prompt's words; found: its answer → numbers.
    """

    title: str
    made: Callable[[], torch.nn.Module]
    read: Callable[[Any], torch.Tensor]
    route: str
    body: Callable[[str], dict[str, Any]]
    found: Callable[[Any], Any]
    flags: tuple[str, ...] = ()


def _data(answer: Any) -> Any:
    return answer["data"][0]


TASKS = {
    "embed": Task(
        "Embeddings of a bare model, over HTTP",
        lambda: LlamaModel(LlamaConfig(**CONFIG)),
        lambda out: torch.nn.functional.normalize(out.last_hidden_state[0, -1], dim=-1),
        "v1/embeddings", lambda text: {"input": text}, lambda a: _data(a)["embedding"],
        ("--convert", "embed"),
    ),
    "classify": Task(
        "Classification, over HTTP",
        lambda: LlamaForSequenceClassification(LlamaConfig(**CONFIG, num_labels=3)),
        lambda out: out.logits[0].softmax(-1),
        "classify", lambda text: {"input": text}, lambda a: _data(a)["probs"],
    ),
    "score": Task(
        "Scores of a cross-encoder, over HTTP",
        lambda: LlamaForSequenceClassification(LlamaConfig(**CONFIG, num_labels=1)),
        lambda out: out.logits[0].sigmoid(),
        # A pair is one text after the other, here the prompt's first five words and the rest.
        "score", lambda text: dict(zip(("queries", "documents"), _halves(text), strict=True)),
        lambda a: [_data(a)["score"]],
    ),
    "token_classify": Task(
        "Labels of tokens, over HTTP",
        lambda: Qwen2ForTokenClassification(Qwen2Config(**CONFIG, num_labels=3)),
        lambda out: out.logits[0].softmax(-1),
        "pooling", lambda text: {"input": _ids(text), "task": "token_classify"},
        lambda a: _data(a)["data"], TOKENS,
    ),
    "reward": Task(
        "Rewards of tokens, over HTTP",
        lambda: RewardOfTokens(Qwen2Config(**CONFIG)),
        lambda out: out[0],
        "pooling",
        lambda text: {"input": _ids(text), "task": "token_classify", "use_activation": False},
        lambda a: _data(a)["data"], TOKENS,
    ),
}  # fmt: skip


def _ids(text: str) -> list[int]:
    """Of models of Qwen's kind, which transformers gives a tokenizer of its own."""
    return [int(word.removeprefix("t")) for word in text.split()]


def _halves(text: str) -> tuple[str, str]:
    parts = text.split()
    return " ".join(parts[:5]), " ".join(parts[5:])


@pytest.mark.parametrize("name", TASKS)
def test_a_pooling_server(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """All kinds at once, the field `lora_ext` included; then again, from the prefix cache."""
    task, folder = TASKS[name], tmp_path / "adapters"
    record = Record(task.title, request.node.nodeid)
    torch.manual_seed(0)
    net: Any = task.made().float().eval()
    with torch.no_grad():
        for weights in net.parameters():
            weights.add_(0.05 * torch.randn_like(weights))
        for part, weights in net.named_parameters():
            weights.mul_(HEAD if part.startswith("score.") else 1)
    net.save_pretrained(tmp_path / "base")
    add_tokenizer(tmp_path / "base", matrix.VOCABULARY)
    kinds = other_bases.kinds(net, TARGETS, folder, name)
    kinds["DoRA"] = other_bases.dora(net, TARGETS, folder, name)
    mlp = next(n for n, _ in net.named_modules() if n.endswith("layers.1.mlp"))
    kinds["MixLoRA block"] = other_bases.mix_block(net, mlp, folder, name)
    kinds |= other_bases.completed(net, tmp_path / "made", name)
    argv = command(
        tmp_path / "base", free_port(), None, "--runner", "pooling", "--enforce-eager",
        "--max-loras", "4", "--max-cpu-loras", "16", *task.flags,
    )  # fmt: skip
    prompts = other_bases.prompts(matrix.VOCABULARY)
    with serving(argv, tmp_path / "server.log", **LOADING) as running:
        moved: dict[str, float] = {}
        refused = load(running, kinds, [folder / "one", folder / "two"])
        asked = [(row, kind, ids) for ids in prompts for row, kind in kinds.items()]
        asked = [one for one in asked if one[0] not in refused]
        for _ in range(2):
            with ThreadPoolExecutor(8) as pool:
                got = list(pool.map(lambda one: answered(running, task, *one[1:]), asked))
            for (row, kind, ids), answer in zip(asked, got, strict=True):
                if isinstance(answer, str):
                    refused[row] = answer
                    continue
                want = other_bases.expected(net, kind.wears, ids, task.read)
                base = other_bases.expected(net, (), ids, task.read)
                moved[row] = max(moved.get(row, 0.0), (want - base).abs().max().item())
                record.right({row: (torch.tensor(answer) - want).abs().max().item()})
    assert min(move for row, move in moved.items() if row != "base") > 5 * matrix.BOUND, moved
    assert refused == REFUSED
    for row, code in refused.items():
        record.other("refused", code, row)
    matrix.refuse_two_passes(record, tmp_path / "base", runner="pooling")
    record.close()


# No pooling engine computes a gate of its own.
REFUSED = {"instruction": "unsupported_feature"}


def load(server: Server, kinds: dict[str, Kind], parts: list[Path]) -> dict[str, str]:
    """Adapters of requests, and those that mixes name; row → the code with which it is refused."""
    requests = {row: kind.request for row, kind in kinds.items() if kind.request is not None}
    tag = requests["plain"].lora_name.removesuffix("-one")
    named = {row: (one.lora_name, one.lora_path) for row, one in requests.items()}
    named |= {part.name: (f"{tag}-{part.name}", str(part)) for part in parts[1:]}
    codes = {}
    for row, (name, path) in named.items():
        body = {"lora_name": name, "lora_path": path}
        answer = httpx.post(
            f"{server.url}/v1/load_lora_adapter", json=body, timeout=120, trust_env=False
        )
        if answer.status_code != 200:
            assert answer.status_code == 400, answer.text
            codes[row] = answer.json()["error"]["type"]
    return codes


def answered(server: Server, task: Task, kind: Kind, ids: list[int]) -> Any:
    """What is asked for, or the code with which what the request says is refused."""
    body = {"model": kind.request.lora_name if kind.request else "base"} | task.body(words(ids))
    body |= {"lora_ext": kind.says} if kind.says else {}
    answer = httpx.post(f"{server.url}/{task.route}", json=body, timeout=120, trust_env=False)
    if answer.status_code == 400 and kind.says:
        return answer.json()["error"]["type"]
    assert answer.status_code == 200, answer.text
    return task.found(answer.json())
