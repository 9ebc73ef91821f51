"""How front ends take the steps that `request_says` names: by calls of the engine core."""

from __future__ import annotations

from typing import Any

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches import metrics
from vllm_lora_ext.model_patches.admitted import Admitted
from vllm_lora_ext.model_patches.core import ADD
from vllm_lora_ext.model_patches.gate_pass import GATE
from vllm_lora_ext.model_patches.request_says import AskGate, Load, Steps, T


def run(engine: Any, steps: Steps[T]) -> T:
    """Takes the steps of an `LLMEngine`.

    Raises:
        AdapterError: whatever ends the steps.
    """
    client = engine.engine_core
    core = getattr(client, "engine_core", None)  # an engine in this process
    try:
        step = next(steps)
        while True:
            method, *args = _call(step)
            reply = getattr(core, method)(*args) if core else client.call_utility(method, *args)
            step = _go_on(engine, steps, step, reply)
    except StopIteration as done:
        result: T = done.value
        return result


async def run_async(engine: Any, steps: Steps[T]) -> T:
    """The same of an `AsyncLLM`."""
    try:
        step = next(steps)
        while True:
            reply = await engine.engine_core.call_utility_async(*_call(step))
            step = _go_on(engine, steps, step, reply)
    except StopIteration as done:
        result: T = done.value
        return result


def _call(step: Load | AskGate) -> tuple[Any, ...]:
    if isinstance(step, Load):
        return ADD, step.lora, step.source
    return GATE, step.lora, step.version, list(step.ids)


def _go_on(
    engine: Any, steps: Steps[Any], step: Load | AskGate, reply: dict[str, Any]
) -> Load | AskGate:
    """The next step, after the core's reply to one."""
    if "error" in reply:
        error = AdapterError.parse(reply["error"])
        assert error is not None
        return steps.throw(error)
    if isinstance(step, AskGate):
        if reply["computed"]:
            metrics.gate_passed()
        return steps.send(reply["gate"])
    metrics.made(step.lora.lora_int_id)
    metrics.evicted(Admitted.of(engine).loaded(step.lora, reply))
    return steps.send(None)
