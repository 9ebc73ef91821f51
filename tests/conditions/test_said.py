"""The field `lora_ext` of a request: what it may be, and that an error says what is wrong."""

from __future__ import annotations

import json
import time

import pytest

from vllm_lora_ext.conditions.said import Entry, Ids, Said, parse
from vllm_lora_ext.errors import AdapterError

WHOLE = {
    "adapters": [
        {"name": "a", "scale": -0.5, "spans": [[0, 3], [7, None]]},
        {"name": "b", "modality": "image", "spans": []},
        {"name": "a", "scale": 2},
    ],
    "user": [1, 0.5],
    "gates": {"math": 0.25, "1": 2},
    "modality_spans": {"image": [[2, 5], [5, 5]]},
    "instruction": {"ids": [4, 5]},
    "trace": True,
}


def refused(value: object) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        parse(value, 3, 6)
    assert caught.value.code == "bad_value"
    return caught.value


def test_the_whole_field():
    said = parse(WHOLE, 3, 6)
    assert said.adapters == (
        Entry(name="a", scale=-0.5, spans=((0, 3), (7, None))),
        Entry(name="b", modality="image", spans=()),
        Entry(name="a", scale=2.0),
    )
    assert [entry.by_token for entry in said.adapters] == [True, True, False]
    assert said.user == (1.0, 0.5)
    assert said.gates == {"math": 0.25, "1": 2.0}
    assert said.modality_spans == {"image": ((2, 5), (5, 5))}
    assert said.instruction == Ids(ids=(4, 5))
    assert said.trace


def test_json_text_is_the_same():
    assert parse(json.dumps(WHOLE), 3, 6) == parse(WHOLE, 3, 6)


def test_what_was_parsed_stays():
    said = parse(WHOLE, 3, 6)
    assert parse(said, 1, 1) is said


def test_nothing_need_be_said():
    assert parse({}, 3, 6) == Said()


def test_an_instruction_may_be_a_text_and_experts_numbers():
    said = parse({"instruction": "count", "gates": {1: 0.5}}, 3, 6)
    assert said.instruction == "count"
    assert said.gates == {"1": 0.5}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "lora_ext of the request is no object; seen: NoneType"),
        ([], "lora_ext of the request is no object; seen: list"),
        ("{", "lora_ext of the request is no JSON"),
        ("[" * 100_000, "lora_ext of the request is no JSON"),
        ({"adaptors": []}, "lora_ext.adaptors is unknown; seen: adaptors; allowed: adapters,"),
        ({"adapters": {}}, "lora_ext.adapters is wrong; seen: {}; allowed: a valid list"),
        ({"adapters": [{}]}, "lora_ext.adapters[0].name is missing; fix: add it."),
        ({"adapters": ["a"]}, 'lora_ext.adapters[0] is wrong; seen: "a"; allowed: a valid object;'),
        ({"adapters": [{"name": ""}]}, "lora_ext.adapters[0].name is wrong"),
        ({"adapters": [{"name": "a", "weight": 1}]}, "lora_ext.adapters[0].weight is unknown"),
        ({"adapters": [{"name": "a", "scale": True}]}, "adapters[0].scale is wrong; seen: true"),
        ({"adapters": [{"name": "a", "scale": "1"}]}, '[0].scale is wrong; seen: "1"; allow'),
        ({"adapters": [{"name": "a", "scale": None}]}, "adapters[0].scale is wrong; seen: null"),
        ('{"adapters": [{"name": "a", "scale": NaN}]}', "adapters[0].scale is wrong; seen: NaN"),
        ('{"adapters": [{"name": "a", "scale": 1e39}]}', "adapters[0].scale is wrong"),
        ({"adapters": [{"name": "a", "scale": -10001}]}, "scale is wrong; seen: -10001"),
        ({"adapters": [{"name": "a", "spans": [[-1, 2]]}]}, "adapters[0].spans[0][0] is wrong"),
        ({"adapters": [{"name": "a", "spans": [[0, 1], [3, 2]]}]}, "adapters[0].spans[1] is wrong"),
        ({"adapters": [{"name": "a", "spans": [[1.5, 2]]}]}, "adapters[0].spans[0][0] is wrong"),
        ({"adapters": [{"name": "a", "spans": [[True, 2]]}]}, "adapters[0].spans[0][0] is wrong"),
        ({"adapters": [{"name": "a", "spans": [[1]]}]}, "adapters[0].spans[0][1] is missing"),
        ({"adapters": [{"name": "a", "spans": [[1, 2, 3]]}]}, "adapters[0].spans[0] is wrong"),
        ({"adapters": [{"name": "a", "modality": 1}]}, "adapters[0].modality is wrong"),
        ({"adapters": [{"name": "a"}] * 4}, "too many entries; seen: 4; allowed: max_request"),
        ({"adapters": [{"name": "a", "spans": [[0, 1]] * 7}]}, "too many spans; seen: 7"),
        ({"modality_spans": {"image": [[0, 1]] * 7}}, "too many spans; seen: 7"),
        ({"user": "u1"}, "lora_ext.user is wrong"),
        ({"user": [1, "2"]}, 'lora_ext.user[1] is wrong; seen: "2"'),
        ({"user": [float("inf")]}, "lora_ext.user[0] is wrong"),
        ({"gates": [1]}, "lora_ext.gates is wrong"),
        ({"gates": {"math": True}}, "lora_ext.gates.math is wrong"),
        ({"modality_spans": {"text": [[0, 1]]}}, "lora_ext.modality_spans.text is wrong"),
        ({"modality_spans": {"image": [[0, None]]}}, "spans.image[0][1] is wrong; seen: null"),
        ({"instruction": 3}, "lora_ext.instruction is wrong"),
        ({"instruction": ""}, "lora_ext.instruction is wrong"),
        ({"instruction": {"ids": []}}, "lora_ext.instruction.ids is wrong"),
        ({"instruction": {"ids": [1, -1]}}, "lora_ext.instruction.ids[1] is wrong; seen: -1"),
        ({"trace": "perhaps"}, "lora_ext.trace is wrong; seen: perhaps"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(value, words):
    assert words in refused(value).text


@pytest.mark.parametrize(
    "value",
    [
        {"user": [0.5] * 1_000_000},
        {"user": [["a"]] * 65_000},
        {"user": ["a"] * 65_000},
        {"gates": {str(i): 1 for i in range(500_000)}},
        {str(i): 1 for i in range(500_000)},
        {"instruction": "a" * 10_000_000},
        "[1," * 2_000_000,
    ],
    ids=["numbers", "nested", "texts", "gates", "keys", "text", "json"],
)
def test_what_is_too_large_is_refused_at_once(value):
    start = time.thread_time()
    refused(value)
    assert time.thread_time() - start < 0.5


def test_spans_lie_where_tokens_can_be():
    said = parse({"adapters": [{"name": "a", "spans": [[0, 8], [7, None]]}]}, 3, 6)
    said.check_positions(8)
    with pytest.raises(AdapterError, match=r"adapters\[0\].spans\[0\] is outside"):
        said.check_positions(7)
    with pytest.raises(AdapterError, match=r"adapters\[0\].spans\[1\] is outside"):
        parse({"adapters": [{"name": "a", "spans": [[0, 1], [7, None]]}]}, 3, 6).check_positions(7)
