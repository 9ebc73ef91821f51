"""What a result is of: card, driver, versions and sources; and what vLLM made of its options, asked
of a running engine."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))

from bounded import INCOMPLETE, UNFINISHED

REPO = Path(__file__).resolve().parents[2]
PACKAGE = "vllm_lora_ext"
INSIDE = ("kernels", "routing", "model_patches")  # folders that a wheel has inside the package
MEASURING = ("scripts/gpu", "benchmarks/kernels", "integration_tests")


def key() -> str:
    """A name for all that a result depends on: one with another key is not gone on with."""
    card, driver, *_ = ask_driver()
    parts = [card, driver, versions(), sources(REPO)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def kept(path: Path) -> dict[str, Any]:
    """What a file of answers by name holds of this card, these versions and these sources."""
    found = json.loads(path.read_text()) if path.is_file() else {}
    own = key()
    return {name: answer for name, answer in found.items() if answer.get("key") == own}


def exit_code(states: Sequence[str], good: str) -> int:
    """1: one is neither good nor incomplete; else `UNFINISHED` where one is incomplete."""
    if any(state not in (good, INCOMPLETE) for state in states):
        return 1
    return UNFINISHED if INCOMPLETE in states else 0


def versions() -> dict[str, str | None]:
    """Of the packages that have a say in a result, as they are installed, and of Python."""
    names = ("torch", "triton", "vllm", "vllm-lora-ext", "transformers", "pytest")
    return {name: _version(name) for name in names} | {"python": platform.python_version()}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def ask_driver() -> tuple[str | None, ...]:
    """Card, driver, memory in use and clock, as the driver says them; None: there is no driver."""
    query = "--query-gpu=name,driver_version,memory.used,clocks.sm"
    try:
        said = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], timeout=30,
                              capture_output=True, text=True, check=True).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None, None, None, None
    return tuple(part.strip() for part in said.splitlines()[0].split(","))


def sources(repo: Path) -> str:
    """Digest of a checkout's package and of what measures it."""
    files = of_checkout(repo)
    for folder in MEASURING:
        files |= {f"{folder}/{path.name}": path for path in (repo / folder).glob("*.py")}
    return digest(files)


def of_checkout(repo: Path) -> dict[str, Path]:
    """Python files of the package, by their names in a wheel."""
    files = {str(p.relative_to(repo / PACKAGE)): p for p in (repo / PACKAGE).rglob("*.py")}
    for folder in INSIDE:
        files |= {str(p.relative_to(repo)): p for p in (repo / folder).rglob("*.py")}
    return files


def of_package(root: Path) -> dict[str, Path]:
    """The same of an installed package."""
    return {str(path.relative_to(root)): path for path in root.rglob("*.py")}


def digest(files: dict[str, Path]) -> str:
    """Of names and contents."""
    text = "".join(f"{name}\0{files[name].read_text('utf-8')}\0" for name in sorted(files))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def of_worker(worker: Any) -> dict[str, str]:
    """Runs in a worker: the graph mode and the attention backend that were resolved there."""
    config = worker.vllm_config.compilation_config
    layers = config.static_forward_context.values()
    backends = {x.get_attn_backend().get_name() for x in layers if hasattr(x, "get_attn_backend")}
    return {
        "graph_mode": getattr(config.cudagraph_mode, "name", "NONE"),
        "attention_backend": ", ".join(sorted(backends)),
        "model_runner": "v2"
        if ".gpu.model_runner" in type(worker.model_runner).__module__
        else "v1",
    }


def of_engine(llm: Any) -> dict[str, str]:
    """The first worker's; needs VLLM_ALLOW_INSECURE_SERIALIZATION=1 where it is another process."""
    found: dict[str, str] = llm.collective_rpc(of_worker)[0]
    return found
