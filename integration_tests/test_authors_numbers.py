"""A running engine against the numbers that the systems' own code gives."""

from __future__ import annotations

import pytest

from integration_tests.engines import greedy as sampling
from integration_tests.engines import lora, prompt_logprobs, recorded, run, tokens, worst

BOUND = 2e-3


@pytest.fixture
def engine(request):
    return request.getfixturevalue(request.param)


# (engine, system, the one beside it in the batch)
CASES = [
    ("llama", "plain-a", "loramoe-a"),
    ("llama", "loramoe-a", "plain-a"),
    ("llama", "smora-a", "mixlora-a"),
    ("llama", "flylora-a", "smora-a"),
    ("llama", "moram-a", "flylora-a"),
    ("llama", "mola-a", "hydralora-a"),
    ("llama", "hydralora-a", "mola-a"),
    ("llama", "loramoe_moepeft-a", "mola_moepeft-a"),
    ("llama", "mola_moepeft-a", "loramoe_moepeft-a"),
    ("llama", "moelora-a", "moelora-perlayer"),
    ("llama", "moelora-perlayer", "moelora-a"),
    ("llama", "mixlora-a", "mixlora_moepeft-a"),
    ("llama", "mixlora_moepeft-a", "mixlora-a"),
    ("llama_eager", "loramoe-a", "plain-a"),
    ("llama_eager", "mixlora-a", "hydralora-a"),
    ("qwen2", "meteora-a", "meteora-a"),
]


@pytest.mark.parametrize(("engine", "name", "other"), CASES, indirect=["engine"])
def test_every_log_probability_and_greedy_token(engine, name, other):
    """In one batch with a second adapter and base rows; twice, the second from the prefix cache."""
    fx, second = recorded(name), recorded(other)
    mine, theirs = lora(name, fx.folder), lora(f"{other}-too", second.folder)
    requests, wanted = [], []
    for i, prompt in enumerate(fx.prompts):
        requests += [(prompt, mine), (prompt, None), (second.prompts[i], theirs)]
        wanted += [fx.logits[i], fx.base_logits[i], second.logits[i]]
    got = prompt_logprobs(engine, requests, fx.logits[0].shape[1])
    diffs = [worst(g, w) for g, w in zip(got, wanted, strict=True)]
    print(f"{name}: max |dlogp| {max(diffs[0::3]):.1e}, base rows {max(diffs[1::3]):.1e}, "
          f"{other}: {max(diffs[2::3]):.1e}")  # fmt: skip
    assert max(diffs) < BOUND
    for _ in range(2):
        outputs = run(engine, [(p, mine) for p in fx.prompts], sampling())
        assert [tokens(o) for o in outputs] == fx.greedy
    assert any(o.num_cached_tokens for o in outputs)


def test_five_systems_and_base_rows_in_one_batch(llama_eager):
    names = ("smora-a", "mixlora-a", "moram-a", "mola-a", "plain-a")
    requests, logits, chosen = [], [], []
    for name in names:
        fx = recorded(name)
        requests.append((fx.prompts[1], lora(name, fx.folder)))
        logits.append(fx.logits[1])
        chosen.append(fx.greedy[1])
    requests.append((fx.prompts[2], None))
    logits.append(fx.base_logits[2])
    got = prompt_logprobs(llama_eager, requests, logits[0].shape[1])
    diffs = [worst(g, w) for g, w in zip(got, logits, strict=True)]
    print(f"in one batch: max |dlogp| {max(diffs):.1e}")
    assert max(diffs) < BOUND
    outputs = run(llama_eager, requests, sampling())
    assert [tokens(o) for o in outputs[:-1]] == chosen
