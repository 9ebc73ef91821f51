"""Columns against their definition, position by position."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_lora_ext.conditions import Column, Prompt, start_of, values
from vllm_lora_ext.errors import AdapterError

LENGTH = 24
positions = st.integers(0, LENGTH + 8)
spans = st.tuples(positions, st.none() | positions).map(
    lambda s: s if s[1] is None else (min(s), max(s))
)
columns = st.builds(
    Column,
    scale=st.floats(-4, 4, width=32),
    spans=st.none() | st.lists(spans, max_size=3).map(tuple),
    modalities=st.lists(st.sampled_from(["image", "audio", "text"]), max_size=2).map(tuple),
    invocation=st.lists(st.integers(0, 2), max_size=3).map(tuple),
)
closed = st.lists(st.tuples(positions, positions).map(lambda s: (min(s), max(s))), max_size=2).map(
    tuple
)
prompts = st.builds(
    Prompt,
    length=st.just(LENGTH),
    ids=st.none() | st.lists(st.integers(0, 2), min_size=LENGTH, max_size=LENGTH),
    modality=st.fixed_dictionaries({}, optional={"image": closed, "audio": closed}),
)


def slow_start(invocation: tuple[int, ...], ids: list[int] | None) -> int | None:
    if ids is None:
        return None
    n, found = len(invocation), None
    for at in range(len(ids) - n + 1):
        if tuple(ids[at : at + n]) == invocation:
            found = at
    return found


def slow_value(column: Column, prompt: Prompt, t: int) -> float:
    def inside(some: object) -> bool:
        return any(a <= t and (b is None or t < b) for a, b in some)  # type: ignore[attr-defined]

    if column.spans is not None and not inside(column.spans):
        return 0.0
    for modality in column.modalities:
        kinds = {name for name, some in prompt.modality.items() if inside(some)}
        if (modality == "text" and kinds) or (modality != "text" and modality not in kinds):
            return 0.0
    if column.invocation:
        start = slow_start(column.invocation, prompt.ids)  # type: ignore[arg-type]
        if start is None or t < start:
            return 0.0
    return column.scale


@given(st.lists(columns, max_size=4), prompts, positions, st.integers(0, 12))
def test_values_are_the_definitions(
    some: list[Column], prompt: Prompt, start: int, count: int
) -> None:
    got = values(some, prompt, start, start + count)
    assert got.dtype == np.float32 and got.shape == (count, len(some))
    want = [[slow_value(c, prompt, t) for c in some] for t in range(start, start + count)]
    np.testing.assert_array_equal(got, np.array(want, np.float32).reshape(count, len(some)))


@given(columns)
def test_a_column_survives_json(column: Column) -> None:
    assert Column.from_dict(column.to_dict()) == column


def test_the_start_is_that_of_the_last_occurrence() -> None:
    assert start_of([7, 8], [7, 8, 1, 7, 8, 7]) == 3
    assert start_of([7, 7], [1, 7, 7, 7]) == 2  # they overlap
    assert start_of([7, 8], [7, 8]) == 0
    assert start_of([7, 8], [8, 7]) is None
    assert start_of([7, 8], [7]) is None
    assert start_of([7, 8], None) is None


@pytest.mark.parametrize("fields", [
    {"scale": float("nan")}, {"scale": True}, {"scale": "1"}, {"scale": 1e39}, {"scale": None},
    {"spans": 3}, {"spans": [3]}, {"spans": [[1]]}, {"spans": [[-1, 2]]}, {"spans": [[3, 2]]},
    {"spans": [[0, 1.5]]}, {"spans": [[True, 2]]}, {"modalities": "image"}, {"modalities": [""]},
    {"invocation": [1.0]}, {"invocation": "ab"}, {"expert": 3}, {"other": 1}, [], None,
])  # fmt: skip
def test_what_is_no_column_is_refused(fields: object) -> None:
    with pytest.raises(AdapterError) as caught:
        Column.from_dict(fields)
    assert caught.value.code == ("unknown_key" if fields == {"other": 1} else "bad_value")
