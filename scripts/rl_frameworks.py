"""The frameworks' own code against an engine with the plugin (docs/rl.md).

    python scripts/rl_frameworks.py          # what `make rl-frameworks` runs, minutes

Gets the source distributions of TRL, verl, ms-swift and SkyRL from PyPI, takes the functions that
hand an adapter to vLLM out of them, and calls each as its framework does, on a tiny model. Every
rollout's log-probabilities must be those of the weights of the last sync. The frameworks themselves
are not installed: they want GPUs, and other versions of nearly everything.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import json
import logging
import os
import subprocess
import sys
import tarfile
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
VERSIONS = {"trl": "1.16.0", "verl": "0.9.1", "ms-swift": "4.6.0", "skyrl": "0.3.0"}
STEPS = (0, 1, 2)
EXPECTED_MISFITS = 1  # verl as it is: vLLM 0.32 has no WeightsMapper.get_unstacked_mapper


def sources(cache: Path) -> dict[str, Path]:
    """The unpacked source distribution of each framework."""
    found = {}
    for name, version in VERSIONS.items():
        stem = f"{name.replace('-', '_')}-{version}"
        if not (cache / stem).is_dir():
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                "--no-binary",
                ":all:",
                "--no-build-isolation",
                "-d",
                str(cache),
                f"{name}=={version}",
            ]
            subprocess.run(command, check=True)  # fmt: skip
            with tarfile.open(cache / f"{stem}.tar.gz") as archive:
                archive.extractall(cache, filter="data")
        found[name] = cache / stem
    return found


def taken(file: Path, *names: str, **namespace: Any) -> types.SimpleNamespace:
    """Functions, classes and constants of a file, run without the rest of it."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = sorted((n for n in ast.walk(tree) if _name(n) in names), key=lambda n: n.lineno)
    wanted = list({_name(node): node for node in reversed(nodes)}.values())[::-1]  # the first each
    for node in wanted:
        if hasattr(node, "decorator_list"):
            node.decorator_list = [d for d in node.decorator_list if _is_plain(d)]
    module: Any = ast.Module(wanted, [])
    exec(compile(module, str(file), "exec"), namespace)
    return types.SimpleNamespace(**{name: namespace[name] for name in names})


def _name(node: ast.AST) -> str:
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return getattr(node, "name", "") if isinstance(node, ast.stmt) else ""


def _is_plain(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Name)  # @staticmethod; not @app.post(...)


def in_process() -> Any:
    """A tiny engine in this process, as colocated trainers have it."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from integration_tests.engines import make_engine

    try:
        return make_engine("base_llama", enforce_eager=True)
    finally:
        del os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"]


def follows(llm: Any, sync: Callable[[int], None], name: str, number: int, path: str) -> None:
    """Rollouts after each sync; raises AssertionError when they are not of its weights."""
    from vllm.lora.request import LoRARequest

    from integration_tests.engines import last_logprobs, worst
    from integration_tests.test_rl import BOUND, PROMPT, VOCAB, wanted

    for step in STEPS:
        sync(step)
        assert number in llm.llm_engine.list_loras(), "the framework would ask the base model"
        (got,) = last_logprobs(llm, [(PROMPT, LoRARequest(name, number, path))], VOCAB)
        assert worst(got, wanted(step)) < BOUND, f"step {step}: not the weights of the last sync"


def verl(root: Path, llm: Any, shim: bool) -> None:
    """`VLLMHijack`, and `update_weights_from_ipc`'s `remove_lora` and `_update_weights`."""
    from integration_tests.test_rl import weights

    third = types.ModuleType("verl.third_party.vllm")
    third.get_version = lambda pkg: __import__("vllm").__version__  # type: ignore[attr-defined]
    packages = {name: types.ModuleType(name) for name in ("verl", "verl.third_party")}
    sys.modules |= packages | {"verl.third_party.vllm": third}
    hijack: dict[str, Any] = {}
    text = (root / "verl/utils/vllm/utils.py").read_text(encoding="utf-8")
    exec(compile(text, "verl/utils/vllm/utils.py", "exec"), hijack)
    worker_side = taken(
        root / "verl/workers/rollout/vllm_rollout/utils.py",
        "VLLM_LORA_INT_ID", "VLLM_LORA_NAME", "VLLM_LORA_PATH", "_update_weights",
        TensorLoRARequest=hijack["TensorLoRARequest"], logger=logging.getLogger("verl"), torch=None,
    )  # fmt: skip
    from vllm.model_executor.models.utils import WeightsMapper

    if shim:
        WeightsMapper.get_unstacked_mapper = WeightsMapper.get_rename_mapper
    hijack["VLLMHijack"].hijack()

    def in_worker(worker: Any, step: int) -> None:
        config, tensors = weights(step)
        worker.remove_lora(worker_side.VLLM_LORA_INT_ID)
        worker_side._update_weights(worker, list(tensors.items()), config, True)

    identity = (worker_side.VLLM_LORA_NAME, worker_side.VLLM_LORA_INT_ID)
    try:
        follows(llm, lambda step: llm.collective_rpc(in_worker, args=(step,)), *identity,
                worker_side.VLLM_LORA_PATH)  # fmt: skip
    finally:
        leave(llm, worker_side.VLLM_LORA_INT_ID)
        if shim:
            del WeightsMapper.get_unstacked_mapper


def leave(llm: Any, number: int) -> None:
    """Takes the adapter and the replaced function out again."""
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager

    llm.llm_engine.remove_lora(number)
    LRUCacheWorkerLoRAManager._load_adapter = WorkerLoRAManager._load_adapter
    if hasattr(LRUCacheWorkerLoRAManager, "_old_load_adapter"):
        del LRUCacheWorkerLoRAManager._old_load_adapter


def swift(root: Path, llm: Any, in_worker: bool) -> None:
    """`patch_vllm_load_adapter`; colocated the engine's `add_lora`, on a server the workers'."""
    import torch
    from msgspec import field
    from vllm.lora.request import LoRARequest

    from integration_tests.test_rl import weights

    own = taken(
        root / "swift/rlhf_trainers/utils.py", "VLLM_LORA_INT_ID", "VLLM_LORA_NAME",
        "VLLM_LORA_PATH", "TensorLoRARequest", "patch_vllm_load_adapter", LoRARequest=LoRARequest,
        field=field, torch=torch, Optional=Optional, Dict=dict,
    )  # fmt: skip
    own.patch_vllm_load_adapter()

    def add(to: Any, step: int) -> None:
        config, tensors = weights(step)
        to.add_lora(own.TensorLoRARequest(
            lora_name=own.VLLM_LORA_NAME, lora_int_id=own.VLLM_LORA_INT_ID,
            lora_path=own.VLLM_LORA_PATH, peft_config=config, lora_tensors=tensors,
            load_inplace=True,
        ))  # fmt: skip

    def sync(step: int) -> None:
        if in_worker:
            llm.collective_rpc(add, args=(step,))
        else:
            add(llm.llm_engine, step)

    try:
        follows(llm, sync, own.VLLM_LORA_NAME, own.VLLM_LORA_INT_ID, own.VLLM_LORA_PATH)
    finally:
        leave(llm, own.VLLM_LORA_INT_ID)


def save(folder: Path, step: int) -> Path:
    """The weights of a step as an adapter's folder."""
    from safetensors.torch import save_file

    from integration_tests.test_rl import weights

    config, tensors = weights(step)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


async def skyrl(root: Path, place: Path) -> None:
    """The route `/skyrl/v1/load_lora_adapter`, on vLLM's own list of models."""
    import torch
    from fastapi import HTTPException
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.entrypoints.openai.models.protocol import BaseModelPath
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

    from integration_tests.engines import base_path, worst
    from integration_tests.test_rl import BOUND, PROMPT, VOCAB, wanted

    route = taken(
        root / "skyrl/backends/skyrl_train/inference_servers/vllm_server_actor.py",
        "_skyrl_load_lora_adapter", Request=Any, HTTPException=HTTPException,
        LoRARequest=LoRARequest,
    )._skyrl_load_lora_adapter  # fmt: skip
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(
        model=str(base_path("base_llama")), skip_tokenizer_init=True, dtype="float32",
        enable_lora=True, max_lora_rank=64, max_model_len=256, block_size=32, max_logprobs=-1,
        enforce_eager=True, disable_log_stats=True,
    ))  # fmt: skip
    try:
        models = OpenAIServingModels(engine, [BaseModelPath("base", "base")])
        state = types.SimpleNamespace(openai_serving_models=models)
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, detokenize=False)
        for step in STEPS:
            said = {"lora_name": "skyrl", "lora_path": str(save(place, step))}
            app = types.SimpleNamespace(state=state)
            answer = await route(types.SimpleNamespace(json=lambda s=said: _now(s), app=app))
            assert answer["status"] == "ok", answer
            lora = models.lora_requests["skyrl"]
            stream = engine.generate({"prompt_token_ids": PROMPT}, params, str(step),
                                     lora_request=lora)  # fmt: skip
            async for output in stream:
                row = output.outputs[0].logprobs[0]
                got = torch.tensor([row[token].logprob for token in range(VOCAB)])
            assert worst(got, wanted(step)) < BOUND, (
                f"step {step}: not the weights of the last sync"
            )
    finally:
        engine.shutdown()


async def _now(value: Any) -> Any:
    return value


def trl(root: Path, place: Path) -> None:
    """`VLLMClient` of async GRPO against a server: pause, a new name for each policy, resume."""
    import time

    import requests

    from integration_tests.server import base_with_tokenizer, command, free_port, serving
    from integration_tests.test_rl import PROMPT, wanted

    client_of = taken(
        root / "trl/experimental/async_grpo/vllm_client.py", "VLLMClient", requests=requests,
        time=time, is_requests_available=lambda: True, logger=logging.getLogger("trl"),
    ).VLLMClient  # fmt: skip
    base = base_with_tokenizer(place / "base")
    argv = command(base, free_port(), {"adapter_roots": [str(place)]})
    settings = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_SERVER_DEV_MODE": "1"}
    with serving(argv, place / "server.log", **settings) as server:
        client = client_of(server.url)
        client.wait_for_server_ready()
        for step in STEPS:
            client.pause()
            client.load_lora_adapter(f"policy-v{step}", str(save(place / f"v{step}", step)))
            client.resume()
            body = {"model": f"policy-v{step}", "prompt": PROMPT, "max_tokens": 1,
                    "temperature": 0, "return_token_ids": True}  # fmt: skip
            answer = requests.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
            got = answer["choices"][0]["token_ids"][0]
            assert got == int(wanted(step).argmax()), f"step {step}: not the weights of its name"
        client.unload_lora_adapter("policy-v0")
        names = requests.get(f"{server.url}/v1/models", timeout=60).json()["data"]
        assert {row["id"] for row in names} == {"base", "policy-v1", "policy-v2"}, names


def tried(framework: str, call: str, run: Callable[[], Any]) -> bool:
    """Runs one way to hand an adapter over, and says what came of it."""
    try:
        run()
    except Exception as error:
        good, result = False, f"{type(error).__name__}: {error}".splitlines()[0]
    else:
        good, result = True, "every rollout of the last sync"
    version = VERSIONS[framework.lower()]
    print(f"{'ok  ' if good else 'FAIL'} {framework} {version}: {call}: {result}", flush=True)
    return good


def outcomes(found: dict[str, Path], place: Path) -> list[bool]:
    from integration_tests.engines import close

    llm = in_process()
    try:
        done = [
            tried("verl", "VLLMHijack, workers' add_lora", lambda: verl(found["verl"], llm, False)),
            tried("verl", "the same, WeightsMapper.get_unstacked_mapper given back",
                  lambda: verl(found["verl"], llm, True)),
            tried("ms-swift", "colocated: the engine's add_lora, load_inplace",
                  lambda: swift(found["ms-swift"], llm, False)),
            tried("ms-swift", "server: the workers' add_lora, load_inplace",
                  lambda: swift(found["ms-swift"], llm, True)),
        ]  # fmt: skip
    finally:
        close(llm)
    done.append(tried("SkyRL", "/skyrl/v1/load_lora_adapter",
                      lambda: asyncio.run(skyrl(found["skyrl"], place / "skyrl"))))  # fmt: skip
    done.append(tried("TRL", "async GRPO's VLLMClient", lambda: trl(found["trl"], place / "trl")))
    return done


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, default=ROOT / "build/rl", metavar="DIR")
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    found = sources(args.cache)
    with tempfile.TemporaryDirectory() as place:
        done = outcomes(found, Path(place))
    sys.exit(done.count(False) > EXPECTED_MISFITS)


if __name__ == "__main__":
    main()
