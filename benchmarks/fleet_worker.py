"""What one worker needs for an adapter: reading and checking it, and putting it into a slot.

    python benchmarks/fleet_worker.py [--count 96] [--out FILE.json]

Plain adapters of ranks 4, 8 and 16 on q and v of SmolLM2-135M (bfloat16, CPU), as those of
`many_adapters.py`, through vLLM's worker manager on the model without an engine, so without HTTP
and without steps in between. Medians, for `fleet_sim.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "examples"), str(REPO / "benchmarks")]
SLOTS = 8


def measure(folders: list[Path], count: int, base: str, place: Path) -> dict[str, Any]:
    """Loads `count` adapters, then has each in a slot in turn, so that every step swaps one in."""
    from vllm.lora.request import LoRARequest

    from tests.model_patches.conftest import make_harness

    options = {
        "model": base, "dtype": "bfloat16", "max_loras": SLOTS, "max_cpu_loras": count,
        "max_lora_rank": 16, "max_model_len": 256, "max_num_batched_tokens": 256,
    }  # fmt: skip
    harness = make_harness(place, {}, options)
    requests = [LoRARequest(f"a{i}", i + 1, str(folders[i % len(folders)])) for i in range(count)]
    loads, sizes = [], []
    for request in requests:
        began = time.perf_counter()
        report = harness.worker.load(request, None, ())
        loads.append(time.perf_counter() - began)
        sizes.append(report.bytes)
    before = harness.worker.stats().traffic.activations
    swaps = []
    for request in requests:
        began = time.perf_counter()
        harness.step(request)
        swaps.append(time.perf_counter() - began)
    assert harness.worker.stats().traffic.activations - before >= count - SLOTS, "no swaps"
    return {
        "load_s": statistics.median(loads), "adapter_mb": statistics.mean(sizes) / 1e6,
        "swap_s": statistics.median(swaps), "count": count, "slots": SLOTS,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--out", type=Path, default=REPO / "benchmarks/results/fleet_worker.json")
    args = parser.parse_args()
    from base_model import ensure_base
    from many_adapters import write_plain

    base = str(ensure_base())
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch, "harness")
        place.mkdir()
        found = measure(write_plain(base, Path(scratch)), args.count, base, place)
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(found)


if __name__ == "__main__":
    main()
