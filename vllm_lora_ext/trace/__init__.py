"""What the router did: which experts ran for every token, and with what weight.

trace = record(model, adapter, token_ids)          # transformers
trace = fetch(llm, output.request_id)              # a vLLM engine with the setting `trace`
picture(trace, "trace.png")
"""

from vllm_lora_ext.trace.data import Trace, Usage
from vllm_lora_ext.trace.fetch import EXTRA_ARG, fetch, read_answers, wanted
from vllm_lora_ext.trace.picture import picture
from vllm_lora_ext.trace.record import record
from vllm_lora_ext.trace.store import TraceStore

__all__ = [
    "EXTRA_ARG", "Trace", "TraceStore", "Usage", "fetch", "picture", "read_answers", "record",
    "wanted",
]  # fmt: skip
