"""The core's part: a step meets only adapters that are held, and what cannot be had ends alone."""

from __future__ import annotations

import copy

import pytest
from fake_core import PROMPT, Core, error_of, lora
from vllm.v1.engine import FinishReason

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.core_adapters import adapters_of
from vllm_lora_ext.model_patches.core_calls import ADD, STATE
from vllm_lora_ext.model_patches.gate_pass import FINISH
from vllm_lora_ext.model_patches.traffic import Traffic


def test_a_request_has_its_adapter_loaded_before_its_step(core):
    core.add("r", lora("a", 1))
    assert core.workers.ranks[1].held == {1: "v1"}
    assert core.finish()["r"].finish_reason is FinishReason.LENGTH
    assert core.batches[0] == {1}


def test_a_request_whose_adapter_is_gone_ends_alone(core):
    core.add("good", lora("a", 1))
    core.add("bad", lora("x", 2, "/gone"))
    core.add("base", None)
    last = core.finish()
    assert {k: o.finish_reason.name for k, o in last.items()} == {
        "good": "LENGTH", "bad": "ERROR", "base": "LENGTH"
    }  # fmt: skip
    assert AdapterError.parse(last["bad"].stop_reason).code == "not_found"
    assert "bad" not in core.core.scheduler.requests


def test_a_refusal_alone_comes_without_a_request_to_step(core):
    core.add("bad", lora("x", 2, "/gone"))
    (output,) = core.step()
    assert output.request_id == "bad" and output.finish_reason is FinishReason.ERROR
    assert core.step() == []


def test_what_steps_taken_aside_put_out_comes_in_its_order(core):
    """An engine in the front end's own process computes a gate while others answer."""
    core.add("first", None, n=6)
    core.add("second", None, n=2)
    rpc = core.workers.rpc
    core.workers.rpc = lambda method, *args: (
        [{"gate": "g"}] if method == FINISH else rpc(method, *args)
    )
    core.core.step_fn, core.core.post_step = core.core.step, lambda executed: None
    adapters, outputs = core.core._lora_ext, core.step()
    answer = adapters.gates.ask(7, "v", PROMPT)
    assert adapters._named() == {7}, "no load of another may put it out"
    while not answer.done():
        adapters.step_aside()
    assert answer.result() == {"gate": "g", "computed": True}
    assert not adapters._named()
    while core.core.scheduler.has_requests():
        outputs += core.step()
    for key, count in (("first", 6), ("second", 2)):
        mine = [o for o in outputs if o.request_id == key]
        assert sum(len(o.new_token_ids) for o in mine) == count
        assert [o.finish_reason is not None for o in mine] == [False] * (len(mine) - 1) + [True]
    assert {o.request_id for o in outputs} == {"first", "second"}


def test_a_core_of_its_own_process_sends_the_refusal_to_the_right_client():
    core = Core({}, remote=True)
    request = core.request("bad", lora("x", 2, "/gone"))
    request.client_index = 3
    core.core.add_request(*core.core.preprocess_add_request(request))
    client, outputs = core.core.output_queue.get_nowait()
    assert client == 3 and outputs.finished_requests == {"bad"}
    assert "not_found" in outputs.outputs[0].stop_reason


def test_evicted_meanwhile_is_loaded_again(core):
    for rank in core.workers.ranks:
        rank.room = 1
    for turn in range(3):
        core.add(f"a{turn}", lora("a", 1))
        core.finish()
        core.add(f"b{turn}", lora("b", 2, "/b"))
        core.finish()
    assert max(core.hits) > 0  # and from the prefix cache, where the content is the same
    core.write("/a", "v2")
    core.add("changed", lora("a", 1))
    assert error_of(core.finish(), "changed") == "files_changed"
    core.add("new", lora("a", 1, inplace=True))
    core.finish()
    assert core.hits[-1] == 0
    assert getattr(core.core, STATE)(True)["counts"]["adapters_evicted"] == 6


def test_an_unreadable_disk_after_the_load_is_no_ones_end(core):
    core.add("first", lora("a", 1))
    for rank in core.workers.ranks:
        rank.files.clear()
    core.add("second", lora("a", 1))
    last = core.finish()
    assert {o.finish_reason for o in last.values()} == {FinishReason.LENGTH}


def test_what_is_held_and_what_was_counted(core):
    for rank in core.workers.ranks:
        rank.traffic = Traffic(5, 3, 100, 0.5)
    core.core.add_lora(lora("a", 1))
    core.add("r", lora("a", 1))
    state = getattr(core.core, STATE)
    (row,) = state(False)["adapters"]
    assert (row["name"], row["version"], row["in_flight"]) == ("a", "v1", 1)
    counts = state(True)["counts"]
    evicted = {"adapters_evicted": 0, "derived_adapters_evicted": 0}
    assert counts == {"steps": 5, "activations": 3, "bytes": 200, "seconds": 0.5, **evicted}
    core.workers.ranks[0].traffic.activations = 4
    counts = state(True)["counts"]
    assert counts == {"steps": 0, "activations": 1, "bytes": 0, "seconds": 0, **evicted}
    assert state(True)["experts"] == {"a": [1.5, 0.5]}
    assert not {"counts", "experts"} & state(False).keys()
    core.finish()


def test_pinned_slots_are_left_out_of_every_plan():
    core = Core({"/a": "v"}, slots=3)
    for number in range(1, 7):
        core.core.add_lora(lora(f"n{number}", number))
    assert core.core.pin_lora(1) and core.core.pin_lora(2)
    for number in range(1, 7):
        core.add(f"r{number}", lora(f"n{number}", number), prompt=[number] * 4)
    last = core.finish()
    assert len(last) == 6
    assert max(len(batch - {1, 2}) for batch in core.batches) == 1
    assert {1, 2} < max(core.batches, key=len)  # the pinned ones take part in every step


def test_all_pinned_serves_the_pinned_and_refuses_the_others():
    core = Core({"/a": "v"}, slots=2)
    for number in (1, 2):
        core.core.add_lora(lora(f"n{number}", number))
        assert core.core.pin_lora(number)
    for number in (1, 2, 3):
        core.add(f"r{number}", lora(f"n{number}", number), prompt=[number] * 4)
    last = core.finish()
    assert [last[f"r{n}"].finish_reason.name for n in (1, 2, 3)] == ["LENGTH", "LENGTH", "ERROR"]
    assert "slots_pinned" in last["r3"].stop_reason


def test_workers_that_were_called_directly(core):
    """A tool of reinforcement learning replaces weights through `collective_rpc`."""
    core.add("old", lora("a", 1))
    core.finish()
    for rank in core.workers.ranks:
        rank.held[1] = "trained"
    core.core.collective_rpc("remove_lora", args=(99,))
    core.add("new", lora("a", 1))
    core.finish()
    assert core.hits == [0, 0]


def test_a_step_without_a_load_under_way_asks_the_scheduler_nothing(core, monkeypatch):
    adapters = adapters_of(core.core)
    assert not adapters.loading.pending
    monkeypatch.setattr(core.core.scheduler, "has_requests", lambda: pytest.fail("asked"))
    assert adapters.step(lambda: ({}, False)) == ({}, False)


def test_the_answer_of_add_names_what_was_evicted(core):
    for rank in core.workers.ranks:
        rank.room = 1
    add = getattr(core.core, ADD)
    said = {"understands": {"columns": [], "user": None, "instruction": False}, "before": None}
    assert add(lora("a", 1)) == {
        "version": "v1",
        "path": "/a",
        "evicted": [],
        "before": None,
        "read": True,
        **said,
    }
    other = add(["b", 2, "/b"])  # as it comes over the wire
    said["read"] = True
    assert other == {"version": "w1", "path": "/b", "evicted": [1], "before": None, **said}
    again = add(lora("b", 2, "/b"))
    assert (again["read"], again["evicted"], again["before"]) == (False, [], "w1")
    assert "not_found" in add(lora("x", 3, "/gone"))["error"]


def test_an_engine_without_lora_is_left_alone():
    core = Core({})
    core.core.vllm_config = copy.copy(core.core.vllm_config)
    core.core.vllm_config.lora_config = None
    core.add("base", None)
    core.finish()
    assert "_lora_ext" not in core.core.__dict__
