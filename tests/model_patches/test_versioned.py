"""Outputs that vLLM makes of other outputs keep the version of their adapter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
from vllm.entrypoints.pooling.scoring.io_processor import (
    BiEncoderIOProcessor,
    LateInteractionIOProcessor,
)
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
        (ScoringRequestOutput, "from_base"), (BiEncoderIOProcessor, "_post_process"),
        (LateInteractionIOProcessor, "_post_process"),
    ):  # fmt: skip
        monkeypatch.setattr(cls, name, cls.__dict__[name])
    monkeypatch.setattr(BeamSearchOfflineMixin, "beam_search", search)
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


@pytest.mark.parametrize(
    ("processor", "data"),
    [(BiEncoderIOProcessor, torch.ones(3)), (LateInteractionIOProcessor, torch.ones(2, 3))],
)
def test_a_score_of_two_is_of_their_version(patched, processor, data):
    itself = SimpleNamespace(pad_token_id=None, _pair_error_output=lambda one, other: None)
    one, same, other = (pooled(data, version) for version in ("v1", "v1", "v2"))
    scores = processor._post_process(itself, [one, same, other], 1)
    assert [score.adapter_version for score in scores] == ["v1", None]
    scores = processor._post_process(itself, [one, other, one, other], 2)
    assert [score.adapter_version for score in scores] == ["v1", "v2"]


def search(self, prompts, params, lora_request=None, use_tqdm=False):
    """In the place of vLLM's: an adapter is loaded, or replaced, meanwhile."""
    self.llm_engine.now |= params
    return [SimpleNamespace() for _ in prompts]


class Searching:
    def __init__(self, **now):
        self.llm_engine = SimpleNamespace(now=now)
        self.llm_engine.adapter_version = lambda request: self.llm_engine.now.get(request, "")


def test_beams_are_of_the_version_that_was_there_all_the_time(patched):
    def versions(llm, meanwhile, requests):
        made = BeamSearchOfflineMixin.beam_search(llm, ["a", "b"], meanwhile, requests)
        return [output.adapter_version for output in made]

    assert versions(Searching(a="v1"), {}, None) == [None, None]
    assert versions(Searching(a="v1"), {}, ["a", None]) == ["v1", None]
    assert versions(Searching(), {"a": "v1", "b": "v5"}, ["a", "b"]) == ["v1", "v5"]
    assert versions(Searching(a="v1", b="v5"), {"a": "v2"}, ["a", "b"]) == [None, "v5"]
