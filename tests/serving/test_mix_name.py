"""Names of mixes: one canonical spelling, and errors that point at the column."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.serving import from_lorax, is_mix_name, parse
from vllm_lora_ext.serving.mix_name import LONGEST, Mix, make

NAMES = st.from_regex(r"[A-Za-z0-9_.-]{1,8}(/[A-Za-z0-9_.-]{1,8})?", fullmatch=True)
TERMS = st.lists(
    st.tuples(NAMES, st.integers(-10000, 10000).filter(bool)),
    min_size=1, max_size=5, unique_by=lambda term: term[0],
)  # fmt: skip
DENSITY = st.integers(1, 10000).map(lambda n: n / 10000)
RANK = st.integers(1, 64)
OPTIONS = {
    "cat": st.fixed_dictionaries({}),
    "svd": st.fixed_dictionaries({}, optional={"rank": RANK, "energy": DENSITY}),
    "ties": st.fixed_dictionaries({}, optional={"density": DENSITY, "rank": RANK}),
    "lego": st.fixed_dictionaries({"k": RANK}, optional={"restarts": st.integers(1, 9)}),
}


@st.composite
def mixes(draw) -> Mix:
    op = draw(st.sampled_from(sorted(OPTIONS)))
    return make(op, draw(OPTIONS[op]), draw(TERMS))


@given(mixes())
def test_what_is_printed_reads_the_same(mix):
    assert is_mix_name(str(mix))
    assert parse(str(mix)) == mix
    assert str(parse(str(mix))) == str(mix)


@given(TERMS, st.randoms())
def test_order_and_spelling_do_not_matter(terms, random):
    shuffled = random.sample(terms, len(terms))
    spelt = "+".join(f"{name}*{weight / 100:.4f}" for name, weight in shuffled)
    assert parse(f"cat:{spelt}") == make("cat", {}, terms)


def test_a_tool_may_take_something_from_the_first_adapter():
    assert str(parse("svd[compat=peft]:b+a")) == "svd[compat=peft]:b+a"
    assert str(parse("svd:b+a")) == "svd:a+b"


@given(st.text(max_size=40) | st.text('cat:svd[r=]*+.0123ab-/"', max_size=40))
def test_any_text_is_a_mix_or_a_typed_error(text):
    try:
        mix = parse(text)
    except AdapterError as error:
        assert error.code in ("bad_mix", "offline_only", "unknown_key", "bad_value")
    else:
        assert parse(str(mix)) == mix


@given(st.text(min_size=1, max_size=30).filter(lambda t: t.isprintable() and t.strip()))
def test_descriptions_survive(text):
    import json

    mix = parse(f"describe:{json.dumps(text)}")
    assert mix.argument == " ".join(text.split())
    assert parse(str(mix)) == mix


@pytest.mark.parametrize(
    ("spelling", "canonical"),
    [
        ("cat:math*0.6+code*0.4", "cat:code*0.4+math*0.6"),
        ("cat:code*.40+math*0.600", "cat:code*0.4+math*0.6"),
        ("cat:a*1+b*1.0", "cat:a+b"),
        ("cat:a*-.3", "cat:a*-0.3"),
        ("svd[rank=32]:b+a", "svd[r=32]:a+b"),
        ("svd[svd_rank=32]:b+a", "svd[r=32]:a+b"),
        ("cat[]:org/a+b", "cat:b+org/a"),
        ("recipe:weekly-mix", "recipe:weekly-mix"),
        ('describe:"a  b"', 'describe:"a b"'),
    ],
)
def test_canonical_names(spelling, canonical):
    assert str(parse(spelling)) == canonical


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("cat:", 5), ("cat", 4), ("cat:a+", 7), ("cat:a*", 7), ("cat:a*x", 7), ("cat:a b", 6),
        ("cat[r=1:a", 8), ("svd[r=1,r=2]:a", 9), ("cat:a*0.001", 7), ("cat:a*101", 7),
        ("cat:a/b/c", 8), ("cat:../x/y", 9), ("cat:/etc", 5), ("nosuch:a+b", 1),
        ("recipe:a/b/c", 11), ("describe:x", 10), ('describe:""', 10), ("cat:a+a", 4),
        ("ties[d=2]:a+b", 5), ("cat[bogus=1]:a", 4),
    ],
)  # fmt: skip
def test_errors_have_a_column(text, column):
    with pytest.raises(AdapterError) as caught:
        parse(text)
    found = re.search(r"column (\d+):", caught.value.text)
    assert found and abs(int(found[1]) - column) <= 1, caught.value.text


def test_too_long():
    with pytest.raises(AdapterError) as caught:
        parse("cat:" + "a" * LONGEST)
    assert caught.value.code == "bad_mix"


@pytest.mark.parametrize("name", ["soups:a+b", "ties[space=full]:a+b", "ties[compat=mergekit]:a+b"])
def test_slow_merges_are_offline(name):
    with pytest.raises(AdapterError) as caught:
        parse(name)
    assert caught.value.code == "offline_only"


@pytest.mark.parametrize("name", ["base", "org/model", "qwen2.5:7b", "C:model", ""])
def test_other_models_names_are_no_mixes(name):
    assert not is_mix_name(name)


def test_lorax():
    given = {"ids": ["math", "code"], "weights": [0.6, 0.4], "merge_strategy": "ties",
             "density": 0.5, "majority_sign_method": "frequency"}  # fmt: skip
    mix = from_lorax(given)
    assert parse(str(mix)) == mix
    assert mix.op == "ties" and dict(mix.options)["compat"] == "lorax"
    assert dict(mix.terms) == {"math": 60, "code": 40}
    assert from_lorax({"ids": ["a"]}).terms == (("a", 100),)


@pytest.mark.parametrize(
    ("given", "code"),
    [
        (3, "bad_value"), ({}, "bad_value"), ({"ids": []}, "bad_value"),
        ({"ids": ["a"], "weights": [1, 2]}, "bad_value"),
        ({"ids": ["a"], "weights": [float("nan")]}, "bad_value"),
        ({"ids": ["a*2"]}, "bad_value"), ({"ids": ["../a/b"]}, "bad_mix"),
        ({"ids": ["a"], "bogus": 1}, "unknown_key"),
        ({"ids": ["a"], "merge_strategy": "ties"}, "missing_key"),
        ({"ids": ["a"], "merge_strategy": "slerp"}, "bad_value"),
    ],
)  # fmt: skip
def test_bad_lorax(given, code):
    with pytest.raises(AdapterError) as caught:
        from_lorax(given)
    assert caught.value.code == code
