"""How front ends take the steps of `request_steps`: by calls of the engine core."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches import data_parallel, metrics
from vllm_lora_ext.model_patches.admitted import Admitted
from vllm_lora_ext.model_patches.core_calls import ADD, ROLL_BACK
from vllm_lora_ext.model_patches.gate_pass import GATE
from vllm_lora_ext.model_patches.request_steps import AskGate, Load, RollBack, Step, Steps, T


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
            began = time.monotonic()
            reply = getattr(core, method)(*args) if core else client.call_utility(method, *args)
            step = _go_on(engine, steps, step, reply, began)
    except StopIteration as done:
        result: T = done.value
        return result


async def run_async(engine: Any, steps: Steps[T]) -> T:
    """The same of an `AsyncLLM`."""
    try:
        step = next(steps)
        while True:
            began = time.monotonic()
            method, lora, *args = _call(step)
            asked = data_parallel.first if isinstance(step, AskGate) else data_parallel.change
            reply = await asked(engine.engine_core, method, lora, *args)
            step = _go_on(engine, steps, step, reply, began)
    except StopIteration as done:
        result: T = done.value
        return result


def _call(step: Step) -> tuple[Any, ...]:
    if isinstance(step, Load):
        return ADD, step.lora, step.source, step.expected
    if isinstance(step, RollBack):
        return ROLL_BACK, step.lora, step.version, step.expected
    return GATE, step.lora, step.version, list(step.ids)


def _go_on(engine: Any, steps: Steps[Any], step: Step, reply: dict[str, Any], began: float) -> Step:
    """The next step, after the core's reply to one."""
    if "error" in reply:
        error = AdapterError.parse(reply["error"])
        assert error is not None
        return steps.throw(error)
    if isinstance(step, AskGate):
        if reply["computed"]:
            metrics.gate_passed()
        return steps.send(reply["gate"])
    lora = msgspec.structs.replace(step.lora, lora_path=reply["path"])
    Admitted.of(engine).loaded(lora, reply)
    if reply["read"]:
        metrics.made(step.lora.lora_int_id, time.monotonic() - began)
    return steps.send(reply["path"])
