"""What RL frameworks do to vLLM between two steps, call by call (docs/rl.md).

The functions are the frameworks' own, cut to what they do here; `make rl-frameworks` runs the
originals. Rollouts must come from the weights of the last sync, by every way to hand them over.
"""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from integration_tests.engines import greedy, last_logprobs, recorded, run, worst
from integration_tests.reference_model import logits
from vllm_lora_ext.adapters.memory import MemorySource, load_memory_adapter

pytestmark = pytest.mark.engine
BOUND, VOCAB = 2e-3, 512
PLAIN = recorded("plain-a")
PROMPT = [(5 * t + 1) % VOCAB for t in range(3 * 32 + 9)]  # three blocks and some tokens
NAME, NUMBER, PATH = "123", 7123, "simon_lora_path"  # verl, but for the number: others count here


class TensorLoRARequest(LoRARequest, array_like=True):  # type: ignore[call-arg]
    peft_config: dict[str, Any] | None = None
    lora_tensors: dict[str, torch.Tensor] | None = None


def load_adapter(self: Any, request: Any) -> Any:
    """verl's `hijack__load_adapter`, ms-swift's `patched_load_adapter`: the branch of tensors."""
    from vllm.lora.peft_helper import PEFTHelper

    helper = PEFTHelper.from_dict(request.peft_config)
    helper.validate_legal(self.lora_config)
    mapper = getattr(self._adapter_manager.model, "hf_to_vllm_mapper", None)
    return self._lora_model_cls.from_lora_tensors(
        tensors=request.lora_tensors, peft_helper=helper, lora_model_id=request.lora_int_id,
        device="cpu", dtype=self.lora_config.lora_dtype,
        weights_mapper=mapper and mapper.get_rename_mapper(), model_vocab_size=self.vocab_size,
    )  # fmt: skip


def sync(worker: Any, step: int) -> None:
    """In a worker: verl's `update_weights_from_ipc` (ms-swift's `update_adapter_param`)."""
    LRUCacheWorkerLoRAManager._load_adapter = load_adapter
    config, tensors = weights(step)  # theirs come over a channel of their own
    worker.remove_lora(NUMBER)
    request = TensorLoRARequest(NAME, NUMBER, PATH, peft_config=config, lora_tensors=tensors)
    assert worker.add_lora(request)


def leave(worker: Any) -> None:
    """In a worker: as it was before."""
    from vllm.lora.worker_manager import WorkerLoRAManager

    LRUCacheWorkerLoRAManager._load_adapter = WorkerLoRAManager._load_adapter
    worker.remove_lora(NUMBER)


def weights(step: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config and tensors after a step of training."""
    config = json.loads((PLAIN.folder / "adapter_config.json").read_text())
    tensors = load_file(PLAIN.folder / "adapter_model.safetensors")
    return config, {name: t * (1 + step / 2) for name, t in tensors.items()}


def wanted(step: int) -> torch.Tensor:
    config, tensors = weights(step)
    adapter = load_memory_adapter(MemorySource.of(tensors, config))
    return logits("base_llama", adapter, PROMPT)[-1]


def rollout(llm: Any) -> tuple[torch.Tensor, str]:
    """As verl's server asks: log-probabilities after the prompt, and the version."""
    assert NUMBER in llm.llm_engine.list_loras(), "verl would ask the base model"
    request = LoRARequest(NAME, NUMBER, PATH)
    (output,) = run(llm, [(PROMPT, request)], greedy(1))
    return last_logprobs(llm, [(PROMPT, request)], VOCAB)[0], output.adapter_version


def test_verl_and_ms_swift_hand_tensors_to_the_workers(llama: Any) -> None:
    """Behind the engine's back, and without clearing the prefix cache."""
    versions = []
    try:
        for step in (0, 1, 2, 0):
            llama.collective_rpc(sync, args=(step,))
            got, version = rollout(llama)
            assert worst(got, wanted(step)) < BOUND
            versions.append(version)
    finally:
        llama.collective_rpc(leave)
    assert versions[0] == versions[3] and len(set(versions)) == 3
    assert NUMBER not in llama.llm_engine.list_loras()


def test_skyrl_replaces_a_folder_in_place(llama: Any, tmp_path: Any) -> None:
    """Its route: `add_lora` with `load_inplace`, then requests without it."""
    from safetensors.torch import save_file

    versions = []
    for step in (0, 1):
        config, tensors = weights(step)
        shutil.rmtree(tmp_path / "sync", ignore_errors=True)
        (tmp_path / "sync").mkdir()
        save_file(tensors, tmp_path / "sync/adapter_model.safetensors")
        (tmp_path / "sync/adapter_config.json").write_text(json.dumps(config))
        request = LoRARequest("skyrl-lora", 7124, str(tmp_path / "sync"), load_inplace=True)
        assert llama.llm_engine.add_lora(request)
        request.load_inplace = False
        assert worst(last_logprobs(llama, [(PROMPT, request)], VOCAB)[0], wanted(step)) < BOUND
        versions.append(run(llama, [(PROMPT, request)], greedy(1))[0].adapter_version)
    assert versions[0] != versions[1]
    assert llama.llm_engine.remove_lora(7124)
