"""GateSpec refuses what makes no sense, and names the field."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_adapters import random_spec

from vllm_lora_ext.routing import GateSpec, GateSpecError

GATE = {"source": "router", "blocks": (2, 2, 2)}
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("source", {"source": "oracle"}),
        ("source", {"k": 2}),
        ("source", {"blocks": (2, 2)}),
        ("blocks", {"source": "router"}),
        ("blocks", {"source": "router", "blocks": 3}),
        ("blocks", {"source": "router", "blocks": None}),
        ("blocks", {"source": "router", "blocks": "ab"}),
        ("blocks", {"source": "router", "blocks": (2, 0)}),
        ("blocks", {"source": "router", "blocks": (True,)}),
        ("blocks", {"source": "self", "blocks": (2, 2)}),
        ("score", GATE | {"score": ["softmax"]}),
        ("k", GATE | {"select": "top_k"}),
        ("k", GATE | {"select": "top_k", "k": 4}),
        ("k", GATE | {"select": "top_k", "k": 2.0}),
        ("k", GATE | {"select": "top_k", "k": True}),
        ("k", GATE | {"k": 2}),
        ("k", GATE | {"k": None}),
        ("top_p", GATE | {"select": "top_p", "top_p": 0.0}),
        ("top_p", GATE | {"select": "top_p", "top_p": 1.5}),
        ("temperature", GATE | {"temperature": 0}),
        ("temperature", GATE | {"temperature": NAN}),
        ("temperature", GATE | {"temperature": None}),
        ("temperature", GATE | {"temperature": "1"}),
        ("score_temperature", GATE | {"score_temperature": -1.0}),
        ("constant", GATE | {"constant": INF}),
        ("constant", GATE | {"constant": 10**400}),
        ("threshold", GATE | {"threshold": True}),
        ("mask_below", GATE | {"mask_below": NAN}),
        ("top_p", GATE | {"top_p": 0.5}),
        ("threshold", GATE | {"threshold": 0.5}),
        ("temperature", GATE | {"temperature": 2.0}),
        ("score_temperature", GATE | {"score_temperature": 2.0}),
        ("key", GATE | {"key": "abs"}),
        ("threshold_head", GATE | {"select": "threshold", "threshold_head": 1}),
        ("select", GATE | {"threshold_head": True}),
        ("select", GATE | {"subtract_threshold": True}),
        ("normalise", GATE | {"normalise": "rms"}),
        ("normalise", GATE | {"source": "request", "normalise": "layer"}),
        ("normalise_eps", GATE | {"normalise": "layer", "normalise_eps": 0}),
        ("normalise_eps", GATE | {"normalise_eps": 1e-6}),
        ("product", GATE | {"product": 1}),
        ("blocks", GATE | {"blocks": (2, 1), "product": True}),
        ("blocks", {"source": "attention"}),
        ("blocks", {"source": "attention", "blocks": (2, 1)}),
        ("constant", {"source": "attention", "blocks": (2, 2), "constant": 2.0}),
    ],
)
def test_refuses(field, fields):
    with pytest.raises(GateSpecError, match=field) as caught:
        GateSpec(**fields)
    assert caught.value.field == field


def test_unknown_field():
    with pytest.raises(GateSpecError, match="top_k"):
        GateSpec.from_dict(GATE | {"top_k": 2})


@given(st.integers(0, 2**32 - 1))
def test_dict_round_trip(seed):
    sources = ("none", "router", "self", "prototype", "request", "position", "classifier")
    spec = random_spec(np.random.default_rng(seed), sources=sources, stable=False, wide=True)
    fields = json.loads(json.dumps(spec.to_dict()))
    assert GateSpec.from_dict(fields) == spec


def test_router_rows():
    assert GateSpec().router_rows == 0
    assert GateSpec(source="self", blocks=(1,) * 8).router_rows == 0
    assert GateSpec(**GATE).router_rows == 3
    head = {"select": "threshold", "threshold": 0.3, "threshold_head": True}
    with_head = GateSpec(**GATE, **head)
    assert (with_head.router_rows, with_head.head_rows) == (3, 1)
    assert GateSpec(**GATE).head_rows == 0
    given = GateSpec(**GATE | {"source": "position"})
    assert (given.router_rows, given.columns, GateSpec(**GATE).columns) == (0, 3, 0)
