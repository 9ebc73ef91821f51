"""The checks and measurements of a GPU, one stage after the other; a table last, and one JSON file.

    python scripts/gpu/run.py [STAGE[=SECONDS] ...] [--work DIR] [--out FILE.json] [--dry-run]
    make gpu [STAGES="probe kernels bench=300"]

    probe    what machine this is, what imports, are vLLM's own kernels and the plugin's right
    kernels  the project's kernel tests, compiled
    bench    times of the kernels, ratios to stock's and to the floors, which aims are met
    engine   routed and plain adapters in engines, against the numbers of the systems' authors
    serve    what LoRA adds to a model of Llama-3.1-8B's shape

Runs with the Python that has vLLM for CUDA and this package; the tests and benchmarks are those of
the checkout this file lies in. Without names all stages run. Each stage begins with something
small, has a limit of its own (the number after =, in seconds), and never ends the others. What a
stage printed is in DIR/STAGE.log. The result is benchmarks/results/gpu/CARD-DATE.json, written
after each stage, into which other calls of the day have written theirs; `make gpu-report` puts it
into the tables of the documents. `--dry-run` prints the commands and runs none of them.

`--seconds N` is for a machine that is lent for so long a call: no more than that is taken, stages
that have ended well with these sources are not run again, and the next call goes on.

Exit code: 0 all is right; 1 a stage failed; 2 wrong usage; 3 there is no GPU to run on; 75 nothing
failed, and something had no time: run it again.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import shlex
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
sys.path.append(str(HERE))

from bounded import INCOMPLETE, OK, UNFINISHED, Ended, run  # noqa: E402
from facts import kept, key, sources  # noqa: E402

RESULTS = REPO / "benchmarks" / "results" / "gpu"
NO_GPU = 3  # the exit code of the probe, and of this program
LEAST = 5.0  # seconds under which no further step is begun
DONE = "done.json"  # stage → what it found when it ended well, and the key (`facts.key`) of that
Command = list[str | Path]


@dataclass(frozen=True)
class Stage:
    """Steps that follow each other until one fails; the first is small.

    Args:
        limit: seconds for all of them.
        steps: given the folder for results and the seconds that are left: the command of each.
        read: what the steps have left in that folder, as values for the JSON file.
        env: variables for the steps.
        outputs: files in that folder that are of an earlier run, and go before the first step.
        independent: a step that fails does not stop the next, and the last one speaks for all.
    """

    name: str
    limit: float
    steps: tuple[Callable[[Path, float], Command], ...]
    read: Callable[[Path], Any]
    env: tuple[tuple[str, str], ...] = ()
    outputs: tuple[str, ...] = ()
    independent: bool = False


def python(script: Path, *args: str | Path) -> Command:
    """A script by itself: nothing of the checkout is on its path."""
    return [sys.executable, "-P", script, *args]


def probe(work: Path, _: float) -> Command:
    return python(HERE / "probe.py", "--out", work / "probe.json")


def some_kernels(work: Path, _: float) -> Command:
    return _pytest(work / "kernels-some.xml", "-x", "-k", "selfcheck_passes")


def all_kernels(work: Path, _: float) -> Command:
    workers = ["-n", str(min(8, os.cpu_count() or 1))] if find_spec("xdist") else []
    return _pytest(work / "kernels.xml", "--maxfail", "8", *workers)


# All that have a test which only a GPU can run.
KERNEL_TESTS = ("triton", "triton_mix", "extension", "glu", "prefetch", "no_host_sync")


def _pytest(out: Path, *args: str) -> Command:
    tests = [REPO / f"tests/kernels/test_{name}.py" for name in KERNEL_TESTS]
    return [
        sys.executable, "-P", "-m", "pytest", "-q", "-c", HERE / "pytest.ini", "--rootdir", REPO,
        "-p", "no:cacheprovider", "--junitxml", out, *args, *tests,
    ]  # fmt: skip


def one_case(_: Path, __: float) -> Command:
    return _bench("--models", "llama-3.1-8b", "--cases", "8/2/16", "--routing", "uniform",
                  "--tokens", "1")  # fmt: skip


def all_aims(work: Path, _: float) -> Command:
    return _bench("--bars", "--out", work / "bench.json")


def _bench(*args: str | Path) -> Command:
    return python(REPO / "benchmarks/kernels/bench_gated_lora.py", *args)


def first_engines(work: Path, seconds: float) -> Command:
    return _engine(work, seconds, "stock,eager")


def more_engines(work: Path, seconds: float) -> Command:
    return _engine(work, seconds, "all")


def _engine(work: Path, seconds: float, only: str) -> Command:
    return python(HERE / "engine.py", "--out", work / "engine.json", "--only", only,
                  "--seconds", str(seconds))  # fmt: skip


def tiny_server(work: Path, seconds: float) -> Command:
    return _serve(work, seconds / 3, "serve-tiny.json", "--model", "tiny", "--only", "plugin",
                  "--batches", "1", "--prefills", "64", "--rounds", "1")  # fmt: skip


def full_servers(work: Path, seconds: float) -> Command:
    return _serve(work, seconds, "serve.json")


def _serve(work: Path, seconds: float, name: str, *args: str) -> Command:
    return python(HERE / "serve.py", "--out", work / name, "--work", work / "serve",
                  "--seconds", str(seconds), *args)  # fmt: skip


def from_json(name: str) -> Callable[[Path], Any]:
    def read(work: Path) -> Any:
        path = work / name
        return json.loads(path.read_text()) if path.is_file() else None

    return read


def answers(name: str) -> Callable[[Path], Any]:
    """What a stage has left that goes on with its own file, of these sources and versions only."""
    return lambda work: kept(work / name) or None


def test_counts(work: Path) -> dict[str, Any] | None:
    """Of the last pytest run: how many tests, and the names of those that failed."""
    paths = [work / name for name in ("kernels.xml", "kernels-some.xml")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return None
    cases = list(ElementTree.parse(path).iter("testcase"))
    bad = [c.get("name") for c in cases if {"failure", "error"} & {part.tag for part in c}]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"passed": len(cases) - len(bad) - skipped, "skipped": skipped, "failed": bad}


# Expected on an H100, in seconds: probe 90, kernels 150, bench 240, engine 600, serve 1000.
STAGES = (
    Stage("probe", 150, (probe,), from_json("probe.json"), outputs=("probe.json",)),
    Stage("kernels", 350, (some_kernels, all_kernels), test_counts,
          outputs=("kernels-some.xml", "kernels.xml")),
    Stage("bench", 400, (one_case, all_aims), from_json("bench.json"), outputs=("bench.json",)),
    # In one process: an error's trace is then whole, and no engine is left behind.
    Stage("engine", 900, (first_engines, more_engines), answers("engine.json"),
          (("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),), independent=True),
    # As served: the engine in a process of its own, beside the one that asks.
    Stage("serve", 1500, (tiny_server, full_servers), answers("serve.json"),
          outputs=("serve-tiny.json",)),
)  # fmt: skip


def run_stage(stage: Stage, limit: float, work: Path) -> tuple[Ended, Any]:
    """Runs a stage's steps until one fails or `limit` seconds are over."""
    print(f"\n===== {stage.name} (at most {limit:.0f} s)", flush=True)
    for name in stage.outputs:
        (work / name).unlink(missing_ok=True)
    start, ended = time.monotonic(), Ended(UNFINISHED, 0.0)
    with (work / f"{stage.name}.log").open("wb") as log:
        for number, step in enumerate(stage.steps):
            left = limit - (time.monotonic() - start)
            if number and left < LEAST:
                ended = Ended(UNFINISHED, 0.0)
                break
            ended = run(step(work, left), left, {**environment(work), **dict(stage.env)}, log, work)
            if ended.code != 0 and not stage.independent:
                break
    return Ended(ended.code, time.monotonic() - start), stage.read(work)


def environment(work: Path) -> dict[str, str]:
    """For every step: quiet, offline, caches where they can be thrown away."""
    cache = work / "cache"
    return {
        "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn", "XDG_CACHE_HOME": str(cache),
        "VLLM_CACHE_ROOT": str(cache / "vllm"), "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
    }  # fmt: skip


def run_all(
    wanted: Sequence[tuple[Stage, float]],
    work: Path,
    out: Path | None,
    seconds: float | None = None,
) -> int:
    """Runs the stages, writes the result after each, prints the table; returns the exit code.

    Args:
        seconds: that all of them may take; stages that ended well before are then not run again.
    """
    found: dict[str, Any] = {"date": datetime.date.today().isoformat(), "stages": {}}
    rows, states, path, own, start = [], [], out, key(), time.monotonic()
    done = json.loads((work / DONE).read_text()) if (work / DONE).is_file() else {}
    for stage, limit in wanted:
        before = done.get(stage.name) or {}
        if seconds is not None and before.get("key") == own:
            found["stages"][stage.name] = before["stage"]
            rows.append(f"{stage.name:8} {OK:12} in an earlier call")
            continue
        left = limit if seconds is None else min(limit, seconds - (time.monotonic() - start))
        if seconds is not None and left < LEAST:
            states.append(INCOMPLETE)
            rows.append(f"{stage.name:8} {INCOMPLETE:12} not begun")
            continue
        ended, result = run_stage(stage, left, work)
        if stage.name == "probe" and ended.code == NO_GPU:
            return NO_GPU
        cut = ended.code is None and left < limit  # the next call gives it more
        state = INCOMPLETE if cut else ended.state
        found["stages"][stage.name] = {
            "state": state, "seconds": round(ended.seconds, 1), "limit": round(left),
            "sources": sources(REPO), "result": result,
        }  # fmt: skip
        states.append(state)
        rows.append(f"{stage.name:8} {state:12} {ended.seconds:5.0f} s of {left:.0f}")
        found |= head(found["stages"])
        path = path or RESULTS / f"{slug(found['card'])}-{found['date']}.json"
        write(found, path)
        done[stage.name] = {"key": own, "stage": found["stages"][stage.name]} if state == OK else {}
        (work / DONE).write_text(json.dumps(done))
    print("\n" + "\n".join(rows))
    print(f"\n{path}\nlogs: {work}\nmake gpu-report puts it into the documents")
    if any(state not in (OK, INCOMPLETE) for state in states):
        return 1
    return UNFINISHED if INCOMPLETE in states else 0


def write(found: dict[str, Any], path: Path) -> None:
    """Puts stages into the day's file beside those that are there. Of another driver or other
    versions these stay in a file of their own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = found
    if path.is_file():
        before = json.loads(path.read_text())
        same = ("date", "card", "driver", "versions")
        if all(before.get(name) == found[name] for name in same):
            stages = {**before["stages"], **found["stages"]}
            whole = {**found, "stages": stages, **head(stages)}
        else:
            own = hashlib.sha256(json.dumps(before).encode()).hexdigest()[:8]
            path.rename(path.with_name(f"{path.stem}-{own}.json"))
    path.write_text(json.dumps(whole, indent=1) + "\n")


def plan(wanted: Sequence[tuple[Stage, float]], work: Path) -> list[str]:
    """What `run_all` would run: a line for each stage and for each of its commands."""
    found = []
    for stage, limit in wanted:
        found.append(f"{stage.name} (at most {limit:.0f} s)")
        variables = "".join(f"{name}={value} " for name, value in stage.env)
        for step in stage.steps:
            found.append("    " + variables + shlex.join(map(str, step(work, limit))))
    return found


def head(stages: dict[str, Any]) -> dict[str, Any]:
    """What names a result: card, driver, versions, and what vLLM made of its options."""
    machine = ((stages.get("probe") or {}).get("result") or {}).get("machine") or {}
    bench = (stages.get("bench") or {}).get("result") or {}
    servers = (stages.get("serve") or {}).get("result") or {}
    engines = (stages.get("engine") or {}).get("result") or {}
    # `base` and `stock` run without the plugin: what counts is what it lets vLLM resolve.
    own = [servers.get("plugin"), engines.get("graphs"), *servers.values(), *engines.values()]
    facts = [answer["facts"] for answer in own if answer and answer.get("facts")]
    return {
        "card": machine.get("card") or bench.get("device") or "unknown card",
        "driver": machine.get("driver"),
        "versions": machine.get("versions") or {},
        "graph_mode": facts[0]["graph_mode"] if facts else None,
        "attention_backend": facts[0]["attention_backend"] if facts else None,
    }


def slug(name: str) -> str:
    """A card's name as a part of a file's: NVIDIA H100 80GB HBM3 is h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-")


def chosen(names: Sequence[str], stages: Sequence[Stage] = STAGES) -> list[tuple[Stage, float]]:
    """Stages and their limits by `NAME` or `NAME=SECONDS`; the probe before all others.

    Raises:
        ValueError: no such stage, or no such limit.
    """
    by_name = {stage.name: stage for stage in stages}
    found = {}
    for text in names or list(by_name):
        name, _, seconds = text.partition("=")
        if name not in by_name:
            raise ValueError(f"no stage {name!r}; there are {', '.join(by_name)}")
        try:
            limit = float(seconds) if seconds else by_name[name].limit
        except ValueError:
            raise ValueError(f"{text!r}: the limit is a number of seconds") from None
        if limit <= 0:
            raise ValueError(f"{text!r}: the limit is a number of seconds")
        found[name] = by_name[name], limit
    first = stages[0]
    return list(({first.name: (first, first.limit)} | found).values())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE[=SECONDS]")
    parser.add_argument("--work", type=Path, help="logs, caches, models of the run")
    parser.add_argument("--out", type=Path, help="the result's file")
    parser.add_argument("--seconds", type=float, help="for all of it; the next call goes on")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    args = parser.parse_args()
    try:
        wanted = chosen(args.stages)
    except ValueError as error:
        parser.error(str(error))
    work = args.work or Path(tempfile.gettempdir()) / "vllm-lora-ext-gpu"
    if args.dry_run:
        print("\n".join(plan(wanted, work.resolve())))
        return 0
    work.mkdir(parents=True, exist_ok=True)
    return run_all(wanted, work.resolve(), args.out, args.seconds)


if __name__ == "__main__":
    sys.exit(main())
