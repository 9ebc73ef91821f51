"""Adapters on the output matrix: log-probabilities of prompt and answer, in one batch with others,
against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from integration_tests import reference_model
from integration_tests.engines import greedy, lora, prompt_logprobs, recorded, run, tokens, worst
from vllm_lora_ext.adapters.model import RoutedAdapter, RoutedModule
from vllm_lora_ext.adapters.readers.native import write_native
from vllm_lora_ext.adapters.registry import load_adapter
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.routing import GateSpec

pytestmark = pytest.mark.engine
BASE, VOCABULARY, BOUND = "base_llama", 512, 2e-4


def with_head(seed: int, rank: int, gate: GateSpec | None = None) -> RoutedAdapter:
    """A plain adapter of its own, and one more module, the output matrix."""
    draw = torch.Generator().manual_seed(seed)
    plain = load_adapter(recorded("plain-a").folder)
    width = reference_model.model(BASE).config.hidden_size
    a_RK = torch.randn(rank, width, generator=draw) / width**0.5
    b_NR = torch.randn(VOCABULARY, rank, generator=draw)
    head = RoutedModule(a_RK, b_NR)
    if gate is not None:
        router_GK = torch.randn(gate.num_gates, width, generator=draw)
        head = RoutedModule(a_RK, b_NR, gate, router_GK=router_GK)
    return RoutedAdapter({**plain.modules, "lm_head": head}, plain.system)


def test_rows_of_several_adapters_and_of_the_base(llama, tmp_path: Path) -> None:
    """Prompts of one chunk and of several, so that prompt rows and sampled rows do not agree."""
    plain = load_adapter(recorded("plain-a").folder)
    adapters = [with_head(1, 8), with_head(2, 3), plain, None]
    requests, wanted = [], []
    for i, length in enumerate([7, 90, 40, 1, 12, 30, 3, 70]):
        adapter = adapters[i % 4]
        folder = tmp_path / f"head{i % 4}"
        name = None
        if adapter is not None:
            name = lora(folder.name, folder if folder.exists() else write_native(adapter, folder))
        prompt = torch.randint(4, 380, (length,), generator=torch.Generator().manual_seed(i))
        requests.append((prompt.tolist(), name))
        wanted.append(reference_model.logits(BASE, adapter, prompt.tolist()))
    got = prompt_logprobs(llama, requests, VOCABULARY)
    differences = [worst(g, w) for g, w in zip(got, wanted, strict=True)]
    assert max(differences) < BOUND
    shift = wanted[1] - reference_model.logits(BASE, plain, requests[1][0])
    assert shift.abs().max() > 0.5  # the output matrix's part is one that can be seen
    for output, (prompt, _), adapter in zip(
        run(llama, requests, greedy(4)), requests, adapters * 2, strict=True
    ):
        ids = list(prompt)
        for token in tokens(output):
            logits_V = reference_model.logits(BASE, adapter, ids)[-1]
            assert logits_V[token] > logits_V.max() - 1e-3
            ids.append(token)
    print(f"max |log-probability difference| {max(differences):.1e}")


@pytest.mark.parametrize("method", ["generate", "add_lora"])
def test_gates_on_the_output_matrix_are_refused(llama, tmp_path: Path, method: str) -> None:
    gate = GateSpec(source="router", blocks=(2, 2), score="softmax", select="top_k", k=1)
    request = lora(f"gated_{method}", write_native(with_head(3, 4, gate), tmp_path / "gated"))
    with pytest.raises(AdapterError, match="lm_head") as caught:
        if method == "generate":
            run(llama, [([5, 6, 7], request)], greedy(2))
        else:
            llama.llm_engine.add_lora(request)
    assert caught.value.code == "unsupported_feature"
    assert len(tokens(run(llama, [([5, 6, 7], None)], greedy(2))[0])) == 2
