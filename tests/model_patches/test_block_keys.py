"""Keys of blocks in the prefix cache, through vLLM's own hasher: equal where, and only where, the
tokens and all that adapters add to them are equal up to the block's end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import PoolingParams, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from vllm_lora_ext import plugin
from vllm_lora_ext.conditions.column import Column, Prompt, values
from vllm_lora_ext.model_patches.block_keys import BlockKeys, is_plain
from vllm_lora_ext.model_patches.core_adapters import KEY
from vllm_lora_ext.model_patches.plan import Plan, attach, plan_of, prompt_of
from vllm_lora_ext.model_patches.residency import KeyedPart

plugin.register()
init_none_hash(sha256)
BLOCK, MOST = 4, 64
ALORA = Column(invocation=(1, 2))
A, B = KeyedPart("a"), KeyedPart("b")
OWN = KeyedPart("own", columns=(ALORA,))
TWO = KeyedPart("two", columns=(Column(modalities=("image",)), Column(modalities=("text",))))
SOFT = KeyedPart("soft", columns=(Column(expert="x"), Column(expert="y")), linear=False)
USERS = KeyedPart("template of one user"), KeyedPart("template of another")
Spans = dict[str, list[list[int]]]


def request(
    ids: list[int], parts: tuple[KeyedPart, ...] = (), columns: Any = (), answer: Any = (),
    pooling: bool = False, features: Any = None, embeds: torch.Tensor | None = None,
    modality: Spans | None = None,
) -> Request:  # fmt: skip
    """One with its blocks hashed; no parts: the base model."""
    lora = LoRARequest("some", 1, "/some") if parts else None
    said = {"lora_ext": {"modality_spans": modality}} if modality else None
    params = None if pooling else SamplingParams(max_tokens=40, extra_args=said)
    made = Request(
        "r", None if embeds is not None else list(ids), params,
        PoolingParams() if pooling else None, lora_request=lora, mm_features=features,
        prompt_embeds=embeds,
    )  # fmt: skip
    if parts and is_plain(parts):
        setattr(made, KEY, parts[0].version)
    elif parts:
        attach(made, columns)
        setattr(made, KEY, BlockKeys(parts, plan_of(made) or Plan(()), made, MOST))
    made._block_hasher = get_request_block_hasher(BLOCK, sha256)
    made.update_block_hashes()
    for token in answer:
        made.append_output_token_ids(token)
    return made


def shared(a: Request, b: Request) -> int:
    """How many blocks the second finds of the first."""
    pairs = zip(a.block_hashes, b.block_hashes, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(
        len(a.block_hashes), len(b.block_hashes)
    ))  # fmt: skip


TEXT = list(range(10, 26))


def factor(*spans: tuple[int, int | None], scale: float = 1.0) -> Column:
    return Column(scale=scale, spans=spans or None)


def rows(part: KeyedPart) -> KeyedPart:
    return replace(part, by_row=True)


@pytest.mark.parametrize("pooling", [False, True])
def test_before_an_activated_lora_starts_there_is_the_base(pooling: bool) -> None:
    ids = [*TEXT[:9], 1, 2, *TEXT[9:]]
    base = request(ids, pooling=pooling)
    first = request(ids, (OWN,), (ALORA,), pooling=pooling)
    other = request(ids, (replace(OWN, version="v2"),), (ALORA,), pooling=pooling)
    assert shared(base, first) == shared(first, other) == 2
    late = Column(invocation=(ids[12], ids[13]))
    chained = request(ids, (replace(OWN, columns=(late,)),), (late,), pooling=pooling)
    assert shared(first, chained) == 2 and shared(base, chained) == 3
    never = request(TEXT, (OWN,), (ALORA,), pooling=pooling)
    assert shared(request(TEXT, pooling=pooling), never) == len(TEXT) // BLOCK


def test_the_next_block_may_decide_about_this_one() -> None:
    """The last occurrence counts, and it may be one that begins in this block."""
    ids = [1, 2, 10, 11, 12, 13, 14, 1, 2, 15, 16, 17]
    assert shared(request(ids), request(ids, (OWN,), (ALORA,))) == 1
    assert shared(request(ids[:8]), request(ids[:8], (OWN,), (ALORA,))) == 0


def test_mixes_share_what_they_agree_on() -> None:
    both = (rows(A), rows(B))
    plain = request(TEXT, (A,))
    late = request(TEXT, both, (factor(), factor((8, None))))
    assert shared(plain, late) == 2, "one whole adapter is its plain requests' as well"
    assert shared(late, request(TEXT, both, (factor(), factor((12, None))))) == 2
    assert shared(late, request(TEXT, both, (factor(), factor((8, 20))))) == 4
    swapped = request(TEXT, (rows(B), rows(A)), (factor((8, None)), factor()))
    assert shared(late, swapped) == 4
    constant = request(TEXT, (replace(A, scale=0.5), B))
    assert shared(constant, request(TEXT, both, (factor(scale=0.5), factor((0, 12))))) == 3
    assert shared(plain, constant) == 0
    assert shared(request(TEXT), request(TEXT, (replace(A, scale=0.0),))) == 4
    assert shared(request(TEXT), request(TEXT, both, (factor((8, None)), factor((9, 10))))) == 2


def test_answers_and_pattern_inside_a_block() -> None:
    both, answer = (rows(A), rows(B)), [30, 31, 32, 33, 34, 35, 36, 37]
    a = request(TEXT[:6], both, (factor((9, None)), factor(scale=0)), answer)
    b = request(TEXT[:6], both, (factor((10, None)), factor(scale=0)), answer)
    assert len(a.block_hashes) == 3 and shared(a, b) == 2
    assert shared(a, request(TEXT[:6], answer=answer)) == 2


def test_gates_frozen_where_a_prompt_ends() -> None:
    """Blocks of the prompt are everybody's; those behind it, of requests whose prompt is the same.
    A prompt that holds the same tokens, an earlier answer, is computed exactly."""
    frozen, answer = KeyedPart("x", frozen=True), [30, 31, 32, 33, 34, 35, 36, 37]
    first = request(TEXT[:10], (frozen,), answer=answer)
    assert not is_plain((frozen,)) and len(first.block_hashes) == 4
    assert shared(first, request(TEXT[:10], (frozen,), answer=answer)) == 4
    assert shared(first, request(TEXT[:10] + answer, (frozen,))) == 2
    assert shared(first, request(TEXT[:10] + answer[:1], (frozen,), answer=answer[1:])) == 2
    assert shared(first, request(TEXT[:10], (KeyedPart("x"),), answer=answer)) == 2
    whole = request(TEXT[:8], (frozen,), answer=answer)
    assert shared(whole, request(TEXT[:8] + answer, (frozen,))) == 2


def test_images_are_where_their_features_say() -> None:
    mask = torch.tensor([True, True, False, True, True, True])
    feature = MultiModalFeatureSpec(None, "image", "id", PlaceholderRange(5, 6, mask))
    made = request(TEXT, (TWO,), TWO.columns, features=[feature])
    plan = plan_of(made)
    assert plan is not None
    assert prompt_of(made, plan).modality == {"image": ((5, 7), (8, 11))}
    spans = Plan(TWO.columns, {"image": ((5, 7), (8, 11))})
    by_hand = request(TEXT)
    assert prompt_of(by_hand, spans).modality == {"image": ((5, 7), (8, 11))}
    plain = request(TEXT, (TWO,), TWO.columns)
    assert shared(made, plain) == 1


def test_embeddings_have_no_ids() -> None:
    embeds = torch.randn(12, 8)
    made = request([], (OWN,), (ALORA,), embeds=embeds)
    assert shared(made, request([], embeds=embeds)) == 3


def test_gates_that_do_more_than_multiply_are_never_still() -> None:
    zero = tuple(replace(c, scale=0.0) for c in SOFT.columns)
    assert shared(request(TEXT), request(TEXT, (SOFT,), zero)) == 0
    mixed = (rows(A), rows(SOFT))
    off = request(TEXT, mixed, (factor(), factor((8, None)), *zero))
    assert shared(request(TEXT, (A,)), off) == 2


def _factors() -> Any:
    bound = st.integers(0, 24)
    span = st.tuples(bound, st.one_of(bound, st.none())).filter(
        lambda s: s[1] is None or s[0] <= s[1]
    )
    scale = st.sampled_from([1.0, 1.0, 0.0, -0.0, 0.5, -2.0])
    spans = st.one_of(st.none(), st.lists(span, max_size=2).map(tuple))
    return st.builds(Column, scale=scale, spans=spans)


Said = tuple[list[int], tuple[KeyedPart, ...], tuple[Column, ...], Spans]
_adapters = st.lists(st.sampled_from([A, B, OWN, TWO, SOFT, *USERS]), max_size=3, unique=True)


@st.composite
def _requests(draw: Any, names: list[KeyedPart]) -> Said:
    ids = draw(st.lists(st.sampled_from([1, 2, 3]), min_size=12, max_size=20))
    by_row = len(names) > 0 and draw(st.booleans())
    parts, columns = [], []
    for part in names:
        if by_row:
            parts.append(rows(part))
            columns.append(draw(_factors()))
        else:
            parts.append(replace(part, scale=draw(st.sampled_from([1.0, 0.5, 0.0]))))
        gates = st.sampled_from([1.0, 0.5, 0.0, -0.0])
        columns += [replace(c, scale=draw(gates)) if c.expert else c for c in part.columns]
    bounds = st.lists(st.integers(0, len(ids)), min_size=2, max_size=2).map(sorted)
    modality = {"image": draw(st.lists(bounds, max_size=2))} if TWO in names else {}
    return ids, tuple(parts), tuple(columns), modality


@st.composite
def _pairs(draw: Any) -> tuple[Said, Said]:
    """Two requests; half of them for the same adapters."""
    names = draw(_adapters)
    others = names if draw(st.booleans()) else draw(_adapters)
    return draw(_requests(names)), draw(_requests(others))


def _adds(
    ids: list[int], parts: Any, columns: Any, modality: Spans
) -> list[frozenset[tuple[str, tuple[float, ...]]]]:
    """What is added at each position: adapter and how much of it, or with which gates."""
    prompt = Prompt(len(ids), ids, {k: tuple((a, b) for a, b in v) for k, v in modality.items()})
    table, at = values(columns, prompt, 0, len(ids)).tolist(), 0
    every: list[set[tuple[str, tuple[float, ...]]]] = [set() for _ in ids]
    for part in parts:
        for adds, row in zip(every, table, strict=True):
            numbers = row[at : at + part.width]
            factor = numbers.pop(0) if part.by_row else part.scale
            if not part.linear:
                numbers = [factor, *numbers] if factor else []
            else:
                numbers = [factor * number for number in numbers] if numbers else [factor]
            if any(numbers):
                adds.add((part.version, tuple(numbers)))
        at += part.width
    return [frozenset(adds) for adds in every]


@given(pair=_pairs())
@settings(max_examples=600)
def test_equal_keys_are_equal_computations(pair: tuple[Said, Said]) -> None:
    a, b = pair
    length = min(len(a[0]), len(b[0]))
    for ids in (b[0], a[0][:length] + b[0][length:]):  # also with a prefix in common
        both: tuple[Said, Said] = a, (ids, *b[1:])
        first, second = (request(*said[:3], modality=said[3]) for said in both)
        mine, theirs = (list(zip(said[0], _adds(*said), strict=True)) for said in both)
        blocks = length // BLOCK
        same = next((i for i in range(length) if mine[i] != theirs[i]), length)
        assert min(shared(first, second), blocks) == same // BLOCK


def test_runs_of_values_are_the_values() -> None:
    from vllm_lora_ext.model_patches.plan import Values

    rng = np.random.default_rng(0)
    columns = (ALORA, factor((3, 5), (9, None), scale=2.0), Column(modalities=("text",)))
    prompt = Prompt(12, [1, 2, 5, 1, 2, *range(7)], {"image": ((1, 3), (6, 7))})
    runs = Values(columns, prompt, 1000)
    for _ in range(50):
        start = int(rng.integers(0, 40))
        stop = start + int(rng.integers(0, 9))
        np.testing.assert_array_equal(runs.at(start, stop), values(columns, prompt, start, stop))
