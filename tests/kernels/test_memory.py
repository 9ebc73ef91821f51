"""`slot_bytes` is what sites really allocate for one slot more."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from vllm_lora_ext.kernels.gated_lora import Site
from vllm_lora_ext.kernels.gated_lora.backends import choice
from vllm_lora_ext.kernels.gated_lora.memory import slot_bytes


def tensors(value: object) -> Iterator[torch.Tensor]:
    """Every tensor below a site, its tables among them."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from tensors(one)
    elif hasattr(value, "__dict__") and not isinstance(value, (type, ModuleType)):
        for one in vars(value).values():
            yield from tensors(one)


def allocated(site: Site) -> int:
    stores = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(site)}
    return sum(stores.values())


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("sizes", [(24,), (64, 32, 32), (96, 96)])
@pytest.mark.parametrize(("rank", "rows"), [(8, 1), (64, 64), (16, 100)])
def test_equals_what_a_site_allocates(sizes, rank, rows, dtype, on_cpu):
    """With the kernels' tables, as on a GPU, and without, as on a CPU."""
    backend = choice.without_triton("cpu") if on_cpu else choice.triton()
    few, more = (Site(n, 40, sizes, rank, rows, dtype, "cpu", backend) for n in (2, 5))
    for routers in (0, rows, len(sizes) * (rows + 1)):
        few.reserve_routers(routers), more.reserve_routers(routers)
        per_slot = (allocated(more) - allocated(few)) / 3
        assert per_slot == slot_bytes(40, sizes, rank, routers, dtype, on_cpu)
