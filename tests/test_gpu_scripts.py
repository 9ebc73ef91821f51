"""scripts/gpu without a GPU: stages that fail and hang, a machine without a card, the tables of a
made-up result, and a bundle that is carried in pieces."""

from __future__ import annotations

import importlib
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts" / "gpu"
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def script(name):
    sys.path.insert(0, str(SCRIPTS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(SCRIPTS))


bounded, bundle, engine, fatbin, probe, report, run, serve, unpack = map(
    script, ("bounded", "bundle", "engine", "fatbin", "probe", "report", "run", "serve", "unpack")
)

# --- stages ---------------------------------------------------------------------------------------


def fake(name, *codes, limit=60.0):
    """A stage of shell commands that leaves `NAME.json` when one of them does."""
    steps = tuple(lambda _work, _left, code=code: ["sh", "-c", code] for code in codes)
    return run.Stage(name, limit, steps, run.from_json(f"{name}.json"))


def writes(name, value):
    return f"echo '{json.dumps(value)}' > {name}.json"


PROBED = {
    "machine": {"card": "NVIDIA H100 80GB HBM3", "driver": "580.1", "versions": {"vllm": "1"}}
}
HANGS = "sleep 300 & echo $! > child; echo began; wait"


def test_stages_that_fail_or_hang_do_not_stop_the_others(tmp_path, capsys):
    stages = (
        fake("probe", writes("probe", PROBED)),
        fake("kernels", "exit 7", "touch never"),
        fake("bench", HANGS, limit=10.0),
        fake("serve", "echo small", writes("serve", {})),
    )
    out = tmp_path / "out.json"
    start = time.monotonic()
    code = run.run_all([(s, s.limit) for s in stages], tmp_path, out)
    assert code == 1 and time.monotonic() - start < 100
    found = json.loads(out.read_text())
    states = {name: stage["state"] for name, stage in found["stages"].items()}
    assert states == {
        "probe": "ok", "kernels": "failed (7)", "bench": "time limit", "serve": "ok",
    }  # fmt: skip
    assert not (tmp_path / "never").exists()  # the step after one that failed
    assert (tmp_path / "bench.log").read_text() == "began\n"
    assert found["card"] == "NVIDIA H100 80GB HBM3" and found["driver"] == "580.1"
    assert found["stages"]["serve"]["result"] == {}
    table = capsys.readouterr().out
    assert "bench    time limit" in table and "kernels  failed (7)" in table
    child = int((tmp_path / "child").read_text())
    for _ in range(50):  # what it had started is gone, or a zombie of whoever adopted it
        status = Path(f"/proc/{child}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.1)
    pytest.fail("the hanging stage's child lives on")


def test_the_result_is_written_after_each_stage_and_named_by_card_and_date(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    stages = (fake("probe", writes("probe", PROBED)), fake("bench", "exit 1"))
    run.run_all([(s, s.limit) for s in stages[:1]], tmp_path, None)
    (path,) = (tmp_path / "results").iterdir()
    date = json.loads(path.read_text())["date"]
    assert path.name == f"h100-80gb-hbm3-{date}.json"


def test_a_step_gets_the_time_that_is_left(tmp_path):
    given = []

    def step(_work, seconds):
        given.append(seconds)
        return ["sleep", "1"]

    run.run_stage(run.Stage("s", 30.0, (step, step), lambda _: None), 30.0, tmp_path)
    assert given[0] <= 30 and given[1] <= given[0] - 1


@pytest.mark.parametrize("text", ["benhc", "bench=soon", "bench=0", "bench=-3"])
def test_a_wrong_stage_or_limit_is_refused(text):
    with pytest.raises(ValueError, match=r"stage|limit"):
        run.chosen([text])
    code = subprocess.run([sys.executable, "-P", SCRIPTS / "run.py", text], capture_output=True)
    assert code.returncode == 2


def test_stages_and_limits_by_name():
    names = [stage.name for stage, _ in run.chosen([])]
    assert names == ["probe", "kernels", "bench", "engine", "serve"]
    picked = [(stage.name, limit) for stage, limit in run.chosen(["bench=77", "kernels"])]
    assert picked == [("probe", 150), ("bench", 77.0), ("kernels", 350)]
    assert [stage.name for stage, _ in run.chosen(["probe"])] == ["probe"]


def test_every_stages_commands_name_files_that_are_there(tmp_path):
    for stage in run.STAGES:
        for step in stage.steps:
            command = step(tmp_path, 60.0)
            files = [Path(part) for part in command if str(part).endswith((".py", ".ini"))]
            assert files and all(path.is_file() for path in files)


def test_a_dry_run_prints_every_command_and_runs_none(tmp_path):
    command = [sys.executable, "-P", SCRIPTS / "run.py", "--dry-run", "bench=77", "engine",
               "--work", tmp_path / "work"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not (tmp_path / "work").exists(), done.stderr
    lines = done.stdout.splitlines()
    stages = [line for line in lines if not line.startswith(" ")]
    assert stages == ["probe (at most 150 s)", "bench (at most 77 s)", "engine (at most 900 s)"]
    assert sum("bench_gated_lora.py" in line for line in lines) == 2
    assert all("VLLM_ENABLE_V1_MULTIPROCESSING=0" in line for line in lines if "engine.py" in line)


def test_kernel_tests_are_found_with_pytest_alone(tmp_path):
    """`-c scripts/gpu/pytest.ini`: neither pytest-timeout nor xdist is asked for."""
    command = [*run.some_kernels(tmp_path, 60.0), "--collect-only", "-p", "no:timeout"]
    command += ["-p", "no:xdist"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert "test_selfcheck_passes" in done.stdout, done.stdout + done.stderr


def test_counts_come_from_the_last_run_of_pytest(tmp_path):
    assert run.test_counts(tmp_path) is None
    (tmp_path / "kernels.xml").write_text(
        "<testsuites><testsuite><testcase name='a'/><testcase name='b'><failure/></testcase>"
        "<testcase name='c'><skipped/></testcase></testsuite></testsuites>"
    )
    assert run.test_counts(tmp_path) == {"passed": 1, "skipped": 1, "failed": ["b"]}


# --- a machine without a card ---------------------------------------------------------------------


@without_gpu
@pytest.mark.parametrize("command", [["probe.py"], ["run.py", "bench"]])
def test_without_a_gpu_one_line_says_so_and_the_exit_code_is_its_own(command, tmp_path):
    work = [] if command[0] == "probe.py" else ["--work", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-P", SCRIPTS / command[0], *command[1:], *work],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 3 == run.NO_GPU == probe.NO_GPU, done.stderr
    said = [line for line in done.stdout.splitlines() if line and not line.startswith("=====")]
    assert len(said) == 1 and said[0].startswith("no GPU: torch ")


def test_a_check_that_fails_does_not_stop_the_next():
    def bad():
        raise RuntimeError("no such kernel")

    found = list(probe.run_checks([("bad", bad), ("good", lambda: "fine")]))
    assert [(name, text, right) for name, _, text, right in found] == [
        ("bad", "RuntimeError: no such kernel", False), ("good", "fine", True),
    ]  # fmt: skip


# --- engines and servers --------------------------------------------------------------------------


def answer(worst=1e-5, base=1e-5, greedy="9/9"):
    return {
        "worst": {"a": worst, "base": base}, "median": {"a": worst}, "greedy": {"a": greedy},
        "base_only": base,
    }  # fmt: skip


def test_what_makes_an_engine_right():
    assert engine.is_right(answer(), exact=True)
    assert not engine.is_right(answer(worst=3e-3), exact=True)
    assert engine.is_right(answer(worst=3e-3, base=2e-3), exact=True)  # the machine's arithmetic
    assert not engine.is_right(answer(base=5e-2), exact=True)
    assert not engine.is_right(answer(greedy="8/9"), exact=True)
    assert engine.is_right(answer(worst=0.4, greedy="8/9"), exact=False)
    assert not engine.is_right(answer(worst=float("inf")), exact=False)


def test_engines_name_adapters_and_settings_that_are_there():
    for spec in engine.ENGINES.values():
        for name in spec.adapters:
            assert (ROOT / "tests/fixtures/routed" / name / "meta.json").is_file()
    listed = subprocess.run(
        [sys.executable, "-P", SCRIPTS / "engine.py", "--list"], capture_output=True, text=True
    )
    assert listed.stdout.split() == list(engine.ENGINES)


def test_adapters_of_the_servers_are_read_by_this_package(tmp_path):
    from vllm_lora_ext.adapters.registry import load_adapter

    folders = serve.make_adapters(tmp_path, serve.SHAPES["tiny"])
    for name, folder in folders.items():
        adapter = load_adapter(folder)
        assert len(adapter.modules) == 14
        gates = {module.gate.source for module in adapter.modules.values()}
        assert gates == ({"router"} if name == "routed" else {"none"})


# --- tables ---------------------------------------------------------------------------------------


def test_pages_are_what_the_results_say():
    for path, text in report.files().items():
        assert path.read_text(encoding="utf-8") == text, "run `make gpu-report`"


def test_without_results_the_tables_say_not_measured():
    for text in (report.serving([]), report.kernels([])):
        assert "not measured" in text and "met" not in text and "%" not in text


def made(card="NVIDIA H100 80GB HBM3", date="2026-12-01", routed=1.05, start=90.0):
    """A result with every stage, the way the stages write it."""
    phases = report.PHASES

    def server(**kinds):
        return {
            "state": "measured", "start_s": 50.0, "facts": {},
            "seconds": {k: {p: [f * 0.010] * 3 for p in phases} for k, f in kinds.items()},
        }  # fmt: skip

    servers = {
        "base": server(base=1.0), "stock": server(base=1.2, plain16=1.3, plain32=1.3),
        "plugin": server(base=1.01, plain16=1.04, plain32=1.06, routed=routed)
        | {"start_s": start},
        "base-2": server(base=1.0), "plugin-2": server(base=1.0),
    }  # fmt: skip
    rows = [
        {"case": case, "tokens": t, "of_stock_kr": 1.1, "added": 0.12, "added_beside": None,
         "added_extended": 0.07}
        for case in ("8/2/16", "1/1/16") for t in (1, 8, 32, 64, 8192)
    ]  # fmt: skip
    results = {
        "probe": {}, "kernels": {"passed": 311, "skipped": 0, "failed": []},
        "bench": {"rows": rows}, "serve": servers,
        "engine": {"eager": {"state": "right"}, "graphs": {"state": "wrong"}},
    }  # fmt: skip
    stages = {name: {"state": "ok", "result": result} for name, result in results.items()}
    return {
        "card": card, "date": date, "driver": "580.1", "graph_mode": "FULL",
        "attention_backend": "FLASH_ATTN", "file": f"x-{date}.json", "stages": stages,
        "versions": {"torch": "2.13.0", "triton": "3.7.1", "vllm": "0.32.0", "cuda": "13.0"},
    }  # fmt: skip


def test_a_result_becomes_tables_with_all_that_a_number_needs():
    text = report.serving([made()])
    assert text.startswith(
        "### NVIDIA H100 80GB HBM3, driver 580.1, vLLM 0.32.0, torch 2.13.0, Triton 3.7.1, "
        "CUDA 13.0, FULL graphs, FLASH_ATTN, 2026-12-01\n"
    )
    assert "kernel tests: 311 passed; engines: 1 of 2 as the authors' numbers" in text
    assert "| this plugin, routed, 8 experts of rank 16, two at work | +5.0% |" in text
    assert "plain LoRA, rank 16, at stock's settings | not measured |" in text  # no plugin32
    assert "| at least 0.93 | 0.952, met |" in text
    assert "| at most 60 | 40, met |" in text and "| at most 10 | 0, met |" in text
    slow = report.serving([made(routed=1.5, start=150.0)])
    assert "| at least 0.93 | 0.667, missed |" in slow and "| at most 60 | 100, missed |" in slow


def test_the_kernels_table_has_a_column_for_each_card():
    text = report.kernels([made(), made(card="NVIDIA A100")])
    assert "| aim on an H100 | at most | NVIDIA H100 80GB HBM3 | NVIDIA A100 |" in text
    assert "over stock's kernels at rank 32 | 1.15 | 1.1, met | 1.1, met |" in text
    assert "over stock's kernels | 1 | 1.1, missed | 1.1, missed |" in text
    assert "(aim: 0.08) | 0.15 | not measured | not measured |" in text
    assert "below the base weight | 0.075 | 0.07, met | 0.07, met |" in text


def test_stages_that_were_not_run_leave_their_rows_unmeasured():
    result = made()
    result["stages"] = {"probe": result["stages"]["probe"]}
    assert "%" not in report.serving([result]) and "met" not in report.kernels([result])


def test_the_newest_result_of_each_card_counts(tmp_path):
    for number, (card, date) in enumerate([("B", "2026-12-01"), ("A", "2026-12-02"),
                                           ("A", "2026-12-01")]):  # fmt: skip
        (tmp_path / f"{number}.json").write_text(json.dumps(made(card, date)))
    found = [(r["card"], r["date"]) for r in report.newest(tmp_path)]
    assert found == [("A", "2026-12-02"), ("B", "2026-12-01")]


# --- the bundle -----------------------------------------------------------------------------------


def test_what_the_machine_has_is_not_packed():
    has = bundle.names("torch==2.11.0+cu130\nHugging_Face.Hub @ file:///x\n# a note\n-e ./y\n")
    assert has == {"torch", "hugging-face-hub"}
    packages = ["torch==2.13.0", "vllm==0.32.0", "msgspec==0.22.0", "ray==2.50"]
    assert bundle.wanted(packages, has, lean=False) == packages[1:]
    assert bundle.wanted(packages, has, lean=True) == packages[1:3]


def test_a_bundle_holds_what_the_stages_read():
    files = bundle.tracked()
    for name in ("scripts/gpu/run.py", "benchmarks/kernels/aims.py", "tests/kernels/test_triton.py",
                 "integration_tests/engines.py", "tests/make_adapters.py"):  # fmt: skip
        assert name in files, name


@pytest.fixture
def carried(tmp_path):
    """A bundle of two archives in pieces of a kilobyte."""
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "scripts").mkdir(parents=True)
    out.mkdir()
    (source / "scripts" / "a.py").write_text("print(1)")
    (source / "noise").write_bytes(os.urandom(3000))
    archives = [tmp_path / "checkout.tar.xz", tmp_path / "site.tar.xz"]
    bundle.pack(source, ["scripts"], archives[0])
    bundle.pack(source, ["noise"], archives[1])
    bundle.deal(archives, out, 1024)
    return source, out, tmp_path / "work"


def test_parts_come_one_after_the_other(carried, capsys):
    source, out, work = carried
    folders = sorted(path for path in out.iterdir() if path.is_dir())
    assert len(folders) >= 4
    codes = [unpack.unpack([folder], work) for folder in folders]
    assert set(codes[:-1]) == {1} and codes[-1] == 0
    assert "not here yet" in capsys.readouterr().out
    assert (work / "site" / "noise").read_bytes() == (source / "noise").read_bytes()
    assert (work / "checkout" / "scripts" / "a.py").read_text() == "print(1)"
    assert (work / "gpu.sh").is_file()


def test_a_damaged_part_is_named(carried, capsys):
    _, out, work = carried
    piece = next(out.rglob("site.tar.xz.00"))
    piece.write_bytes(b"x" + piece.read_bytes()[1:])
    assert unpack.unpack([out], work) == 2
    assert "site: damaged: site.tar.xz.00" in capsys.readouterr().out
    assert not (work / "gpu.sh").exists()


def library(*entries):
    """An ELF file with one fat binary of (kind, arch, code) entries, and a byte behind it."""
    body = b""
    for kind, arch, code in entries:
        body += struct.pack("<HHIQ", kind, 1, 32, len(code)) + bytes(12)
        body += struct.pack("<I", arch) + code
    fat = struct.pack("<IHHQ", fatbin.MAGIC, 1, 16, len(body)) + body
    names = b"\0.nv_fatbin\0.shstrtab\0"
    at_fat, at_names = 64, 64 + len(fat)
    table = at_names + len(names)
    empty = struct.pack("<IIQQQQIIQQ", 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    sections = [
        empty,
        struct.pack("<IIQQQQIIQQ", 1, 1, 0, 0, at_fat, len(fat), 0, 0, 8, 0),
        struct.pack("<IIQQQQIIQQ", 12, 3, 0, 0, at_names, len(names), 0, 0, 1, 0),
    ]
    head = bytearray(64)
    struct.pack_into("<Q", head, 0x28, table)
    struct.pack_into("<HHH", head, 0x3A, 64, len(sections), 2)
    return bytes(head) + fat + names + b"".join(sections)


def test_a_library_keeps_the_machine_code_of_one_gpu_and_its_length(tmp_path):
    path = tmp_path / "lib.so"
    whole = library((2, 80, b"A" * 64), (2, 90, b"H" * 32), (1, 90, b"P" * 16))
    path.write_bytes(whole)
    fatbin.prune(path, 90)
    data = path.read_bytes()
    assert len(data) == len(whole) and b"H" * 32 in data
    assert b"A" * 8 not in data and b"P" * 8 not in data
    ((_, (entry,)),) = fatbin.fat_binaries(data)
    assert (entry.kind, entry.arch) == (fatbin.CUBIN, 90)


def test_a_library_without_that_code_keeps_the_newest_ptx(tmp_path):
    path = tmp_path / "lib.so"
    path.write_bytes(library((1, 70, b"O" * 16), (1, 80, b"N" * 16), (2, 80, b"A" * 64)))
    fatbin.prune(path, 90)
    ((_, (entry,)),) = fatbin.fat_binaries(path.read_bytes())
    assert (entry.kind, entry.arch) == (fatbin.PTX, 80)
