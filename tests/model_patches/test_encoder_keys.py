"""What images are known by in the cache of encoder outputs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from vllm_lora_ext.model_patches.encoder_keys import key_by_version


def request(*names: str) -> Any:
    features = [
        MultiModalFeatureSpec(None, "image", f"red:{name}", PlaceholderRange(0, 4), name)
        for name in names
    ]
    return SimpleNamespace(mm_features=features)


def test_by_version_and_input() -> None:
    one, shared = request("a", "b"), request("a")
    child = SimpleNamespace(mm_features=one.mm_features)  # of a request with n > 1
    assert key_by_version(one, "v1")
    assert [f.identifier for f in one.mm_features] == ["v1:a", "v1:b"]
    assert [f.identifier for f in child.mm_features] == ["red:a", "red:b"]
    assert not key_by_version(one, "v1"), "nothing is left to do"
    assert key_by_version(one, "v2") and key_by_version(shared, "v2")
    assert one.mm_features[0].identifier == shared.mm_features[0].identifier
    assert not key_by_version(request(), "v1")
