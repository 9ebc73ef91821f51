"""scripts/gpu: what a second call keeps, what it does again, and what has no time."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.test_gpu_scripts import (
    PROBED,
    ROOT,
    bounded,
    engine,
    fake,
    made,
    probe,
    report,
    run,
    script,
    serve,
    unpack,
    writes,
)

facts = script("facts")
sys.path.insert(0, str(ROOT / "benchmarks" / "kernels"))
aims = script("aims")
sys.path.remove(str(ROOT / "benchmarks" / "kernels"))


def call(stages, work, out, seconds=None):
    return run.run_all([(s, s.limit) for s in stages], work, out, seconds)


def stages_of(path):
    return json.loads(path.read_text())["stages"]


PROBE = fake("probe", writes("probe", PROBED))


# --- the day's file -------------------------------------------------------------------------------


def test_a_second_call_of_the_day_keeps_what_the_first_has_measured(tmp_path):
    out = tmp_path / "out.json"
    call([PROBE, fake("bench", writes("bench", {"rows": [1]}))], tmp_path, out)
    call([PROBE, fake("serve", writes("serve", {"base": {"facts": None}}))], tmp_path, out)
    found = stages_of(out)
    assert list(found) == ["probe", "bench", "serve"]
    assert found["bench"]["result"] == {"rows": [1]}
    assert found["bench"]["sources"] == found["serve"]["sources"] == facts.sources(ROOT)


def test_other_versions_do_not_mix_with_those_of_the_file(tmp_path):
    out = tmp_path / "out.json"
    call([PROBE, fake("bench", writes("bench", {}))], tmp_path, out)
    newer = {"machine": {**PROBED["machine"], "versions": {"vllm": "2"}}}
    call([fake("probe", writes("probe", newer))], tmp_path, out)
    assert list(stages_of(out)) == ["probe"]
    (kept,) = tmp_path.glob("out-*.json")
    assert list(stages_of(kept)) == ["probe", "bench"]


def test_a_stage_that_fails_does_not_report_what_an_earlier_run_has_left(tmp_path):
    (tmp_path / "bench.json").write_text('{"rows": "of last week"}')
    (tmp_path / "kernels.xml").write_text("<testsuites><testcase name='old'/></testsuites>")
    for stage in run.STAGES:
        if stage.name in ("probe", "kernels", "bench"):
            bad = run.Stage(stage.name, 60.0, (lambda *_: ["false"],), stage.read,
                            outputs=stage.outputs)  # fmt: skip
            ended, result = run.run_stage(bad, 60.0, tmp_path)
            assert ended.code == 1 and result is None, stage.name


def test_answers_of_another_card_version_or_source_are_not_gone_on_with(tmp_path, monkeypatch):
    path = tmp_path / "engine.json"
    own = facts.key()
    path.write_text(json.dumps({"a": {"state": "right", "key": own}, "b": {"state": "right"},
                                "c": {"state": "right", "key": "0"}}))  # fmt: skip
    assert list(facts.kept(path)) == ["a"]
    monkeypatch.setattr(facts, "ask_driver", lambda: ("another card", "1", None, None))
    assert facts.key() != own and facts.kept(path) == {}


def test_an_edit_of_a_source_makes_another_key(tmp_path):
    for folder in (facts.PACKAGE, *facts.INSIDE, *facts.MEASURING):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "kernels" / "a.py").write_text("1")
    before = facts.sources(tmp_path)
    (tmp_path / "kernels" / "a.py").write_text("2")
    assert facts.sources(tmp_path) != before


# --- no time left ---------------------------------------------------------------------------------


def test_engines_without_time_are_incomplete_and_no_failure(tmp_path, monkeypatch):
    for module, good in ((engine, engine.RIGHT), (serve, serve.MEASURED)):
        out = tmp_path / f"{module.__name__}.json"
        argv = ["x", "--out", str(out), "--seconds", "1"]
        monkeypatch.setattr(sys, "argv", argv)
        assert module.main() == bounded.UNFINISHED
        assert {a["state"] for a in json.loads(out.read_text()).values()} == {"incomplete"}
        assert facts.exit_code([good], good) == 0
        assert facts.exit_code([good, "incomplete"], good) == bounded.UNFINISHED
        assert facts.exit_code(["wrong", "incomplete"], good) == 1


@pytest.mark.parametrize("module", [engine, serve])
def test_one_that_had_less_than_its_own_time_is_incomplete(module, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "run", lambda *_: bounded.Ended(None, 1.0))
    monkeypatch.setattr(
        sys, "argv", ["x", "--out", str(tmp_path / "o.json"), "--only", next(iter(
            engine.ENGINES if module is engine else serve.SERVERS)), "--seconds", "100"]
    )  # fmt: skip
    assert module.main() == bounded.UNFINISHED
    sys.argv[-1] = "1000"
    assert module.main() == 1  # it had its time


def test_the_table_and_the_exit_code_say_incomplete(tmp_path, capsys):
    stages = [PROBE, fake("engine", f"exit {bounded.UNFINISHED}")]
    out = tmp_path / "out.json"
    assert call(stages, tmp_path, out) == run.UNFINISHED
    assert "engine   incomplete" in capsys.readouterr().out
    assert stages_of(out)["engine"]["state"] == "incomplete"
    assert call([*stages, fake("serve", "exit 9")], tmp_path, out) == 1


def test_calls_of_so_many_seconds_go_on_where_the_last_one_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "LEAST", 0.5)  # the slow one is begun on a busy machine too
    out = tmp_path / "out.json"
    count = fake("kernels", "echo x >> counted; echo '{}' > kernels.json")
    slow = fake(
        "bench", "if [ -e half ]; then echo '[]' > bench.json; else touch half; sleep 60; fi"
    )
    assert call([PROBE, count, slow], tmp_path, out, seconds=8.0) == run.UNFINISHED
    assert stages_of(out)["bench"]["state"] == "incomplete"
    assert call([PROBE, count, slow], tmp_path, out, seconds=30.0) == 0
    assert (tmp_path / "counted").read_text() == "x\n"
    found = json.loads(out.read_text())
    assert found["card"] == PROBED["machine"]["card"]
    assert {name: s["state"] for name, s in found["stages"].items()} == dict.fromkeys(
        ("probe", "kernels", "bench"), "ok"
    )
    assert call([PROBE, count], tmp_path, out) == 0  # without --seconds all of it again
    assert (tmp_path / "counted").read_text() == "x\nx\n"


def test_the_first_engines_do_not_stop_the_others(tmp_path):
    (own,) = [stage for stage in run.STAGES if stage.name == "engine"]
    assert own.independent
    steps = (lambda *_: ["false"], lambda *_: ["touch", "more"])
    ended, _ = run.run_stage(run.Stage("e", 60.0, steps, lambda _: None, independent=True), 60.0,
                             tmp_path)  # fmt: skip
    assert (tmp_path / "more").exists() and ended.code == 0  # the last one speaks for all


# --- engines and servers --------------------------------------------------------------------------


def test_stock_is_asked_for_no_dtype_that_its_kernels_refuse():
    stock = [e for e in engine.ENGINES.values() if e.env.get("VLLM_LORA_EXT_DISABLE") == "1"]
    assert stock
    for own in stock:
        assert (engine.USUAL | own.options)["dtype"] in ("bfloat16", "float16")


def test_adapters_that_sleep_all_have_a_slot():
    """And a MixLoRA, whose blocks hold tables of their own."""
    slots = 4  # `make_engine`
    text = (ROOT / "integration_tests/engines.py").read_text(encoding="utf-8")
    assert f'"max_loras": {slots}' in text
    asleep = [e for e in engine.ENGINES.values() if e.sleeps]
    assert asleep
    for own in asleep:
        assert len(own.adapters) <= own.options.get("max_loras", slots)
        assert set(own.adapters) & set(engine.BLOCKS)


def test_second_starts_come_right_behind_the_first_and_find_their_caches(tmp_path):
    assert list(serve.SERVERS)[:4] == ["base", "plugin", "base-2", "plugin-2"]
    first = serve.caches("plugin", tmp_path)
    kept = Path(first["VLLM_CACHE_ROOT"])
    kept.mkdir(parents=True)
    assert serve.caches("plugin-2", tmp_path) == first and kept.exists()
    serve.caches("plugin", tmp_path)
    assert not kept.exists()  # cold
    assert serve.caches("stock", tmp_path) == {}


@pytest.mark.parametrize("name", ["plugin", "stock", "dual"])
def test_a_small_models_server_leaves_the_caches_of_the_large_one(name, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(serve, "run", lambda _c, _s, env: asked.append(env) or bounded.Ended(1, 0))
    for model in serve.SHAPES:
        monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path / "o.json"), "--only", name,
                                          "--work", str(tmp_path), "--model", model])  # fmt: skip
        serve.main()
    small, large = asked
    assert small.get("VLLM_CACHE_ROOT") is None or small != large
    assert small["VLLM_LORA_ENABLE_DUAL_STREAM"] == ("1" if name == "dual" else "0")


def test_the_second_stream_and_the_prefetch_have_servers_and_rows():
    for name in ("dual", "prefetched"):
        assert serve.SERVERS[name].dual and "routed" in serve.SERVERS[name].kinds
        assert (name, "routed") in {(engine, kind) for engine, kind, _ in report.KINDS}
    for name, kind, _ in report.KINDS:
        assert kind in serve.SERVERS[name].kinds


# --- what is run, and what is said ----------------------------------------------------------------


def test_every_test_that_only_a_gpu_can_run_is_in_the_stage():
    marks = ("@on_gpu", "skipif(not torch.cuda.is_available()")
    files = {
        path.stem.removeprefix("test_")
        for path in (ROOT / "tests/kernels").glob("test_*.py")
        if any(mark in path.read_text(encoding="utf-8") for mark in marks)
    }  # fmt: skip
    assert files and files <= set(run.KERNEL_TESTS)


def test_the_graph_mode_is_that_of_the_plugins_server():
    def facts_of(mode):
        return {"facts": {"graph_mode": mode, "attention_backend": "FLASH_ATTN"}}

    servers = {"base": facts_of("FULL_AND_PIECEWISE"), "plugin": facts_of("PIECEWISE")}
    engines = {"stock": facts_of("NONE"), "graphs": facts_of("FULL")}
    stages = {"serve": {"result": servers}, "engine": {"result": engines}}
    assert run.head(stages)["graph_mode"] == "PIECEWISE"
    assert run.head({"engine": stages["engine"]})["graph_mode"] == "FULL"


def test_the_report_says_what_a_number_is_not_of():
    result = made()
    assert "not full" not in report.serving([result])
    result["graph_mode"] = "PIECEWISE"
    result["stages"]["serve"] |= {"sources": "a", "state": "incomplete"}
    result["stages"]["bench"]["sources"] = "b"
    text = report.serving([result])
    assert "graphs were PIECEWISE, not full" in text and "different sources" in text
    assert "did not end well: serve (incomplete)" in text


def test_prefill_is_held_to_nine_tenths_of_the_base():
    """Of routed and of plain adapters, and 1 / 0.9 in the kernels' benchmark."""
    prefill = [bar for bar in report.BARS if "prefill" in bar.text]
    assert [bar.limit for bar in prefill] == [0.90, 0.90]
    (aim,) = [aim for aim in aims.AIMS if aim.tokens == (8192,)]
    assert aim.limit <= 1 / 0.9 - 1
    slow = made()
    slow["stages"]["serve"]["result"]["plugin"]["seconds"]["plain16"]["prefill 8192"] = [0.012] * 3
    assert "| at least 0.9 | 0.833, missed |" in report.serving([slow])


def test_the_probe_says_where_what_is_installed_is_not_the_checkout(tmp_path):
    repo, root = tmp_path / "repo", tmp_path / "site" / facts.PACKAGE
    for folder in (facts.PACKAGE, *facts.INSIDE):
        (repo / folder).mkdir(parents=True)
        (repo / folder / "a.py").write_text("1")
    assert "itself" in probe.same_sources(repo / facts.PACKAGE, repo)
    shutil.copytree(repo / facts.PACKAGE, root)
    for folder in facts.INSIDE:
        shutil.copytree(repo / folder, root / folder)
    assert probe.same_sources(root, repo).startswith("installed as in the checkout")
    (root / "kernels" / "a.py").write_text("2")
    with pytest.raises(RuntimeError, match=r"1 files differ, kernels/a\.py"):
        probe.same_sources(root, repo)


def test_a_bundles_machine_finds_its_compiler():
    assert "export CUDA_HOME" in unpack.START
