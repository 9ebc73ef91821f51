"""A core in a process of its own goes on while workers read."""

from __future__ import annotations

import queue

import pytest
from fake_core import lora, versions
from vllm.v1.engine import FinishReason
from vllm.v1.engine.core import EngineCoreProc

from vllm_lora_ext.model_patches.core_calls import ADD
from vllm_lora_ext.model_patches.held import MEMORY_IDS
from vllm_lora_ext.model_patches.residency import Prepared


@pytest.fixture
def process(core, monkeypatch):
    """A core in a process of its own, whose loop takes turns with requests."""
    monkeypatch.setattr("vllm_lora_ext.model_patches.loading._EVERY", 0.0)
    core.core.__class__ = EngineCoreProc
    core.core.engines_running, core.core.batch_queue = False, None
    core.core.output_queue = queue.Queue()
    return core


def test_a_core_in_a_process_of_its_own_steps_on_while_workers_read(process):
    first, second = process.workers.ranks
    add = getattr(process.core, ADD)
    assert not process.core.has_work()
    second.slow.add(1)
    future = add(lora("a", 1))
    assert process.core.has_work() and not future.done()
    process.add("base", None)
    assert process.finish()["base"].finish_reason is FinishReason.LENGTH
    assert not future.done() and first.held == {} and process.core.has_work()
    second.slow.clear()
    process.step()
    assert future.result()["version"] == "v1" and second.held == {1: "v1"}
    assert not process.core.has_work()
    assert add(lora("a", 1))["version"] == "v1", "held: at once"


def test_loads_of_one_id_follow_each_other_and_others_do_not_wait(process):
    for rank in process.workers.ranks:
        rank.slow.add(1)
    add = getattr(process.core, ADD)
    first, other = add(lora("a", 1)), add(lora("b", 2, "/b"))
    process.step()
    again = add(lora("a", 1, "/c", inplace=True))
    assert other.result()["version"] == "w1" and not first.done()
    for rank in process.workers.ranks:
        rank.slow.clear()
    process.step()
    assert first.result()["version"] == "v1" and not again.done()
    process.step()
    assert again.result()["version"] == "x1"
    assert set(process.workers.ranks[0].held.values()) == {"v1", "x1", "w1"}
    process.add("r", lora("a", 1, "/c"))
    process.finish()
    assert versions(process) == {"x1"}


def test_two_loaders_of_one_adapter_at_once(process):
    """The second finds the version gone that it meant to replace."""
    add = getattr(process.core, ADD)
    add(lora("a", 1))
    process.step()
    first = add(lora("a", 1, "/b", inplace=True), None, "v1")
    second = add(lora("a", 1, "/c", inplace=True), None, "v1")
    for _ in range(3):
        process.step()
    assert first.result()["version"] == "w1" and "version_conflict" in second.result()["error"]
    assert "version_conflict" in add(lora("a", 1, "/c", inplace=True), None, "v1")["error"]
    assert [rank.reading for rank in process.workers.ranks] == [{}, {}]
    assert set(process.workers.ranks[0].held.values()) == {"v1", "w1"}


def test_tensors_are_sent_once_and_a_refused_load_leaves_nothing_behind(process):
    sent = []
    for rank in process.workers.ranks:
        load = rank.load
        rank.load = lambda r, s, u, load=load: (sent.append(s), load(r, s, u))[1]
    add = getattr(process.core, ADD)
    future = add(lora("m", MEMORY_IDS + 1, "memory:m", inplace=True), [b"tensors", None, {}])
    process.step()
    assert future.result()["version"] == "tensors"
    assert sent == [Prepared(), Prepared()]
    refused = add(lora("other", MEMORY_IDS + 1, "memory:o", inplace=True), [b"t", None, {}])
    process.step()
    assert "id_in_use" in refused.result()["error"]
    gone = add(lora("x", 3, "/gone"))
    process.step()
    assert "not_found" in gone.result()["error"]
    assert [rank.reading for rank in process.workers.ranks] == [{}, {}]


def test_a_request_that_cannot_wait_has_its_adapter_at_once(process):
    for rank in process.workers.ranks:
        rank.slow.add(1)
    future = getattr(process.core, ADD)(lora("a", 1))
    process.add("r", lora("a", 1))
    assert process.finish()["r"].finish_reason is FinishReason.LENGTH
    for rank in process.workers.ranks:
        rank.slow.clear()
    process.step()
    assert future.result()["version"] == "v1"
