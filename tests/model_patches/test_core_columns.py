"""What a request says of its adapter is held against what is loaded, and is in its blocks' keys."""

from __future__ import annotations

import pytest
from fake_core import BLOCK, PROMPT, Core, error_of, lora
from vllm import SamplingParams
from vllm.v1.engine import FinishReason

from vllm_lora_ext.conditions.column import Column
from vllm_lora_ext.conditions.recipe import DERIVED_IDS
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.residency import KeyedPart

ALORA = Column(invocation=(PROMPT[40], PROMPT[41]))


def aloras(core: Core) -> None:
    """Version v1 is an Activated LoRA; v2 one with another invocation, w1 is plain."""
    late = Column(invocation=(PROMPT[20], PROMPT[21]))
    for rank in core.workers.ranks:
        rank.made_of["v1"] = (KeyedPart("v1", columns=(ALORA,)),)
        rank.made_of["v2"] = (KeyedPart("v2", columns=(late,)),)
        rank.made_of["t1"] = ()
        rank.made_of["mix"] = (KeyedPart("v1", by_row=True, columns=(ALORA,)), KeyedPart("w1", 0.5))
    core._check_hit = lambda key, count: core.hits.append(count)


def test_a_request_that_says_nothing_has_its_adapters_columns(core):
    aloras(core)
    params = SamplingParams(max_tokens=4)
    core.add("base", None)
    core.finish()
    core.add("first", lora("a", 1))
    core.finish()
    core.add("again", lora("a", 1))
    core.finish()
    core.add("plain", lora("b", 2, "/b"))
    core.finish()
    assert core.hits == [0, 2 * BLOCK, 3 * BLOCK, 0], "the base's blocks before it starts"
    assert core.plans["first"].columns == (ALORA,) and core.plans["plain"] is None
    core.add("base2", None, prompt=[*PROMPT])
    core.finish()
    assert core.hits[-1] == 3 * BLOCK and params.extra_args is None


def test_a_plan_must_fit_what_is_loaded(core):
    aloras(core)
    other = {"lora_ext": {"columns": [{"invocation": [1]}]}}
    for key, says in {
        "none": {"lora_ext": {"columns": []}}, "other": other,
        "unknown": {"lora_ext": {"columns": [{"x": 1}]}}, "no_list": {"lora_ext": {"columns": 3}},
    }.items():  # fmt: skip
        core.add(key, lora("a", 1), says=says)
    core.add("fits", lora("a", 1), says={"lora_ext": {"columns": [ALORA.to_dict()]}, "x": 1})
    core.add("session", lora("a", 1), resumable=True)
    last = core.finish()
    codes = {key: error_of(last, key) for key in last if key != "fits"}
    assert codes == {
        "none": "adapter_changed", "other": "adapter_changed", "unknown": "unknown_key",
        "no_list": "bad_value", "session": "unsupported_feature",
    }  # fmt: skip
    assert last["fits"].finish_reason is FinishReason.LENGTH


def test_a_template_waits_for_what_it_needs(core):
    aloras(core)
    core.write("/t", "t1")
    assert core.core.add_lora(lora("t", 3, "/t")), "it can be loaded, and waits for requests"
    core.add("template", lora("t", 3, "/t"))
    last = core.finish()
    assert error_of(last, "template") == "missing_setting"
    with pytest.raises(AdapterError, match="missing_setting"):
        core.core.pin_lora(3)


def test_a_derived_adapter_of_an_old_part_keeps_its_keys(core):
    aloras(core)
    core.write("lora_ext:mix", "mix")
    mix = lora("mix", DERIVED_IDS, "lora_ext:mix")
    says = {"lora_ext": {"columns": [{"spans": [[0, None]]}, ALORA.to_dict()]}}
    core.add("mix", mix, says=says)
    core.finish()
    core.core.add_lora(lora("a", 1))
    core.write("/a", "v2")
    core.core.add_lora(lora("a", 1, inplace=True))
    core.add("again", mix, says=says)
    core.finish()
    assert core.hits == [0, 3 * BLOCK]
    core.write("lora_ext:other", "w1")  # of another recipe, whose id is the same
    core.add("other", lora("other", DERIVED_IDS, "lora_ext:other"))
    assert core.finish()["other"].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("connector", ["LMCacheConnectorV1", "OffloadingConnector"])
def test_connectors_with_keys_of_their_own(core, connector):
    aloras(core)
    core.core.add_lora(lora("a", 1))
    core.core._lora_ext._conditions._connector = connector
    core.add("alora", lora("a", 1))
    core.add("plain", lora("b", 2, "/b"))
    last = core.finish()
    assert last["plain"].finish_reason is FinishReason.LENGTH
    if connector == "LMCacheConnectorV1":
        assert error_of(last, "alora") == "unsupported_feature"
    else:
        assert last["alora"].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("when", ["waiting", "running", "preempted"])
def test_columns_that_change_under_a_request(core, when):
    """A worker that knows a request knows its old columns."""
    aloras(core)
    core.add("r", lora("a", 1), n=30)
    if when != "waiting":
        core.step()
        core.step()
    if when == "preempted":
        core.core.scheduler._preempt_request(core.core.scheduler.running.pop(), 0.0)
    for rank in core.workers.ranks:  # by a tool that calls the workers
        rank.held[1] = "v2"
    core.core.collective_rpc("remove_lora", args=(99,))
    last = core.finish()
    if when == "waiting":
        assert last["r"].finish_reason is FinishReason.LENGTH
        assert core.plans["r"].columns[0].invocation == (PROMPT[20], PROMPT[21])
    else:
        assert error_of(last, "r") == "adapter_changed"


def test_positions_of_answers_that_come_too_late(core):
    aloras(core)
    core.write("lora_ext:mix", "mix")
    mix = lora("mix", DERIVED_IDS, "lora_ext:mix")
    core.core.add_lora(lora("a", 1))
    core.core._lora_ext._conditions._ahead = True
    for key, stop in (("late", len(PROMPT) + 1), ("end", len(PROMPT)), ("open", None)):
        columns = [{"spans": [[3, stop]]}, ALORA.to_dict()]
        core.add(key, mix, says={"lora_ext": {"columns": columns}})
    last = core.finish()
    assert error_of(last, "late") == "unsupported_feature"
    assert {last[k].finish_reason for k in ("end", "open")} == {FinishReason.LENGTH}
