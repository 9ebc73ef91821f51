"""Adapters that are replaced: no request mixes versions, no block is found by another's."""

from __future__ import annotations

import pickle
import random

import pytest
from fake_core import BLOCK, PROMPT, Core, error_of, lora, versions
from vllm.v1.engine import FinishReason

from vllm_lora_ext.model_patches.core_calls import ROLL_BACK


@pytest.mark.parametrize("how", ["place", "id"])
def test_new_weights_never_answer_from_old_kv(core, how):
    core.add("old", lora("a", 1))
    core.finish()
    core.write("/a", "v2")
    core.add("new", lora("a", 1, inplace=True) if how == "place" else lora("a", 2))
    core.finish()
    assert core.hits == [0, 0]
    core.add("again", lora("a", 1 if how == "place" else 2))
    core.finish()
    assert core.hits[-1] == 3 * BLOCK


def test_the_old_weights_come_back_to_their_kv(core):
    core.add("old", lora("a", 1))
    core.finish()
    for version in ("v2", "v1"):
        core.write("/a", version)
        core.add(version, lora("a", 1, inplace=True))
        core.finish()
    assert core.hits == [0, 0, 3 * BLOCK]


def test_equal_content_shares_whatever_it_is_called(core):
    core.write("/b", "v1")
    core.add("a", lora("a", 1))
    core.finish()
    core.add("b", lora("b", 2, "/b"))
    core.finish()
    assert core.hits == [0, 3 * BLOCK]


def test_the_base_shares_with_no_adapter(core):
    core.add("base", None)
    core.finish()
    core.add("a", lora("a", 1))
    core.finish()
    assert core.hits == [0, 0]


def test_hashed_before_and_run_after_a_replacement(core):
    """The thread that takes requests in hashes them before the replacement is handled."""
    core.add("old", lora("a", 1))
    core.finish()
    waiting = core.core.preprocess_add_request(core.request("new", lora("a", 1)))
    core.write("/a", "v2")
    assert core.core.add_lora(lora("a", 1, inplace=True))
    core.core.add_request(*waiting)
    core.finish()
    assert core.hits[-1] == 0
    core.add("again", lora("a", 1))
    core.finish()
    assert core.hits[-1] == 3 * BLOCK


def test_waiting_while_its_adapter_is_replaced(core):
    core.add("old", lora("a", 1))
    core.finish()
    core.add("new", lora("a", 1))
    core.write("/a", "v2")
    core.core.add_lora(lora("a", 1, inplace=True))
    core.add("newer", lora("a", 1))
    core.finish()
    assert core.hits == [0, 3 * BLOCK, 0], "it ends on the version that it came in with"


def test_two_versions_share_a_step(core):
    core.add("old", lora("a", 1), n=20)
    for _ in range(3):
        core.step()
    core.write("/a", "v2")
    core.core.add_lora(lora("a", 1, inplace=True))
    core.add("new", lora("a", 1), n=20)
    adapters = {request.lora_request for request in core.core.scheduler.requests.values()}
    assert len(adapters) == 2, "vLLM's runners keep those of a step in a set, by name"
    assert {adapter.name for adapter in adapters} == {"a"}, "as traces and KV events call it"
    assert pickle.loads(pickle.dumps(adapters)) == adapters, "on its way to the workers"
    assert lora("a", 1) in adapters and lora("a", 5) not in adapters - {lora("a", 1)}
    last = core.finish()
    assert {o.finish_reason for o in last.values()} == {FinishReason.LENGTH}
    assert max(len(batch) for batch in core.batches) == 2 and versions(core) == {"v1", "v2"}


def test_a_request_gets_the_version_it_was_promised(core):
    core.add("old", lora("a", 1))
    core.finish()
    core.write("/a", "v2")
    core.core.add_lora(lora("a", 1, inplace=True))
    promised = {"lora_ext": {"version": "v1"}}
    core.add("promised", lora("a", 1), says=promised)
    core.finish()
    assert core.hits == [0, 3 * BLOCK] and versions(core) == {"v1"}
    core.add("never", lora("a", 1), says={"lora_ext": {"version": "v0"}})
    assert error_of(core.finish(), "never") == "adapter_changed"
    core.core.remove_lora(1)
    core.add("late", lora("a", 1), says=promised)
    assert error_of(core.finish(), "late") == "not_found"


def test_what_was_removed_under_way_is_gone_when_the_engine_is_idle(core):
    core.add("r", lora("a", 1))
    core.step()
    core.core.remove_lora(1)
    assert core.workers.ranks[0].held == {1: "v1"}
    assert core.finish()["r"].finish_reason is FinishReason.LENGTH
    assert core.workers.ranks[0].held == {} and core.core.list_loras() == set()


def test_rolled_back(core):
    core.core.add_lora(lora("a", 1))
    core.write("/c", "v2")
    core.core.add_lora(lora("a", 1, "/c", inplace=True))
    back = getattr(core.core, ROLL_BACK)
    answer = back(["a", 1, "/c"], "v1", "v2")
    assert (answer["version"], answer["path"]) == ("v1", "/a")
    core.add("r", lora("a", 1))
    core.finish()
    assert versions(core) == {"v1"}
    assert "version_conflict" in back(lora("a", 1), "v2", "v2")["error"]


@pytest.mark.parametrize("steps", range(1, 8))
def test_running_while_its_adapter_is_replaced(core, steps):
    """Neither version may ever read what it computed across the replacement."""
    core.add("across", lora("a", 1), n=40)
    for _ in range(steps):
        core.step()
    core.write("/a", "v2")
    core.core.add_lora(lora("a", 1, inplace=True))
    core.finish()
    text = PROMPT + [7] * 40
    for turn in range(2):  # the first makes the way to what stands further back
        core.add(f"v2-{turn}", lora("a", 1), prompt=text)
        core.finish()
    core.write("/a", "v1")
    core.add("v1", lora("a", 1, inplace=True), prompt=text)
    core.finish()


@pytest.mark.parametrize("seed", range(20))
def test_no_order_of_events_mixes_versions(seed):
    """Adds, steps, replacements, aborts, preemptions and removals, in any order."""
    rng, core, count = random.Random(seed), Core({"/a": "v0", "/b": "v1"}), 0
    for _ in range(120):
        what = rng.choice(["add"] * 4 + ["step"] * 6 + ["replace", "abort", "preempt", "remove"])
        number = rng.choice((1, 2))
        if what == "add":
            count += 1
            adapter = rng.choice((None, lora(f"n{number}", number, ("/a", "/b")[number - 1])))
            start = rng.choice((0, 0, 500))
            prompt = [start + t for t in range(rng.randrange(5, 4 * BLOCK))]
            core.add(f"r{count}", adapter, prompt=prompt, n=rng.randrange(1, 2 * BLOCK))
        elif what == "step":
            core.step()
        elif what == "replace":
            core.write(("/a", "/b")[number - 1], f"v{rng.randrange(3)}")
            core.core.add_lora(lora(f"n{number}", number, ("/a", "/b")[number - 1], True))
        elif what == "abort" and core.core.scheduler.requests:
            core.core.abort_requests([rng.choice(list(core.core.scheduler.requests))])
        elif what == "preempt" and core.core.scheduler.running:
            request = core.core.scheduler.running.pop()
            core.core.scheduler._preempt_request(request, 0.0)
        elif what == "remove":
            core.core.remove_lora(number)
    core.finish()
    assert max(core.hits) > 0
