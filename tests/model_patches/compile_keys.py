"""Where an engine of these flags keeps its compiled code, and whether it finds it again.

    python compile_keys.py

Run by `test_identity` in an environment of its own; prints JSON: with the plugin, and as if it were
not installed. The configuration is the engine's
own, the model is one layer. Stock on a CPU compiles nothing under LoRA; the mode is put back, since
a key that only stock and the plugin on a GPU share must differ as well.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from vllm.compilation.counter import compilation_counter
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs

LAYERS = 5
BASE = Path(__file__).parents[1] / "fixtures" / "bases" / "base_llama"


@support_torch_compile(dynamic_arg_dims={"x": 0})
class Tiny(torch.nn.Module):
    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.weight) * x.shape[0]


def start(mode: CompilationMode, lora: bool, weight: float = 1.0, backend: str = "eager") -> Any:
    """A configuration and its compiled model, which has run once."""
    config = EngineArgs(
        model=str(BASE), skip_tokenizer_init=True, dtype="float32", max_model_len=64,
        max_num_batched_tokens=64, block_size=32, enable_lora=lora, max_lora_rank=8,
    ).create_engine_config()  # fmt: skip
    config.compilation_config.mode = mode
    config.compilation_config.backend = backend
    config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    config.compilation_config.compile_sizes = []
    with set_current_vllm_config(config), torch.inference_mode():
        model = Tiny(vllm_config=config)
        model.weight.mul_(weight)
        model(torch.ones(32, 8))
    return config, model


def keys(lora: bool) -> list[str]:
    """The folders that vLLM made for such an engine: as it is by default, and without artefacts."""
    found = []
    for aot, mode in (
        ("1", CompilationMode.DYNAMO_TRACE_ONCE),
        ("0", CompilationMode.VLLM_COMPILE),
    ):
        os.environ["VLLM_USE_AOT_COMPILE"] = aot
        torch._dynamo.reset()
        config, _ = start(mode, lora)
        found.append(str(config.compilation_config.local_cache_dir))
    os.environ["VLLM_USE_AOT_COMPILE"] = "1"
    return found


def warm(lora: bool) -> dict[str, Any]:
    """Two starts with torch's backend, the second on other weights: what it loaded and answers."""
    before = compilation_counter.num_aot_artifacts_loaded, compilation_counter.num_aot_compiles
    for weight in (1.0, 0.5):
        torch._dynamo.reset()
        _, model = start(CompilationMode.DYNAMO_TRACE_ONCE, lora, weight, "inductor")
    with torch.inference_mode():
        answers = {rows: model(torch.ones(rows, 8)) for rows in (1, 2, 7)}
        wanted = {rows: model.forward(torch.ones(rows, 8)) for rows in answers}
    return {
        "loaded": compilation_counter.num_aot_artifacts_loaded - before[0],
        "compiled": compilation_counter.num_aot_compiles - before[1],
        "right": all(torch.allclose(answers[rows], wanted[rows]) for rows in answers),
    }


def pieces() -> dict[str, int]:
    """A Llama of many layers with LoRA around all of them, through vLLM's piecewise backend."""
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
    from vllm.forward_context import set_forward_context

    FixFunctionalizationPass.__call__ = lambda *_: None  # asks for operators that a CPU has not
    sys.path.append(str(Path(__file__).parents[2]))  # not before: it has a folder `kernels`
    from tests.model_patches.conftest import make_harness

    os.environ["VLLM_USE_AOT_COMPILE"] = "0"
    torch._dynamo.reset()
    before = compilation_counter.clone()
    compiled = {"mode": CompilationMode.VLLM_COMPILE, "backend": "inductor",
                "cudagraph_mode": CUDAGraphMode.NONE, "compile_sizes": [],
                "splitting_ops": list(CompilationConfig._attention_ops)}  # fmt: skip
    options = {"hf_overrides": {"num_hidden_layers": LAYERS}, "enforce_eager": False,
               "max_num_batched_tokens": 64}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        h = make_harness(Path(folder), {}, options, compilation=compiled)
        ids_T = torch.arange(32)
        with (
            set_current_vllm_config(h.config), set_forward_context(None, h.config, num_tokens=32),
            torch.inference_mode(),
        ):  # fmt: skip
            h.model(input_ids=ids_T, positions=ids_T)
    os.environ["VLLM_USE_AOT_COMPILE"] = "1"
    names = {"layers": "num_piecewise_capturable_graphs_seen", "asked": "num_backend_compilations",
             "compiled": "num_cache_entries_updated"}  # fmt: skip
    return {
        name: getattr(compilation_counter, own) - getattr(before, own)
        for name, own in names.items()
    }


def told(plugin: bool) -> dict[str, Any]:
    if not plugin:
        os.environ["VLLM_LORA_EXT_DISABLE"] = "1"
    found: dict[str, Any] = {"lora": keys(True), "base": keys(False)}
    found["plugin"] = "vllm_lora_ext.model_patches.register" in sys.modules
    if plugin:
        from vllm_lora_ext.model_patches import identity

        found |= {"warm lora": warm(True), "warm base": warm(False), "pieces": pieces()}
        known = identity.plugin_identity()
        identity.plugin_identity = lambda: f"{known} and a changed source"
        found |= {"changed lora": keys(True), "changed base": keys(False)}
    return found


def main() -> None:
    """Each in a fork of its own: the imports, which are most of the time, once."""
    found = {}
    for name, plugin in (("plugin", True), ("stock", False)):
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as fork:
            found[name] = fork.submit(told, plugin).result()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
