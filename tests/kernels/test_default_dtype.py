"""Nothing takes torch's default dtype, which vLLM sets to the model's while it builds layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.make_adapters import random_module
from vllm_lora_ext.kernels.gated_lora import (
    EmbeddingSite,
    Factors,
    Site,
    StepMap,
    begin,
    embedding_lora_,
    finish_,
    register_site,
)
from vllm_lora_ext.kernels.gated_lora.backends import choice, eager
from vllm_lora_ext.kernels.gated_lora.selfcheck import cases, expected
from vllm_lora_ext.kernels.mix_mlp import BlockSite, scratch_for
from vllm_lora_ext.kernels.mix_mlp import selfcheck as block_selfcheck
from vllm_lora_ext.routing import GateSpec

K, SIZES, RANK = 24, (16, 8), 8
SPECS = (
    GateSpec(),
    GateSpec(source="router", blocks=(2,) * 4, score="softmax", bias="select", select="top_k", k=2,
             weight="renormalise"),
    GateSpec(source="self", blocks=(1,) * 8, select="top_k", key="abs", k=3, weight="one"),
)  # fmt: skip


@pytest.fixture
def narrow():
    """What vLLM's model loader does around the making of a model."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)


def buffers(owner, depth=3):
    """Tensors by where they are, of our own objects."""
    found = {}
    for name, value in vars(owner).items():
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, (list, tuple)):
            found |= {f"{name}.{i}": t for i, t in enumerate(value) if isinstance(t, torch.Tensor)}
        elif depth and type(value).__module__.startswith("vllm_lora_ext"):
            inner = buffers(value, depth - 1) if hasattr(value, "__dict__") else {}
            found |= {f"{name}.{inside}": t for inside, t in inner.items()}
    return found


def dtypes(backend):
    step = StepMap(40, "cpu", tiled=True)
    site = Site(3, K, SIZES, RANK, 4, torch.float16, "cpu", backend)
    site.step = step
    site.reserve_routers(site.most_routers)
    made = {"site": site, "step": step, "factors": Factors(3, RANK, torch.device("cpu"))}
    if backend.on_device:
        last = Site(3, 16, (K,), RANK, 4, torch.float16, "cpu", backend)
        first = Site(3, K, (16, 16), RANK, 4, torch.float16, "cpu", backend)
        first.step = last.step = step
        block = BlockSite(first, last, torch.relu, act_name="relu")
        made |= {"block": block.tables}
        assert {t.dtype for t in scratch_for([block], 40, torch.float16)} == {torch.float32}
    assert step.rows_TC.dtype == torch.float32
    found = {kind: buffers(owner) for kind, owner in made.items()}
    return {f"{kind} {name}": t.dtype for kind in found for name, t in found[kind].items()}


@pytest.mark.parametrize("backend", [eager, choice.triton(), choice.without_triton("cpu")],
                         ids=["eager", "triton", "cpu"])  # fmt: skip
def test_sites_tables_and_steps_have_the_dtypes_that_they_name(backend, narrow):
    found = dtypes(backend)
    torch.set_default_dtype(torch.float32)
    assert found == dtypes(backend)
    assert torch.bfloat16 not in found.values()
    assert found["site router_SGK"] == torch.float32


def result(backend):
    """y of a step with every kind of gate, in fp32."""
    rng, g = np.random.default_rng(3), torch.Generator().manual_seed(3)
    modules = [[random_module(rng, K, n, spec, rank=RANK) for n in SIZES] for spec in SPECS]
    site = Site(len(SPECS), K, SIZES, RANK, 4, torch.float32, "cpu", backend)
    for slot, slices in enumerate(modules):
        site.write(slot, slices)
    site.step = StepMap(40, "cpu", tiled=backend.on_device)
    site.step.update(np.arange(40) % 4 - 1)
    x_TK = torch.randn(40, K, generator=g, dtype=torch.float32)
    y_TN = torch.zeros(40, sum(SIZES), dtype=torch.float32)
    finish_(y_TN, x_TK, begin(x_TK, site), site)
    return y_TN


@pytest.mark.parametrize("backend", [eager, choice.without_triton("cpu")], ids=["eager", "cpu"])
def test_the_numbers_are_the_same_bits(backend, narrow):
    got = result(backend)
    torch.set_default_dtype(torch.float32)
    assert torch.equal(got, result(backend)) and got.dtype == torch.float32


def test_an_embeddings_numbers_are_the_same_bits(narrow):
    def run():
        g = torch.Generator().manual_seed(4)
        a_SVR = torch.randn(2, 9, RANK, generator=g, dtype=torch.float32)
        b_SNR = torch.randn(2, K, RANK, generator=g, dtype=torch.float32)
        step = StepMap(7)
        step.update(np.array([0, 1, -1, 1, 0, 0, -1]))
        site = EmbeddingSite(a_SVR, b_SNR, step, used={0, 1})
        handle = register_site(site)
        y_TN = torch.zeros(7, K, dtype=torch.float32)
        embedding_lora_(y_TN, torch.arange(7) % 9, handle)
        return y_TN

    got = run()
    torch.set_default_dtype(torch.float32)
    assert torch.equal(got, run())


def test_the_selfchecks_cases_are_the_same_numbers(narrow):
    def numbers():
        made = [t for case in cases(16, 8) for t in (case.x_TK, expected(case, torch.float16))]
        block = block_selfcheck.case(16, 8, torch.float16)
        return [*made, block.x_TK, block_selfcheck.expected(block)]

    got = numbers()
    torch.set_default_dtype(torch.float32)
    for mine, want in zip(got, numbers(), strict=True):
        assert mine.dtype == torch.float32 and torch.equal(mine, want)
