"""What torch.compile relies on: schemas, declared mutation and fake implementations of the ops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.library import opcheck

from tests.make_adapters import random_module, router_spec
from vllm_lora_ext.kernels.gated_lora import (
    EmbeddingSite,
    Site,
    StepMap,
    embedding_lora_,
    gated_lora_,
    register_site,
)
from vllm_lora_ext.kernels.mix_mlp import BlockSite, mix_act_, register_block

ROWS = (0, -1, 1, 0, 1)


@pytest.fixture
def site():
    rng = np.random.default_rng(0)
    site = Site(2, 16, (12,), 8, 8, torch.float32, "cpu")
    for slot in range(2):
        site.write(slot, [random_module(rng, 16, 12, router_spec())])
    site.step = StepMap(8)
    site.step.update(np.array(ROWS))
    return site


@pytest.fixture
def number(site):
    return register_site(site)


def test_gated_lora(site, number):
    opcheck(gated_lora_, (torch.randn(5, 12), torch.randn(5, 16), number))


def test_embedding_lora(site):
    embedding = EmbeddingSite(torch.randn(2, 11, 6), torch.randn(2, 5, 6), site.step, used={1})
    ids = torch.tensor([3, 4, 10, 2, 3])
    opcheck(embedding_lora_, (torch.randn(5, 5), ids, register_site(embedding)))


def test_mix_act():
    sites = (Site(2, 16, (12, 12), 8, 8, torch.float32, "cpu"),
             Site(2, 12, (16,), 8, 8, torch.float32, "cpu"))  # fmt: skip
    block = BlockSite(*sites, lambda x: x[:, :12] * x[:, 12:])
    opcheck(mix_act_, (torch.randn(5, 12), torch.randn(5, 24), register_block(block)))
