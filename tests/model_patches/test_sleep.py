"""vLLM's sleep: all that the LoRA layers keep on the device lies under a tag that every level
keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Pool:
    """vLLM's allocator: which tag memory gets, and what is copied to the host."""

    def __init__(self) -> None:
        self.tag: str | None = None
        self.offloaded: tuple[str, ...] = ()

    @contextmanager
    def use_memory_pool(self, tag: str) -> Iterator[None]:
        before, self.tag = self.tag, tag
        try:
            yield
        finally:
            self.tag = before

    def sleep(self, offload_tags: tuple[str, ...]) -> None:
        self.offloaded = offload_tags


class Tags(TorchDispatchMode):
    """The tag under which each piece of memory was allocated, by its address."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self._pool, self.of = pool, dict[int, str | None]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {_address(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = func(*args, **(kwargs or {}))
        for t in tree_leaves(made):
            if isinstance(t, torch.Tensor) and not t.is_meta and _address(t) not in known:
                self.of[_address(t)] = self._pool.tag
        return made


def _address(t: torch.Tensor) -> int:
    return 0 if t.is_meta else t.untyped_storage().data_ptr()


@pytest.fixture
def pool(monkeypatch) -> Pool:
    from vllm_lora_ext.model_patches import sleep

    pool = Pool()
    monkeypatch.setattr(sleep.device_allocator, "get_mem_allocator_instance", lambda: pool)
    return pool


def config(device: str, pooled: bool) -> Any:
    return SimpleNamespace(
        device_config=SimpleNamespace(device_type=device),
        model_config=SimpleNamespace(enable_cumem_allocator=pooled),
    )


def test_the_tag_is_one_that_vllm_keeps_on_every_level(pool) -> None:
    from vllm.device_allocator.sleep_mode_backend import CuMemBackend

    from vllm_lora_ext.model_patches.sleep import kept_asleep

    with kept_asleep(config("cuda", pooled=True)):
        tag = pool.tag
    for level in (1, 2):
        CuMemBackend().suspend(level)
        assert tag in pool.offloaded
    assert "weights" not in pool.offloaded  # where the manager would be without


@pytest.mark.parametrize(("device", "pooled"), [("cpu", True), ("cuda", False)])
def test_engines_that_do_not_sleep_use_no_pool(device, pooled, pool) -> None:
    from vllm_lora_ext.model_patches.sleep import kept_asleep

    with kept_asleep(config(device, pooled)):
        assert pool.tag is None


def tensors(owner: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor of our own objects, by what they hold."""
    if id(owner) in seen:
        return
    seen.add(id(owner))
    if isinstance(owner, torch.Tensor):
        yield owner
    elif isinstance(owner, (list, tuple, set, frozenset)):
        for item in owner:
            yield from tensors(item, seen)
    elif isinstance(owner, dict):
        yield from tensors(list(owner.values()), seen)
    elif type(owner).__module__.startswith("vllm_lora_ext"):
        yield from tensors(list(vars(owner).values()), seen)


def test_all_that_layers_slots_and_steps_hold_is_allocated_under_it(
    harness, pool, monkeypatch
) -> None:
    """With the Triton backend's own buffers, which need no GPU to be allocated."""
    from vllm_lora_ext.kernels.gated_lora.backends import choice
    from vllm_lora_ext.model_patches import manager, worker

    tags = Tags(pool)

    @contextmanager
    def asleep(_config: Any) -> Iterator[None]:
        with pool.use_memory_pool("runtime"):
            yield

    monkeypatch.setattr(worker, "kept_asleep", asleep)
    monkeypatch.setattr(manager, "choose_backend", lambda *_: choice.triton())
    monkeypatch.setattr(manager.RoutedLoRAModelManager, "_warm", lambda *_: None)
    with tags:
        made = harness(settings={"max_router_rows": 8}).manager
    held = {
        "layers": [getattr(layer, "site", None) for layer in made.modules.values()],
        "stacks": [(layer.lora_a_stacked, layer.lora_b_stacked) for layer in made.modules.values()],
        "blocks": [block.site for block in made.blocks.values()],
        "steps": [wrapper.step_map for wrapper in made.punica_wrapper_mapping.values()],
    }  # fmt: skip
    for kind, owners in held.items():
        found = [t for t in tensors(owners, set()) if not t.is_meta and t.numel()]
        assert found or kind == "blocks", kind
        # What numpy has allocated is a copy only where there is a device.
        wrong = [t for t in found if t.dim() and tags.of.get(_address(t), "runtime") != "runtime"]
        assert not wrong, (kind, [(t.shape, t.dtype) for t in wrong])
