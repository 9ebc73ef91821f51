"""What the ranks of a tensor-parallel group tell each other when an adapter is loaded.

Target: none of vLLM's names. The executor has every worker load at once (`ledger`), and a load may
need a sum over the ranks (`dora`). One rank may fail where others do not, so before any sum every
rank says what it has, whatever that is: none waits for one that has given up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from vllm.distributed.parallel_state import get_tp_group

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.dora import finish_all
from vllm_lora_ext.model_patches.residency import Resident


def with_ranks(read: Callable[[], Resident], modules: Mapping[str, Any]) -> Resident:
    """What this rank has read, with the sums that it needs.

    Every rank calls it once in every load. It costs a message of some bytes, on the host.

    Args:
        read: gives this rank's form, or raises.
        modules: name → LoRA layer.
    Raises:
        AdapterError: `ranks_differ`, others have not read the same; those of `dora.finish`; and
            whatever `read` raises.
    """
    group = get_tp_group()
    if group.world_size == 1:
        return read()
    new: Resident | None = None
    failure: Exception | None = None
    try:
        new = read()
    except Exception as error:
        failure = error
    norms = {} if new is None or new.host is None else new.host.norms
    mine = (new.version if new else None, sorted(norms))
    every: list[Any] = [None] * group.world_size
    torch.distributed.all_gather_object(every, mine, group=group.cpu_group)
    if new is None:
        assert failure is not None
        raise failure
    if norms and any(other != mine for other in every):
        raise AdapterError(
            "ranks_differ", "the workers have not all read the same adapter, and DoRA's norms are"
            " sums over them", seen=[version for version, _ in every],
            fix="see what the other workers say; give every machine the same files",
        )  # fmt: skip
    if norms and new.host is not None:
        sums_N = torch.cat([norms[name] for name in mine[1]])
        torch.distributed.all_reduce(sums_N, group=group.cpu_group)
        parts = sums_N.split([len(norms[name]) for name in mine[1]])
        finish_all(modules, new.host.sites, dict(zip(mine[1], parts, strict=True)))
        norms.clear()
    return new
