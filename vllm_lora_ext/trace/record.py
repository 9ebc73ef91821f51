"""A trace without an engine: the adapter in a transformers model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vllm_lora_ext.adapters.hf import AppliedAdapter, apply_adapter
from vllm_lora_ext.adapters.model import MixBlock, RoutedAdapter, RoutedModule
from vllm_lora_ext.routing.mix import expert_weights
from vllm_lora_ext.trace.data import Trace, natural
from vllm_lora_ext.trace.gates import slice_gates


def record(
    model: nn.Module,
    adapter: RoutedAdapter,
    token_ids: Sequence[int],
    new_tokens: int = 0,
    name: str = "",
) -> Trace:
    """Runs an adapter on its base model and keeps what its gates decide.

    Args:
        model: a transformers causal language model, in float32 to be comparable.
        token_ids: the prompt, at least one token.
        new_tokens: tokens to go on with, the likeliest each time, up to the one that ends the
            text. The last of them is not run through the model, so the trace holds one less.
        name: the adapter's, for the trace; by default its folder.
    Returns:
        Every routed layer and block; none of them for a plain LoRA.
    Raises:
        AdapterError: the adapter does not fit the model (`adapters.hf.apply_adapter`).
    """
    found: dict[str, torch.Tensor] = {}
    ids = [int(token) for token in token_ids]
    owners: dict[str, RoutedModule | MixBlock] = {**adapter.modules, **adapter.blocks}
    handles = []
    applying = apply_adapter(model, adapter, prompt_length=len(ids))
    with torch.inference_mode(), applying as applied:
        for _ in range(new_tokens - 1):
            token = int(_run(model, ids)[-1].argmax())
            if token in _ends(model):
                break
            ids.append(token)
        try:
            for key in sorted(owners, key=natural):
                owner = owners[key]
                if owner.gate.source != "none":
                    hook = _hook(found, key, owner, applied)
                    handles.append(model.get_submodule(key).register_forward_hook(hook))
            _run(model, ids)
        finally:
            for handle in handles:
                handle.remove()
    base = getattr(getattr(model, "config", None), "name_or_path", "")
    return Trace(
        ids, {key: found[key] for key in sorted(found, key=natural)}, len(token_ids),
        adapter=name or adapter.source, system=adapter.system, base=str(base or ""),
    )  # fmt: skip


def _run(model: Any, ids: list[int]) -> torch.Tensor:
    device = next(model.parameters()).device
    logits_TV: torch.Tensor = model(torch.tensor([ids], device=device)).logits[0]
    return logits_TV


def _ends(model: Any) -> list[int]:
    end: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return end if isinstance(end, list) else [end]


def _hook(
    found: dict[str, torch.Tensor],
    key: str,
    owner: RoutedModule | MixBlock,
    applied: AppliedAdapter,
) -> Any:
    def keep(layer: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if applied.away:
            return
        # In the adapter's own place: what it is must not depend on where the model runs.
        device = _device(owner)
        x_TK = args[0].reshape(-1, args[0].shape[-1]).float().to(device)
        if isinstance(owner, MixBlock):
            gates_TE = expert_weights(owner.gate, x_TK @ owner.router_GK.float().t())
        else:
            rows_TG = applied.rows_of(owner)
            gates_TE = slice_gates(owner, x_TK, None if rows_TG is None else rows_TG.to(device))
        found[key] = gates_TE.cpu()

    return keep


def _device(owner: RoutedModule | MixBlock) -> torch.device:
    return owner.router_GK.device if isinstance(owner, MixBlock) else owner.a_RK.device
