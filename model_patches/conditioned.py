"""What the engine core does about what a request says: completes it, checks it, keys its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vllm_lora_ext.conditions.column import Column
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.block_keys import BlockKeys, is_plain, salted
from vllm_lora_ext.model_patches.held import Held, incomplete
from vllm_lora_ext.model_patches.plan import Plan, attach, plan_of

Key = str | BlockKeys
# Connectors that know a block by vLLM's own key, or hand over one request's blocks and keep none.
_KEYED = frozenset({
    "OffloadingConnector", "SimpleCPUOffloadConnector", "MooncakeStoreConnector",
    "HF3FSKVConnector", "NixlConnector", "NixlPullConnector", "NixlPushConnector",
    "MooncakeConnector", "P2pNcclConnector",
})  # fmt: skip
_OURS = "_lora_ext_attached"


class Conditions:
    """Of one engine core.

    Args:
        vllm_config: its configuration.
    """

    def __init__(self, vllm_config: Any) -> None:
        self._most = vllm_config.model_config.max_model_len
        transfer = vllm_config.kv_transfer_config
        self._connector = getattr(transfer, "kv_connector", None)
        # Then workers know of answers only where their tokens stand at most (`rows.Span`).
        self._ahead = (
            vllm_config.speculative_config is not None
            and vllm_config.scheduler_config.async_scheduling
        )

    def complete(self, request: Any, held: Held, sent: bool) -> None:
        """Gives a request the adapter's own columns if it says nothing of columns.

        Args:
            request: vLLM's `Request`; sent: whether workers have it already.
        Raises:
            AdapterError: `missing_setting`, the adapter is a template; `adapter_changed`, what the
                request says is for other columns; `unsupported_feature`.
        """
        if not held.parts:
            raise incomplete(held.name, held.understands)
        own = held.parts[0].columns if len(held.parts) == 1 and not held.parts[0].by_row else ()
        plan = plan_of(request)
        if plan is None or hasattr(request, _OURS):
            before = plan.columns if plan is not None else ()
            if before != own and not sent:
                setattr(request, _OURS, True)
                attach(request, own)
                plan = plan_of(request)
        plan = plan or Plan(())
        _check_fits(plan.columns, held)
        if plan.columns or any(part.frozen for part in held.parts):
            self._check_served(request, plan.columns)

    def _check_served(self, request: Any, columns: Sequence[Column]) -> None:
        if self._connector is not None and self._connector not in _KEYED:
            raise AdapterError(
                "unsupported_feature", "what the request's adapter adds differs by token, and the"
                " server's KV connector is not known to tell such blocks apart",
                seen=self._connector, limit=", ".join(sorted(_KEYED)),
                fix="start without it, or with one of these",
            )  # fmt: skip
        if request.resumable:
            raise AdapterError(
                "unsupported_feature", "what the request's adapter adds differs by token, and the"
                " prompt of a streaming session does not stay what it is",
                fix="send the whole prompt at once",
            )  # fmt: skip
        spans = [span for column in columns for span in column.spans or ()]
        late = [
            b for span in spans for b in span if b is not None and b > request.num_prompt_tokens
        ]
        if self._ahead and late:
            raise AdapterError(
                "unsupported_feature", "a span begins or ends in the answer, whose positions this"
                " engine does not know in time", seen=late[0],
                limit=f"{request.num_prompt_tokens}, where the prompt ends, or null",
                fix="start without speculative decoding, or with --no-async-scheduling",
            )  # fmt: skip

    def key(self, request: Any, held: Held, salt: str = "") -> Key:
        """What the request's blocks are known by.

        Args:
            salt: makes it a key that no other request has.
        """
        parts = salted(held.parts, salt) if salt else held.parts
        if is_plain(parts):
            return parts[0].version
        return BlockKeys(parts, plan_of(request) or Plan(()), request, self._most)

    def early_key(self, request: Any, held: Held) -> Key | None:
        """The same of a request that is not complete yet; None when it cannot be said."""
        if not held.parts:
            return None
        if is_plain(held.parts):
            return held.parts[0].version
        try:
            plan = plan_of(request)
            if plan is None:
                plan = Plan(tuple(c for part in held.parts for c in part.columns))
            _check_fits(plan.columns, held)
        except AdapterError:  # `complete` says so
            return None
        return BlockKeys(held.parts, plan, request, self._most)


def _check_fits(columns: Sequence[Column], held: Held) -> None:
    """Raises AdapterError `adapter_changed`."""
    if sum(part.width for part in held.parts) != len(columns):
        raise _changed(held)
    left = iter(columns)
    for part in held.parts:
        if part.by_row:
            next(left)
        for own in part.columns:
            said = next(left)
            if (replace(said, scale=own.scale) if own.expert else said) != own:
                raise _changed(held)


def _changed(held: Held) -> AdapterError:
    return AdapterError(
        "adapter_changed", "what the request says was made for another content of the adapter",
        seen=held.name, fix="send the request again",
    )  # fmt: skip
