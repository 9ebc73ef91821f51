"""What an engine holds of its adapters: replaced, evicted, pinned, handed over as tensors."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from vllm.lora.request import LoRARequest

from integration_tests.engines import (
    Recorded,
    greedy,
    last_logprobs,
    prompt_logprobs,
    recorded,
    run,
    tokens,
    worst,
)
from integration_tests.reference_model import logits, scaled
from tests.bad_adapters import build_bad
from vllm_lora_ext.adapters.registry import load_adapter
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.admitted import Admitted

pytestmark = pytest.mark.engine
BOUND, VOCAB = 2e-3, 512
PLAIN, MOE = recorded("plain-a"), recorded("loramoe-a")
LONG = [(7 * t + 3) % VOCAB for t in range(3 * 32 + 9)]  # three blocks and some tokens
_ids = iter(range(500, 600))


def lora(folder: Path, name: str, number: int | None = None, inplace: bool = False) -> LoRARequest:
    return LoRARequest(name, number or next(_ids), str(folder), load_inplace=inplace)


def content(fx: Recorded) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    config = fx.folder / "adapter_config.json"
    (weights,) = fx.folder.glob("*.safetensors")
    return load_file(weights), json.loads(config.read_text()) if config.is_file() else None


def numbers(llm: Any, request: LoRARequest, fx: Recorded) -> float:
    """Largest difference from the authors' log-probabilities."""
    got = prompt_logprobs(llm, [(prompt, request) for prompt in fx.prompts], VOCAB)
    return max(worst(g, wanted) for g, wanted in zip(got, fx.logits, strict=True))


def cached(llm: Any, request: LoRARequest | None) -> int:
    return run(llm, [(LONG, request)], greedy(1))[0].num_cached_tokens


def answer(llm: Any, request: LoRARequest) -> torch.Tensor:
    """Log-probabilities after the long prompt, which may come out of the prefix cache."""
    return last_logprobs(llm, [(LONG, request)], VOCAB)[0]


def wanted(folder: Path) -> torch.Tensor:
    return logits("base_llama", load_adapter(folder), LONG)[-1]


def code(call: Any, *args: Any) -> str:
    with pytest.raises(AdapterError) as caught:
        call(*args)
    return caught.value.code


def test_tensors_give_the_authors_numbers(llama):
    for fx in (PLAIN, MOE):
        request = llama.llm_engine.add_adapter(f"tensors-{fx.name}", *content(fx))
        assert numbers(llama, request, fx) < BOUND
        greedily = run(llama, [(p, request) for p in fx.prompts], greedy(12))
        assert [tokens(o) for o in greedily] == fx.greedy
        assert llama.llm_engine.remove_lora(request.lora_int_id)


def test_tensors_by_the_same_name_replace(llama):
    """Old KV is never read, and the old content comes back to its own."""
    add = llama.llm_engine.add_adapter
    first = add("changing", *content(PLAIN))
    assert worst(answer(llama, first), wanted(PLAIN.folder)) < BOUND
    second = add("changing", *content(MOE))
    assert second == first and cached(llama, first) == 0
    assert worst(answer(llama, first), wanted(MOE.folder)) < BOUND
    add("changing", *content(PLAIN))
    assert cached(llama, first) == 96
    assert worst(answer(llama, first), wanted(PLAIN.folder)) < BOUND
    assert llama.llm_engine.remove_lora(first.lora_int_id)


def test_requests_in_flight_keep_their_version(llama):
    """Added before and after a replacement, computed in the same steps."""
    engine = llama.llm_engine
    request = engine.add_adapter("going-on", *content(PLAIN))
    first = engine.adapter_version(request)
    done: dict[str, Any] = {}
    for turn in range(2):
        engine.add_request(f"old-{turn}", {"prompt_token_ids": PLAIN.prompts[turn]}, greedy(12),
                           lora_request=request)  # fmt: skip
    for _ in range(3):
        engine.step()
    engine.add_adapter("going-on", *content(MOE), expected_version=first)
    second = engine.adapter_version(request)
    assert (
        code(lambda: engine.add_adapter("going-on", *content(PLAIN), expected_version=first))
        == "version_conflict"
    )
    for turn in range(2):
        engine.add_request(f"new-{turn}", {"prompt_token_ids": MOE.prompts[turn]}, greedy(12),
                           lora_request=request)  # fmt: skip
    while engine.has_unfinished_requests():
        done |= {out.request_id: out for out in engine.step() if out.finished}
    for turn in range(2):
        for which, fx, version in (("old", PLAIN, first), ("new", MOE, second)):
            out = done[f"{which}-{turn}"]
            assert tokens(out) == fx.greedy[turn] and out.adapter_version == version
    back = engine.roll_back_adapter(request, first)
    (out,) = run(llama, [(PLAIN.prompts[2], back)], greedy(12))
    assert tokens(out) == PLAIN.greedy[2] and out.adapter_version == first
    (base,) = run(llama, [([1, 2], None)], greedy(1))
    assert base.adapter_version is None
    assert engine.remove_lora(request.lora_int_id)


def test_bad_tensors_change_nothing(llama):
    add = llama.llm_engine.add_adapter
    request = add("steady", *content(PLAIN))
    tensors, config = content(PLAIN)
    name = next(iter(tensors))
    tensors[name] = tensors[name] * float("nan")
    assert code(add, "steady", tensors, config) == "not_finite"
    assert code(add, "other", tensors, config) == "not_finite"
    assert numbers(llama, request, PLAIN) < BOUND
    assert llama.llm_engine.remove_lora(request.lora_int_id)
    assert code(run, llama, [([1, 2], request)], greedy(1)) == "not_found"


def test_other_files_behind_the_same_name_and_path(llama, tmp_path):
    place = tmp_path / "place"
    number = next(_ids)
    for fx in (PLAIN, MOE, PLAIN):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(fx.folder, place)
        replaced = lora(place, "place", number, inplace=True)
        assert worst(answer(llama, replaced), wanted(fx.folder)) < BOUND
        assert cached(llama, lora(place, "place", number)) == 96
    shutil.rmtree(place)  # an unreadable disk is nothing to an adapter that is held
    assert worst(answer(llama, lora(place, "place", number)), wanted(PLAIN.folder)) < BOUND


def test_equal_content_shares_its_prefix(llama, tmp_path):
    prompt = [p + 1 for p in LONG[:-1]]
    for name in ("one", "two"):
        shutil.copytree(PLAIN.folder, tmp_path / name)
    outs = [
        run(llama, [(prompt, lora(tmp_path / name, name))], greedy(1))[0] for name in ("one", "two")
    ]
    assert [o.num_cached_tokens for o in outs] == [0, 96]


def test_pinned_slots(llama):
    """Four slots, all pinned: the fifth adapter's request is refused, the others are served."""
    engine = llama.llm_engine
    pinned = [lora(fx.folder, f"pin-{i}") for i, fx in enumerate((PLAIN, MOE, PLAIN, MOE))]
    for request in pinned:
        assert engine.add_lora(request) and engine.pin_lora(request.lora_int_id)
    fifth = lora(PLAIN.folder, "fifth")
    assert code(run, llama, [([1, 2], fifth)], greedy(1)) == "slots_pinned"
    prompts = (PLAIN, MOE, PLAIN, MOE)
    outs = run(llama, [(f.prompts[0], r) for f, r in zip(prompts, pinned, strict=True)], greedy(12))
    assert [tokens(o) for o in outs] == [f.greedy[0] for f in prompts]
    engine.remove_lora(pinned[0].lora_int_id)
    more = [lora(PLAIN.folder, f"more-{i}") for i in range(3)]  # one slot for all of them
    outs = run(llama, [(PLAIN.prompts[1], r) for r in more] + [(MOE.prompts[1], pinned[1])],
               greedy(12))  # fmt: skip
    assert [tokens(o) for o in outs] == [PLAIN.greedy[1]] * 3 + [MOE.greedy[1]]
    for request in (*pinned[1:], *more):
        engine.remove_lora(request.lora_int_id)


def test_no_adapter_waits_for_ever(llama):
    """Four slots, and four adapters of which one request follows the other without a gap."""
    engine = llama.llm_engine
    crowd = [lora(fx.folder, f"crowd-{i}") for i, fx in enumerate((PLAIN, MOE, PLAIN, MOE))]
    late = lora(MOE.folder, "late")
    keys: dict[str, LoRARequest] = {}

    def ask(request: LoRARequest, length: int) -> None:
        key = f"{request.lora_name}-{len(keys)}"
        keys[key] = request
        prompt = {"prompt_token_ids": MOE.prompts[0]}
        engine.add_request(key, prompt, greedy(length), lora_request=request)

    for request in (*crowd, late):
        engine.add_lora(request)  # so that none is read while others already run
    left = time.monotonic() + 120
    for request in crowd:
        ask(request, 200)
        ask(request, 100)
    ask(late, 12)
    found = None
    while engine.has_unfinished_requests():
        for out in engine.step():
            if out.finished and keys[out.request_id] is late:
                found = out
            elif out.finished and found is None and time.monotonic() < left:
                ask(keys[out.request_id], 200)
    assert time.monotonic() < left and tokens(found) == MOE.greedy[0]
    for request in (*crowd, late):
        engine.remove_lora(request.lora_int_id)


def hand_over(worker: Any, number: int, folder: str, factor: float) -> None:
    """In a worker, what RL frameworks do: their own request with tensors, to the `_load_adapter`
    that they have put into vLLM's place."""
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    class TensorLoRARequest(LoRARequest, omit_defaults=True, array_like=True):  # type: ignore[call-arg]
        peft_config: dict | None = None
        lora_tensors: dict | None = None

    def load(self: Any, request: Any) -> Any:
        helper = PEFTHelper.from_dict(request.peft_config)
        helper.validate_legal(self.lora_config)
        return self._lora_model_cls.from_lora_tensors(
            request.lora_int_id, request.lora_tensors, helper, "cpu", self.lora_config.lora_dtype
        )

    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    (weights,) = Path(folder).glob("*.safetensors")
    tensors = {n: t * factor if "lora_B" in n else t for n, t in load_file(weights).items()}
    stock, LRUCacheWorkerLoRAManager._load_adapter = LRUCacheWorkerLoRAManager._load_adapter, load
    try:
        worker.remove_lora(number)
        worker.add_lora(
            TensorLoRARequest("rl", number, "memory", peft_config=config, lora_tensors=tensors)
        )
    finally:
        LRUCacheWorkerLoRAManager._load_adapter = stock


def test_a_tool_that_replaces_vllms_loading(llama):
    """It hands new tensors to the workers between requests, which name the adapter as ever: each
    answer is of the newest ones, and of no KV of those before."""
    request = lora(Path("no/folder"), "rl")
    good = lora(MOE.folder, "beside-rl")
    try:
        for factor in (1.0, -0.5, 1.0):
            llama.collective_rpc(hand_over, args=(request.lora_int_id, str(PLAIN.folder), factor))
            adapter = scaled(load_adapter(PLAIN.folder), factor)
            found = last_logprobs(llama, [(LONG, request), (MOE.prompts[1], good)], VOCAB)
            assert worst(found[0], logits("base_llama", adapter, LONG)[-1]) < BOUND
            assert worst(found[1], MOE.logits[1][-1]) < BOUND
            assert cached(llama, request) == 96
    finally:
        llama.llm_engine.remove_lora(request.lora_int_id)
        llama.llm_engine.remove_lora(good.lora_int_id)


def test_a_request_that_the_core_refuses_ends_alone(llama, tmp_path):
    """Another front end had the adapter removed, and its files are gone; this one does not know."""
    shutil.copytree(PLAIN.folder, tmp_path / "gone")
    gone, good = lora(tmp_path / "gone", "gone"), lora(MOE.folder, "good")
    run(llama, [([1, 2], gone)], greedy(1))
    llama.llm_engine.engine_core.remove_lora(gone.lora_int_id)
    shutil.rmtree(tmp_path / "gone")
    assert not Admitted.of(llama.llm_engine).needs_load(gone)
    requests = [(MOE.prompts[0], good), (PLAIN.prompts[0], gone), (PLAIN.prompts[0], None)]
    outs = run(llama, requests, greedy(12))
    assert [o.outputs[0].finish_reason for o in outs] == ["length", "error", "length"]
    refusal = AdapterError.parse(outs[1].outputs[0].stop_reason)
    assert refusal is not None and refusal.code == "not_found"
    assert tokens(outs[0]) == MOE.greedy[0] and tokens(outs[1]) == []
    build_bad("a_nan", tmp_path / "gone")
    assert code(run, llama, [(PLAIN.prompts[0], gone)], greedy(12)) == "not_finite"
    shutil.rmtree(tmp_path / "gone")
    shutil.copytree(PLAIN.folder, tmp_path / "gone")
    assert tokens(run(llama, [(PLAIN.prompts[0], gone)], greedy(12))[0]) == PLAIN.greedy[0]


def room_for(worker: Any, number_of_bytes: int | None) -> int:
    """In a worker: what adapters may take of the host from now on; what one of `PLAIN` takes."""
    residency = worker.model_runner.lora_manager._residency
    residency.limit = residency.limit if number_of_bytes is None else number_of_bytes
    return int(max(held.nbytes for held in residency.all().values()))


def test_a_small_host_evicts_what_no_request_names(llama, tmp_path):
    """Two of four fit: they take turns, read between steps, and one that is gone is refused."""

    def served(request: LoRARequest) -> bool:
        (out,) = run(llama, [(PLAIN.prompts[0], request)], greedy(12))
        return tokens(out) == PLAIN.greedy[0]

    for held in llama.llm_engine.list_loras():
        llama.llm_engine.remove_lora(held)
    requests = []
    for i in range(4):
        shutil.copytree(PLAIN.folder, tmp_path / f"small-{i}")
        requests.append(lora(tmp_path / f"small-{i}", f"small-{i}"))
    run(llama, [([1, 2], requests[0])], greedy(1))
    (size,) = llama.collective_rpc(room_for, args=(None,))
    llama.collective_rpc(room_for, args=(2 * size,))
    try:
        for _ in range(2):
            for request in requests:
                assert served(request)
                assert len(llama.llm_engine.list_loras()) <= 2
        tensors = llama.llm_engine.add_adapter("kept", *content(PLAIN))
        for request in requests:
            run(llama, [([1, 2], request)], greedy(1))
        assert tensors.lora_int_id in llama.llm_engine.list_loras()
        other = llama.llm_engine.add_adapter("kept-too", *content(PLAIN))
        assert code(run, llama, [([1, 2], requests[0])], greedy(1)) == "host_cache_full"
        for request in (tensors, other):
            assert (
                tokens(run(llama, [(PLAIN.prompts[0], request)], greedy(12))[0]) == PLAIN.greedy[0]
            )
            llama.llm_engine.remove_lora(request.lora_int_id)
        shutil.rmtree(tmp_path / "small-0")
        assert code(run, llama, [([1, 2], requests[0])], greedy(1)) == "not_found"
        shutil.copytree(MOE.folder, tmp_path / "small-0")
        assert code(run, llama, [([1, 2], requests[0])], greedy(1)) == "files_changed"
        anew = lora(tmp_path / "small-0", "small-0", requests[0].lora_int_id, inplace=True)
        assert tokens(run(llama, [(MOE.prompts[0], anew)], greedy(12))[0]) == MOE.greedy[0]
        assert (
            tokens(run(llama, [(PLAIN.prompts[0], requests[1])], greedy(12))[0]) == PLAIN.greedy[0]
        )
    finally:
        llama.collective_rpc(room_for, args=(2048 << 20,))
