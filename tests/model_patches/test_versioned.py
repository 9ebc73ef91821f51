"""Outputs that vLLM makes of other outputs keep the version of their adapter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
from vllm.entrypoints.pooling.offline import PoolingOfflineMixin
from vllm.outputs import (
    ClassificationRequestOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    ScoringRequestOutput,
)
from vllm.v1.engine.output_processor import RequestState

from vllm_lora_ext.model_patches import versioned


@pytest.fixture
def patched(monkeypatch):
    """What is wrapped is as it was afterwards."""
    for cls, name in (
        (RequestState, "from_new_request"), (RequestState, "_new_request_output"),
        (ClassificationRequestOutput, "from_base"), (EmbeddingRequestOutput, "from_base"),
        (ScoringRequestOutput, "from_base"),
    ):  # fmt: skip
        monkeypatch.setattr(cls, name, cls.__dict__[name])
    monkeypatch.setattr(RequestState, "_new_request_output", lambda self: SimpleNamespace())
    monkeypatch.setattr(BeamSearchOfflineMixin, "beam_search", several)
    monkeypatch.setattr(PoolingOfflineMixin, "score", several)
    versioned.apply()


def pooled(data, version, name="r"):
    output = PoolingRequestOutput(
        request_id=name, outputs=PoolingOutput(data), prompt_token_ids=[1], num_cached_tokens=0,
        finished=True,
    )  # fmt: skip
    output.adapter_version = version
    return output


@pytest.mark.parametrize(
    ("made", "data"),
    [
        (EmbeddingRequestOutput, torch.ones(3)),
        (ClassificationRequestOutput, torch.ones(2)),
        (ScoringRequestOutput, torch.tensor(0.5)),
    ],
)
@pytest.mark.parametrize("version", ["v1", None])
def test_embeddings_classes_and_scores(patched, made, data, version):
    assert made.from_base(pooled(data, version)).adapter_version == version


def several(self, texts, made_of, lora_request=None):
    """In the place of vLLM's: outputs of several requests become one for each text."""
    for name, version in made_of:
        request = SimpleNamespace(lora_name=name, _lora_ext_version=version)
        RequestState._new_request_output(request)
    return [SimpleNamespace() for _ in texts]


@pytest.mark.parametrize("cls", [BeamSearchOfflineMixin, PoolingOfflineMixin])
def test_what_is_made_of_several_outputs(patched, cls):
    method = cls.beam_search if cls is BeamSearchOfflineMixin else cls.score
    a, b = (SimpleNamespace(lora_name=name) for name in "ab")

    def versions(made_of, lora_request):
        made = method(None, ["one", "two"], made_of, lora_request=lora_request)
        return [output.adapter_version for output in made]

    assert versions([(None, None)], None) == [None, None]
    assert versions([("a", "v1"), ("a", "v1")], a) == ["v1", "v1"]
    assert versions([("a", "v1"), ("a", "v2")], a) == [None, None], "it was replaced midway"
    assert versions([("a", "v1"), ("b", "v5")], [a, b]) == ["v1", "v5"]
    assert versions([("a", "v1"), (None, None)], [a, None]) == ["v1", None]
