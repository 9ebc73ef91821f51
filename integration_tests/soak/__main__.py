"""A soak on servers of its own: traffic on one, then servers that are killed."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from integration_tests.server import Server, base_with_tokenizer, command, free_port, serving
from integration_tests.soak import world
from integration_tests.soak.api import Api
from integration_tests.soak.deaths import kill_and_start, kill_part
from integration_tests.soak.report import soak
from integration_tests.soak.world import BASE

CLIENTS, SLOTS, KV_BLOCKS = 12, 4, 24
_ENVIRONMENT = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two ranks share a NUMA node
    # Torch's oneDNN keeps a primitive for each of the last 1024 shapes of a product: hundreds of
    # MiB that come with the numbers of rows which steps happen to have, and hide a leak.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8",
}


def main(argv: list[str]) -> int:
    """0 when nothing was wrong and nothing leaked."""
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20, help="of traffic")
    parser.add_argument("--kills", type=int, default=3, help="0: nothing is killed")
    parser.add_argument("--logs", type=Path, default=Path("build/soak"))
    given = parser.parse_args(argv)
    given.logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        home = Home(Path(folder).resolve(), given.logs)
        with home.serve("traffic") as server:
            report = soak(server, home.path / "soak", 60 * given.minutes, CLIENTS)
            alive = server.process.poll() is None
        print(report.table(), flush=True)
        wrong = [] if alive else ["the server has ended"]
        wrong += _deaths(home, given.kills) if given.kills else []
    wrong += [f"{count} {what}" for what, count in report.faults().items()]
    print("\n".join(f"WRONG: {fault}" for fault in wrong) or "nothing was wrong")
    return 1 if wrong else 0


def _deaths(home: Home, kills: int) -> list[str]:
    with home.serve("answers") as server, closing(Api(server.url)) as api:
        told = world.make(home.path / "deaths")
        world.hold(told, api, world.STATIC)
        for turn in range(kills):
            world.learn_mixes(told, api, world.killed_mixes(turn))
    wrong = kill_and_start(lambda: home.serve("killed"), told, kills)
    print(f"{kills} servers killed in the midst of merges and started again", flush=True)
    for title, ranks in (("EngineCore", 1), ("Worker_TP1", 2)):
        with home.serve(title, "--tensor-parallel-size", str(ranks)) as server:
            wrong += kill_part(server, told, title)
        print(f"{title} killed with requests in flight", flush=True)
    return wrong


@dataclass(frozen=True)
class Home:
    """What the servers of one run have on disk."""

    path: Path
    logs: Path

    @contextmanager
    def serve(self, name: str, *flags: str) -> Iterator[Server]:
        """A server that keeps its merges under its name."""
        base = self.path / BASE
        if not base.exists():
            base_with_tokenizer(base)
        settings = {
            "merge": {"store": str(self.path / f"store-{name}")}, "host_cache_mb": 4,
            "adapter_roots": [str(self.path)], "max_router_rows": 8,
        }  # fmt: skip
        argv = command(
            base, free_port(), settings, "--max-loras", str(SLOTS), "--max-lora-rank", "16",
            "--num-gpu-blocks-override", str(KV_BLOCKS), *flags,
        )  # fmt: skip
        log = self.logs / f"{name}.log"
        with serving(argv, log, **_ENVIRONMENT) as server:
            yield server


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
