"""Pooling models with plain, routed, rank-wise and merged adapters: the numbers of transformers.

Embeddings of a bare model (AutoModel's names), their similarity, scores of a cross-encoder, labels
of tokens, and rewards of tokens. Heads of adapters are in `test_classification`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    LlamaForSequenceClassification,
    LlamaModel,
    Qwen2Config,
    Qwen2ForTokenClassification,
    Qwen2Model,
)

from integration_tests.engines import close, lora, make_engine
from integration_tests.server import add_tokenizer, words
from tests.make_adapters import random_adapter, router_spec
from vllm_lora_ext.adapters import RoutedAdapter, load_adapter
from vllm_lora_ext.adapters.hf import apply_adapter
from vllm_lora_ext.adapters.readers.native import write_native
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging import Term, load_factors, merge, save_peft
from vllm_lora_ext.routing import GateSpec

pytestmark = pytest.mark.engine
BOUND, LABELS = 1e-4, 3
CONFIG: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": False,
    "pad_token_id": 0, "max_position_embeddings": 256,
}  # fmt: skip
RANK_WISE = GateSpec(
    source="router", blocks=(1,) * 8, score="sigmoid", select="top_k", k=3, weight="score"
)
MIX = {"one": 0.6, "two": -0.5}
# The last one is prefilled in two chunks.
PROMPTS = ([5, 17, 33, 101, 7], [9], [12, 13, 280] * 9, [int(7 * i % 290) + 4 for i in range(90)])


class RewardOfTokens(nn.Module):
    """Qwen2ForRewardModel, which transformers does not have: two linears over every token."""

    config_class = Qwen2Config

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.model = config, Qwen2Model(config)
        width = config.hidden_size
        self.score = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, input_ids: torch.Tensor) -> Any:
        return self.score(self.model(input_ids).last_hidden_state)

    def save_pretrained(self, folder: Path) -> None:
        self.model.save_pretrained(folder, state_dict=self.state_dict())
        config = copy.deepcopy(self.config)
        config.architectures = ["Qwen2ForRewardModel"]
        config.save_pretrained(folder)


@dataclass
class Case:
    """An adapter, and what the model answers with it."""

    name: str
    folder: Path
    answer: Callable[[list[int]], torch.Tensor]


def with_adapters(model: nn.Module, *added: RoutedAdapter) -> Callable[[list[int]], Any]:
    def run(prompt: list[int]) -> Any:
        with ExitStack() as stack, torch.inference_mode():
            for adapter in added:
                stack.enter_context(apply_adapter(model, adapter))
            return model(input_ids=torch.tensor([prompt]))

    return run


def scaled(adapter: RoutedAdapter, by: float) -> RoutedAdapter:
    modules = {n: replace(m, b_NR=by * m.b_NR) for n, m in adapter.modules.items()}
    return replace(adapter, modules=modules)


def named(adapter: RoutedAdapter, prefix: str) -> RoutedAdapter:
    """With the names that the layers have in this model: without `model.` in a bare one."""
    modules = {prefix + n.removeprefix("model."): m for n, m in adapter.modules.items()}
    return replace(adapter, modules=modules)


def make_cases(
    model: nn.Module, root: Path, prefix: str, read: Callable[[Any], torch.Tensor]
) -> list[Case]:
    """One adapter of each kind; `read` is what is asked of a model's output."""
    found, runs = [], {}
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        targets = ["q_proj", "v_proj", "o_proj"] + ["down_proj"] * seed
        config = LoraConfig(r=4 + seed, lora_alpha=9, target_modules=targets,
                            init_lora_weights=False)  # fmt: skip
        wrapped = get_peft_model(copy.deepcopy(model), config).eval()
        wrapped.save_pretrained(root / name)

        def run(prompt: list[int], wrapped: Any = wrapped) -> Any:
            with torch.inference_mode():
                return wrapped(input_ids=torch.tensor([prompt]))

        runs[name] = run
    for seed, (name, spec) in enumerate({"routed": router_spec(), "rank-wise": RANK_WISE}.items()):
        adapter = named(random_adapter(model.config, seed, spec), prefix)
        write_native(adapter, root / name)
        runs[name] = with_adapters(model, adapter)
    terms = [Term(load_factors(root / name), weight, name) for name, weight in MIX.items()]
    save_peft(merge("cat", terms).factors, root / "merged")
    parts = [scaled(load_adapter(root / name), weight) for name, weight in MIX.items()]
    runs["merged"] = with_adapters(model, *parts)
    for name, run in runs.items():
        found.append(Case(name, root / name, lambda prompt, run=run: read(run(prompt))))
    return found


def base_case(model: nn.Module, read: Callable[[Any], torch.Tensor]) -> Case:
    run = with_adapters(model)
    return Case("base", Path(), lambda prompt: read(run(prompt)))


def compare(kind: str, cases: list[Case], ask: Callable[[list[Any]], list[torch.Tensor]]) -> None:
    """All adapters, the base and all prompts in one call, twice: the second time from the cache."""
    jobs = [(case, prompt) for prompt in PROMPTS for case in cases]
    wanted = [case.answer(prompt) for case, prompt in jobs]
    base = {id(p): w for (case, p), w in zip(jobs, wanted, strict=True) if case.name == "base"}
    requests = [
        (prompt, None if case.name == "base" else lora(f"{kind}-{case.name}", case.folder))
        for case, prompt in jobs
    ]
    for _ in range(2):
        worst: dict[str, float] = {}
        for (case, prompt), got, want in zip(jobs, ask(requests), wanted, strict=True):
            assert got.shape == want.shape, case.name
            worst[case.name] = max(worst.get(case.name, 0), float((got - want).abs().max()))
            if case.name != "base" and len(prompt) > 1:
                assert (want - base[id(prompt)]).abs().max() > 30 * BOUND, case.name
        print(kind, {name: f"{diff:.0e}" for name, diff in worst.items()})
        assert max(worst.values()) < BOUND


def asking(llm: Any, task: str, **params: Any) -> Callable[[list[Any]], list[torch.Tensor]]:
    from vllm import PoolingParams

    def ask(requests: list[Any]) -> list[torch.Tensor]:
        outputs = llm.encode(
            [{"prompt_token_ids": prompt} for prompt, _ in requests], PoolingParams(**params),
            lora_request=[adapter for _, adapter in requests], pooling_task=task, use_tqdm=False,
        )  # fmt: skip
        return [o.outputs.data.float() for o in outputs]

    return ask


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """An engine on a model that is saved first."""
    with ExitStack() as stack:

        def begin(model: Any, **options: Any) -> Any:
            torch.manual_seed(5)
            model.save_pretrained(tmp_path / "base")
            add_tokenizer(tmp_path / "base", CONFIG["vocab_size"])
            llm = make_engine(
                tmp_path / "base", runner="pooling", enforce_eager=True, max_loras=6,
                max_lora_rank=16, skip_tokenizer_init=False, **options,
            )  # fmt: skip
            stack.callback(close, llm)
            return llm

        yield begin


def made(kind: Any, **config: Any) -> Any:
    torch.manual_seed(0)
    model = kind(kind.config_class(**CONFIG, **config)).float().eval()
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(0.03 * torch.randn_like(weights))
    return model


def test_embeddings_of_a_bare_model_and_their_similarity(start: Any, tmp_path: Path) -> None:
    def read(output: Any) -> torch.Tensor:
        return nn.functional.normalize(output.last_hidden_state[0, -1], dim=-1)

    model = made(LlamaModel)
    cases = [*make_cases(model, tmp_path, "", read), base_case(model, read)]
    llm = start(model)
    compare("embed", cases, asking(llm, "embed"))
    one, two = PROMPTS[0], PROMPTS[2]
    for case in cases[:-1]:
        adapter = lora(f"embed-{case.name}", case.folder)
        (score,) = llm.score(words(one), words(two), lora_request=adapter, use_tqdm=False)
        want = float(case.answer(one) @ case.answer(two))
        assert abs(score.outputs.score - want) < BOUND, case.name
        assert score.adapter_version == llm.llm_engine.adapter_version(adapter) != ""
        (embedded,) = llm.embed(words(one), lora_request=adapter, use_tqdm=False)
        assert embedded.adapter_version == score.adapter_version
    (bare,) = llm.score(words(one), words(two), use_tqdm=False)
    assert bare.adapter_version is None


def test_scores_of_a_cross_encoder(start: Any, tmp_path: Path) -> None:
    def read(output: Any) -> torch.Tensor:
        return output.logits[0].sigmoid()

    model = made(LlamaForSequenceClassification, num_labels=1)
    cases = [*make_cases(model, tmp_path, "model.", read), base_case(model, read)]
    llm = start(model)
    compare("score", cases, asking(llm, "classify"))
    one, two = PROMPTS[0], PROMPTS[2]
    for case in cases[:-1]:
        adapter = lora(f"score-{case.name}", case.folder)
        (score,) = llm.score(words(one), words(two), lora_request=adapter, use_tqdm=False)
        assert abs(score.outputs.score - float(case.answer(one + two))) < BOUND, case.name
        (label,) = llm.classify(words(one), lora_request=adapter, use_tqdm=False)
        version = llm.llm_engine.adapter_version(adapter)
        assert label.adapter_version == score.adapter_version == version != ""


def test_labels_of_tokens(start: Any, tmp_path: Path) -> None:
    def read(output: Any) -> torch.Tensor:
        return output.logits[0].softmax(-1)

    model = made(Qwen2ForTokenClassification, num_labels=LABELS)
    cases = [*make_cases(model, tmp_path, "model.", read), base_case(model, read)]
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="TOKEN_CLS")
    get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path / "head")
    llm = start(model)
    compare("tokens", cases, asking(llm, "token_classify"))
    with pytest.raises(AdapterError) as caught:  # a head for every token is not vLLM's
        llm.llm_engine.add_lora(lora("tokens-head", tmp_path / "head"))
    assert caught.value.code == "unsupported_feature"


def test_rewards_of_tokens(start: Any, tmp_path: Path) -> None:
    def read(output: Any) -> torch.Tensor:
        return output[0]

    model = made(RewardOfTokens)
    cases = [*make_cases(model, tmp_path, "model.", read), base_case(model, read)]
    llm = start(model)
    compare("reward", cases, asking(llm, "token_classify", use_activation=False))
