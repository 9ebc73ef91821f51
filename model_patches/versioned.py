"""Every output says which version of its adapter gave it.

Target: `RequestState`, which makes a request's outputs: each gets `adapter_version`, the digest of
the adapter's content (of a derived adapter, of all that it is made of), None for the base model.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.v1.engine.output_processor import RequestState

from vllm_lora_ext.model_patches.plan import promised

_VERSION = "_lora_ext_version"


def apply() -> None:
    """Wraps what takes a request and what makes its outputs."""
    from_new, new_output = RequestState.from_new_request, RequestState._new_request_output

    @functools.wraps(from_new)
    def new_from_new(cls: Any, tokenizer: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        state = from_new.__func__(cls, tokenizer, request, *args, **kwargs)
        setattr(state, _VERSION, promised(request))
        return state

    @functools.wraps(new_output)
    def new_new_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = new_output(self, *args, **kwargs)
        output.adapter_version = getattr(self, _VERSION, None)
        return output

    RequestState.from_new_request = classmethod(new_from_new)
    RequestState._new_request_output = new_new_output
