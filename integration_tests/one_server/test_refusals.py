"""What cannot be served, or may not be asked for, is refused with a code and touches nobody."""

from __future__ import annotations

import shutil
import threading
from typing import Any

import httpx
import pytest

from integration_tests.engines import FIXTURES
from integration_tests.one_server.asking import (
    LOADING,
    MOE,
    PLAIN,
    TOKEN,
    ask,
    fingerprint,
    load,
    names,
    of_its_own,
    post,
    refused,
    unload,
)
from integration_tests.server import command, ended, free_port
from tests.bad_adapters import BAD, GOOD, build_bad

pytestmark = pytest.mark.engine
STATUS = {"not_found": 404, "path_not_allowed": 403}


def test_bad_adapters_are_refused_and_touch_nobody(server, client, places):
    """Every malformed folder, while good requests go on in a second thread."""
    fingerprint(client)  # from here on the prompts come out of the prefix cache
    before, during, stop = fingerprint(client), [], threading.Event()

    def neighbour() -> None:
        own = of_its_own(client)
        while not stop.is_set():
            during.append(fingerprint(own))

    thread = threading.Thread(target=neighbour)
    thread.start()
    wrong: dict[str, Any] = {}
    loaded = names(client)
    try:
        for name, entry in BAD.items():
            build_bad(name, places.adapters / "bad" / name)
            answer = load(server, f"bad-{name}", places.adapters / "bad" / name)
            error = answer.json()["error"] if answer.status_code != 200 else {}
            seen = answer.status_code, error.get("type")
            if seen != (STATUS.get(entry.code, 400), entry.code):
                wrong[name] = seen, entry.code, error.get("message")
            elif "; fix: " not in error["message"] or "lora_ext:" in error["message"].split(";")[0]:
                wrong[name] = error["message"]
            refused(client, f"bad-{name}")
    finally:
        stop.set()
        thread.join()
    print(f"{len(BAD)} folders, {3 * len(during)} answers to neighbours meanwhile")
    assert wrong == {}
    assert names(client) == loaded
    assert len(during) >= 10
    assert all(answer == before for answer in during)
    assert fingerprint(client) == before


def test_an_adapter_of_another_base(server, client, places):
    shutil.copytree(GOOD["meteora-a"], places.adapters / "of-qwen2")
    answer = load(server, "of-qwen2", places.adapters / "of-qwen2")
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] in ("wrong_base", "shape_mismatch", "unknown_module")
    refused(client, "of-qwen2")


def test_two_passes_are_a_setting(server, client, places):
    xlora = FIXTURES / "conditioned" / "xlora_topk-a" / "adapter"
    shutil.copytree(xlora, places.adapters / "xlora")
    answer = load(server, "xlora", places.adapters / "xlora")
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "unsupported_feature")
    assert '"two_pass": true' in error["message"]
    refused(client, "xlora")


def test_a_mended_adapter_loads_under_the_name_that_failed(server, client, places):
    folder = places.adapters / "mended"
    build_bad("router_nan", folder)
    assert load(server, "mended", folder).json()["error"]["type"] == "not_finite"
    shutil.rmtree(folder)
    shutil.copytree(MOE.folder, folder)
    assert load(server, "mended", folder).status_code == 200
    assert ask(client, "mended", MOE.prompts[3]).token_ids == MOE.greedy[3]
    assert unload(server, "mended").status_code == 200


def test_only_the_allowed_folders_are_read(server, client, places):
    loaded = names(client)
    (places.adapters / "link").symlink_to(places.outside / "plain")
    (places.adapters / "up").symlink_to("..")
    paths = [
        places.outside / "plain", "/etc", "/", "~", "..", "../outside/plain",
        f"{places.adapters}/../outside/plain", places.adapters / "link", "link", "up/outside/plain",
        "/no/such/folder", "plain\0", f"{places.adapters}x",
    ]  # fmt: skip
    for i, path in enumerate(paths):
        answer = load(server, f"outside-{i}", path)
        seen = answer.status_code, answer.json()["error"]["type"]
        assert seen == (403, "path_not_allowed"), (path, answer.text)
        refused(client, f"outside-{i}")
    for path in ("org/no-such-adapter", places.adapters / "none"):
        answer = load(server, "absent", path)
        assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found")
    assert names(client) == loaded
    assert load(server, "relative", "plain").status_code == 200  # below the allowed folder
    assert ask(client, "relative", PLAIN.prompts[0]).token_ids == PLAIN.greedy[0]
    assert unload(server, "relative").status_code == 200


def test_only_the_operator_changes_what_is_loaded(server, client, places):
    before = names(client)
    routes = [
        ("load_lora_adapter", {"lora_name": "x", "lora_path": f"{places.adapters}/plain"}),
        ("unload_lora_adapter", {"lora_name": "plain"}),
        ("lora_ext/rollback", {"lora_name": "plain", "version": "0"}),
    ]
    for route, body in routes:
        for headers, seen in (
            ({}, (401, "no_token")), ({"x-lora-ext-token": "wrong"}, (403, "wrong_token")),
        ):  # fmt: skip
            answer = post(server, route, headers=headers, **body)
            assert (answer.status_code, answer.json()["error"]["type"]) == seen, answer.text
            assert TOKEN not in answer.text
    sagemaker = {"name": "x", "src": f"{places.adapters}/plain"}
    answer = httpx.post(f"{server.url}/adapters", json=sagemaker, timeout=60, trust_env=False)
    assert answer.status_code in (401, 404), answer.text
    assert names(client) == before
    assert ask(client, "plain", PLAIN.prompts[0]).token_ids == PLAIN.greedy[0]


def test_errors_name_no_place_of_the_server(server, places):
    for path in (places.outside / "none", "none", "plain/none", "../outside/plain"):
        answer = load(server, "nowhere", path)
        said = answer.json()["error"]["message"].replace(str(path), "")
        assert answer.status_code in (403, 404) and str(places.base.parent) not in said, said


def test_the_log_names_the_code_of_a_refusal(server, places):
    load(server, "logged", places.outside / "plain")
    assert "'logged': [lora_ext:path_not_allowed]" in server.log.read_text()


@pytest.mark.slow
def test_a_bad_adapter_at_start_stops_the_server(places, tmp_path):
    """And without adapter_roots, a server that loads at run time warns of it."""
    build_bad("b_inf", tmp_path / "bad")
    argv = command(
        places.base, free_port(), None, "--enforce-eager", "--lora-modules", f"bad={tmp_path}/bad"
    )
    status, log, seconds = ended(argv, tmp_path / "log", fork=True, **LOADING)
    print(f"ended with {status} after {seconds:.0f} s")
    assert status not in (0, None)
    assert "[lora_ext:not_finite]" in log
    assert "may read any path that this server can" in log


@pytest.mark.slow
def test_bad_settings_stop_the_server(places, tmp_path):
    argv = command(places.base, free_port(), {"max_router_row": 8}, "--enforce-eager")
    status, log, seconds = ended(argv, tmp_path / "log", fork=True)
    print(f"ended with {status} after {seconds:.0f} s")
    assert status not in (0, None)
    assert "[lora_ext:bad_settings]" in log
    assert "max_router_row;" in log
    said = ("Starting to load model", "Loading weights took", "Loading safetensors")
    assert not any(line in log for line in said), "weights were loaded first"
