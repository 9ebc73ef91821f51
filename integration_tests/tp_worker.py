"""Runs one tensor-parallel engine in an environment of its own, for `test_tensor_parallel`.

    python -m integration_tests.tp_worker JOB.json RESULT.pt

Its own process because the environment decides (threads, executor, Ray's switches) and because
what it starts must be gone afterwards: see `ours`.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from integration_tests import conditioned, followed, given
from integration_tests.engines import (
    ENVIRONMENT,
    close,
    greedy,
    lora,
    make_engine,
    prompt_logprobs,
    run,
    tokens,
)
from vllm_lora_ext.errors import AdapterError

MARK = "VLLM_LORA_EXT_TP_RUN"
HOST = "127.0.0.1"
TP_ENVIRONMENT = ENVIRONMENT | {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in the script's process: one start less
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # ranks share a NUMA node
    "VLLM_HOST_IP": HOST,
    "GLOO_SOCKET_IFNAME": "lo",
    "RAY_AUTH_MODE": "disabled",  # nothing but loopback can reach this Ray
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
}

# In every rank: what the gates saw and gave, in the order of the calls.
_seen: list[tuple[str, str, Any]] = []


def main(job_file: str, result_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    began = time.time()
    cluster = ray_cluster() if job["backend"] == "ray" else nothing()
    with shared_memory_removed() as files, cluster:
        llm = make_engine(
            job["base"], tensor_parallel_size=2, distributed_executor_backend=job["backend"],
            max_loras=6, max_num_batched_tokens=256,
            additional_config={"lora_ext": {"two_pass": True}}, **job["options"],
        )  # fmt: skip
        try:
            started = time.time()
            torch.save(ask(llm, job) | {"started": started - began}, result_file)
        finally:
            files |= shared_memory()
            close(llm)


def ask(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    """All requests in one batch, three times: log-probabilities, tokens, and what the gates did."""
    requests = [(ids, name and lora(name, folder)) for ids, name, folder in job["requests"]]
    result: dict[str, Any] = {
        "executor": type(llm.llm_engine.engine_core.engine_core.model_executor).__name__,
        "logprobs": prompt_logprobs(llm, requests, job["vocabulary"]),
        "tokens": [tokens(o) for o in run(llm, requests, greedy())],
    }
    result["given"] = what_requests_give(llm)
    result["refused"] = [refusal(llm, folder) for folder in job["refused"]]
    result["from_memory"] = from_memory(llm, job)
    result["conditioned"] = what_requests_say(llm, Path(job["made"]))
    llm.reset_prefix_cache()
    llm.collective_rpc(watch)
    run(llm, requests, greedy(3))
    result["ranks"] = llm.collective_rpc(seen)
    result["listening"] = listening()
    return result


def refusal(llm: Any, folder: str) -> str:
    """The code with which an adapter is refused."""
    try:
        llm.llm_engine.add_lora(lora("refused", folder))
    except AdapterError as error:
        return error.code
    return "served"


def what_requests_say(llm: Any, made: Path) -> list[str]:
    """Adapters on spans, Activated LoRAs, X-LoRA, users and instructions beside others; the names
    of the requests that were right."""
    conditioned.load(llm)
    cases = [*conditioned.mixes("spans-a"), *conditioned.aloras(), *conditioned.others()]
    cases += conditioned.xloras("xlora_topk-a", "xlora_lw_topk-a")
    cases += [*followed.users(made), *followed.instructions(made)]
    for _ in range(2):  # the second time from the prefix cache
        conditioned.check(cases, conditioned.ask(llm, cases))
    return [case.key for case in cases]


def what_requests_give(llm: Any) -> int:
    """A library's gates and an MM-LoRA's images beside others; how many requests were right."""
    with TemporaryDirectory() as folder:
        cases = [*given.gates(Path(folder) / "library"), *given.images(Path(folder) / "mmlora")]
        cases += conditioned.others()
        conditioned.check(cases, conditioned.ask(llm, cases))
    return len(cases)


def from_memory(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    """The same adapters handed over as tensors, where two files are all that they are."""
    prompts = {name: (ids, Path(folder)) for ids, name, folder in job["requests"] if name}
    requests = {}
    for name, (ids, folder) in prompts.items():
        if len(list(folder.rglob("*.*"))) == 2:
            (weights,), config = folder.glob("*.safetensors"), folder / "adapter_config.json"
            added = llm.llm_engine.add_adapter(
                f"{name}-tensors", load_file(weights), json.loads(config.read_text())
            )
            requests[name] = (ids, added)
    outputs = run(llm, list(requests.values()), greedy())
    for _, added in requests.values():
        assert llm.llm_engine.remove_lora(added.lora_int_id)
    return {name: tokens(o) for name, o in zip(requests, outputs, strict=True)}


def watch(worker: Any) -> None:
    """In a rank: from now on keep the sums that enter every gate, and what leaves it."""
    from vllm_lora_ext.kernels.gated_lora import Site
    from vllm_lora_ext.kernels.gated_lora.backends import eager
    from vllm_lora_ext.kernels.gated_lora.backends.native import tables as cpu_native

    # The compiled path decides on the same sums; only the PyTorch path can be looked into.
    cpu_native.tables = lambda *_: None  # type: ignore[assignment]
    modules = worker.model_runner.lora_manager._adapter_manager.modules
    names = {id(layer.site): name for name, layer in modules.items() if hasattr(layer, "site")}
    for layer in modules.values():
        if isinstance(getattr(layer, "site", None), Site):
            layer.site.changed()

    def layer_of(plan: Any) -> str:  # looked up anew: an adapter that comes back has new plans
        sites = ((name, getattr(layer, "site", None)) for name, layer in modules.items())
        return next(n for n, site in sites if any(p is plan for p in getattr(site, "plans", ())))

    gate, shrink = eager._gate_, eager.shrink

    def watched_gate(h_TR: torch.Tensor, read: Any) -> None:
        plan, gates_TR = read.plan, torch.ones_like(h_TR)
        if not plan.plain:
            gate(gates_TR, read)
            sums_TG = torch.cat([read.v_TR[:, c] for c in plan.inputs], dim=1)
            name = layer_of(plan)
            _seen.append((name, "sums", sums_TG))
            _seen.append((name, "gated", gates_TR[:, : plan.num_ranks]))
        gate(h_TR, read)

    def watched_shrink(x_TK: torch.Tensor, site: Any) -> torch.Tensor:
        u_PTR = shrink(x_TK, site)
        _seen.append((names[id(site)], "partial", u_PTR[0].clone()))
        return u_PTR

    eager._gate_, eager.shrink = watched_gate, watched_shrink


def seen(worker: Any) -> list[tuple[str, str, Any]]:
    return [(name, what, value.numpy()) for name, what, value in _seen]


def ours(mark: str, session: int) -> list[psutil.Process]:
    """Every live process of a run: Ray's daemons keep its mark, vLLM's workers its session.

    (A worker that sets its title overwrites the environment that others see.)
    """
    found = []
    for process in psutil.process_iter():
        try:
            mine = os.getsid(process.pid) == session or process.environ().get(MARK) == mark
            if mine and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError, PermissionError):
            continue
    return found


def this_run() -> list[psutil.Process]:
    return ours(os.environ[MARK], os.getsid(0))


def shared_memory() -> set[Path]:
    """The shared memory of this run's processes."""
    return {
        Path(m.path)
        for process in this_run()
        for m in process.memory_maps()
        if m.path.startswith("/dev/shm/") and not m.path.endswith("(deleted)")
    }


def listening() -> list[tuple[str, str]]:
    """(address, process name) of every TCP socket that this run listens on."""
    return sorted(
        {
            (c.laddr.ip, process.name())
            for process in this_run()
            for c in process.net_connections("tcp")
            if c.status == psutil.CONN_LISTEN
        }
    )


@contextmanager
def shared_memory_removed() -> Iterator[set[Path]]:
    """vLLM ends its workers by a signal, so that some of their shared memory stays (0.32)."""
    kept: set[Path] = set()
    try:
        yield kept
    finally:
        for file in kept:
            file.unlink(missing_ok=True)


@contextmanager
def nothing() -> Iterator[None]:
    yield


@contextmanager
def ray_cluster() -> Iterator[None]:
    """A Ray of its own, on loopback, that believes in two GPUs."""
    import ray
    from ray._private import ray_constants

    # Ray replaces a loopback address by the machine's own unless it believes in no cluster.
    ray_constants.ENABLE_RAY_CLUSTER = False
    prepare_ray_worker()
    with TemporaryDirectory(prefix="ray") as folder:
        ray.init(
            address="local", num_cpus=0, num_gpus=2, include_dashboard=False,
            _node_ip_address=HOST, _temp_dir=folder, object_store_memory=100 << 20,
            logging_level="ERROR",
            runtime_env={"worker_process_setup_hook": prepare_ray_worker},
        )  # fmt: skip
        try:
            yield
        finally:
            ray.shutdown()


def prepare_ray_worker() -> None:
    """In every Ray worker, before vLLM asks: what the CPU platform lacks, and loopback only."""
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.executor import ray_executor_v2

    CpuPlatform.ray_device_key = "GPU"  # workers are placed by this resource of Ray's
    ray_executor_v2.TCPStore = loopback_store


def loopback_store(host_name: str, port: int, **options: Any) -> torch.distributed.TCPStore:
    """A store that does not listen on every interface, as torch's own does whatever the host."""
    listener = socket.create_server((host_name, port))
    port = listener.getsockname()[1]
    return torch.distributed.TCPStore(
        host_name=host_name, port=port, master_listen_fd=listener.detach(), **options
    )


if __name__ == "__main__":
    # Under its own name, so that the ranks find the functions that they are sent.
    from integration_tests import tp_worker

    tp_worker.main(*sys.argv[1:])
