"""vLLM's example of a KV connector, its files named by the request's block hashes.

The example names them by tokens alone, which is wrong for any LoRA; real connectors use the hashes
that vLLM's prefix cache has. In the scheduler's process only those are known, so they travel in the
place of what tells images apart.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import (
    ExampleConnector,
    ExampleConnectorMetadata,
    align_to_block_size,
)


class HashedConnector(ExampleConnector):
    """Attributes:
    taken: tokens that came from files.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._keys: dict[str, str] = {}
        self.taken = 0

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> Any:
        blocks = align_to_block_size(len(request.prompt_token_ids) - 1, self._block_size)
        count = blocks // self._block_size
        self._keys[request.request_id] = request.block_hashes[count - 1].hex() if count else "none"
        if blocks <= num_computed_tokens:
            return 0, False
        return super().get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self.taken += num_external_tokens
        super().update_state_after_alloc(request, blocks, num_external_tokens)

    def _found_match_for_request(self, request: Any) -> bool:
        key = self._keys[request.request_id]
        return self._found_match_for_prompt(list(request.prompt_token_ids), [key])

    def build_connector_meta(self, scheduler_output: Any) -> ExampleConnectorMetadata:
        meta = ExampleConnectorMetadata()
        for new in scheduler_output.scheduled_new_reqs:
            ids, key = list(new.prompt_token_ids), self._keys.pop(new.req_id)
            found = new.req_id in self._requests_need_load
            if found or not self._found_match_for_prompt(ids, [key]):
                meta.add_request(ids, new.block_ids[0], self._block_size, not found, [key])
        self._requests_need_load.clear()
        return meta
