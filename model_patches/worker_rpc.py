"""What the engine core asks of every worker about adapters.

Target: `WorkerBase`, which gets methods; `collective_rpc` finds them by name on every executor. An
error is an answer and never raised: with several workers, vLLM stops reading answers at the
first that failed, and takes what is left of them for those of the next call.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.v1.worker.worker_base import WorkerBase

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.gate_pass import FINISH
from vllm_lora_ext.model_patches.ledger import LOAD, VERSIONS
from vllm_lora_ext.model_patches.loading import FORGET, PREPARE, PREPARED
from vllm_lora_ext.model_patches.traffic import STATS

logger = init_logger(f"vllm.{__name__}")


def _load(self: Any, request: LoRARequest, source: Any, in_use: frozenset[int]) -> Any:
    """The manager's report, or the text of the error."""
    try:
        return self.model_runner.lora_manager.load(request, source, in_use)
    except AdapterError as error:
        return str(error)
    except Exception as error:
        logger.exception("Loading LoRA adapter %r failed", request.lora_name)
        return str(_failed(error))


def _failed(error: Exception) -> AdapterError:
    """Without the error's own text, which may name files that are no client's business."""
    return AdapterError(
        "load_failed", f"the adapter could not be loaded: {type(error).__name__}",
        fix="see the server's log",
    )  # fmt: skip


def _versions(self: Any) -> dict[int, Any]:
    """Reports of everything that this worker holds."""
    return self.model_runner.lora_manager.versions()


def _stats(self: Any) -> dict[str, Any]:
    """`Stats` of this worker."""
    return asdict(self.model_runner.lora_manager.stats())


def _prepare(self: Any, request: LoRARequest, source: Any) -> None:
    """Begins to read an adapter; what goes wrong there, `_load` answers."""
    self.model_runner.lora_manager.prepare(request, source)


def _prepared(self: Any, lora_id: int) -> bool:
    """Whether `_load` would have nothing to wait for."""
    return self.model_runner.lora_manager.prepared(lora_id)


def _forget(self: Any, lora_id: int) -> None:
    """Ends what `_prepare` began, and `_load` will not take."""
    self.model_runner.lora_manager.forget(lora_id)


def _finish_gate(self: Any, request_id: str) -> dict[str, Any]:
    """The gate of an instruction that went through the model, None where it is not computed; or
    the text of the error."""
    try:
        return {"gate": self.model_runner.lora_manager.finish_gate(request_id)}
    except AdapterError as error:
        return {"error": str(error)}
    except Exception as error:
        logger.exception("The gate of an instruction failed")
        return {"error": str(_failed(error))}


def apply() -> None:
    """Gives the worker its methods."""
    for name, method in (
        (LOAD, _load), (VERSIONS, _versions), (STATS, _stats),
        (PREPARE, _prepare), (PREPARED, _prepared), (FORGET, _forget),
        (FINISH, _finish_gate),
    ):  # fmt: skip
        setattr(WorkerBase, name, method)
