"""Fuzzes the fields of a server's requests by its own OpenAPI: the load routes, and `lora_ext`.

    python -m scripts.fuzz.http_fields --seconds 300

Values that the schema allows, values that it nearly allows, and names that are loaded in between.
Whatever is sent, the answer comes soon, is no 5xx, and says what is wrong as errors of OpenAI do;
the adapters that others use answer as before.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.core import NotSet

from integration_tests.engines import FIXTURES, recorded
from integration_tests.server import Server, base_with_tokenizer, command, free_port, serving
from vllm_lora_ext.conditions.said import FIELD, Said

SOON_S = 20.0
LOAD, UNLOAD, ROLLBACK = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/lora_ext/rollback"
ADAPTERS, COMPLETIONS, CHAT = "/v1/lora_ext/adapters", "/v1/completions", "/v1/chat/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
PLAIN = recorded("plain-a")
NAMED = ("kept", "red", "green")
KEYS = ("lora_name", "lora_path", "expected_version", "version", "name")
# What no schema's strings are, and JSON's may be.
HALF = "\ud800"
ODD = ("\0", "a\nb", "NaN", "../..", "/", "é" * 3000, "cat:kept+red", 'describe:"x"')


@dataclass
class Seen:
    """Answers by route and status, and what was wrong with them."""

    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class Door:
    """A server, its OpenAPI with what may well be said put into it, and what it answers."""

    def __init__(self, server: Server, adapters: Path) -> None:
        self._http = httpx.Client(base_url=server.url, timeout=SOON_S, trust_env=False)
        self._adapters, self.seen = adapters, Seen()
        for name, folder in (("kept", "plain"), ("red", "red"), ("green", "green")):
            said = {"lora_name": name, "lora_path": str(adapters / folder)}
            assert self._http.post(LOAD, json=said).status_code == 200, name
        self.listed, self.kept = self.names(), self.answer()
        spec = self._http.get("/openapi.json").json()
        self.schema = schemathesis.openapi.from_dict(self._fuller(spec))
        paths = [str(adapters / name) for name in ("plain", "red", "green", "broken", "none")]
        paths.append(str(PLAIN.folder))  # outside of the roots
        versions = [row["version"] for row in self._http.get(ADAPTERS).json()["data"]]
        self.there = st.fixed_dictionaries({
            "lora_name": st.sampled_from([*NAMED, "fuzzed", *ODD]),
            "lora_path": st.sampled_from([*paths, "plain", *ODD]),
            "expected_version": st.sampled_from([None, None, "0" * 64, *versions]),
            "version": st.sampled_from([*versions, "0" * 64]),
            "name": st.sampled_from([*NAMED, "fuzzed", *ODD]),
        })  # fmt: skip

    def names(self) -> set[str]:
        return {row["name"] for row in self._http.get(ADAPTERS).json()["data"]}

    def answer(self) -> list[int]:
        """Of an adapter that nothing here may touch."""
        body = {"model": "kept", "prompt": PLAIN.prompts[0], "max_tokens": 12, "temperature": 0,
                "return_token_ids": True, "ignore_eos": True}  # fmt: skip
        tokens: list[int] = self._http.post(COMPLETIONS, json=body).json()["choices"][0][
            "token_ids"
        ]
        return tokens

    def _fuller(self, spec: dict[str, Any]) -> dict[str, Any]:
        """The served document; of the routes that compute only this field is fuzzed."""
        schemas = spec["components"]["schemas"]
        said = Said.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= said.pop("$defs")
        said = {"anyOf": [said, {}, {"type": "string"}]}
        chat = {"messages": {"const": [{"role": "user", "content": "t1"}]}}
        prompts = {
            "CompletionRequest": ("max_tokens", {"prompt": {"const": [5, 6, 7]}}),
            "ChatCompletionRequest": ("max_tokens", chat),
            "AnthropicMessagesRequest": ("max_tokens", chat),
            "ResponsesRequest": ("max_output_tokens", {"input": {"const": "t1"}}),
        }
        for model, (budget, prompt) in prompts.items():
            assert model in schemas, model
            properties = {
                "model": {"enum": ["base", "base", "kept"]}, budget: {"const": 1}, **prompt,
                FIELD: said, "stream": {"type": "boolean"},
            }  # fmt: skip
            schemas[model] = {
                "type": "object", "properties": properties, "required": [*properties],
                "additionalProperties": False,
            }  # fmt: skip
        return spec

    def send(self, route: str, body: Any) -> None:
        """One request; what is wrong with its answer is noted."""
        content = json.dumps(body, default=repr).encode()  # "binary" strings are bytes
        try:
            answer = self._http.post(
                route, content=content, headers={"Content-Type": "application/json"}
            )
        except httpx.HTTPError as error:
            self.seen.wrong.append(f"{route} {content[:400]!r}: {error!r}")
            return
        self.seen.answers[route, answer.status_code] += 1
        if answer.status_code == 200:
            if '"error":' in answer.text:
                self.seen.wrong.append(f"{route} {content[:400]!r}: {answer.text[:400]}")
            return
        try:
            error = answer.json()["error"]
            self.seen.codes[error["type"]] += 1
            typed = isinstance(error["message"], str) and error["message"]
        except (ValueError, KeyError, TypeError):
            typed = False
        if answer.status_code >= 500 or not typed:
            self.seen.wrong.append(
                f"{route} {content[:400]!r}: {answer.status_code} {answer.text[:400]}"
            )

    def tidy(self) -> None:
        """What was loaded on the way goes, and what was unloaded comes back."""
        for name in self.names() - self.listed:
            self._http.post(UNLOAD, json={"lora_name": name})
        for name, folder in (("kept", "plain"), ("red", "red"), ("green", "green")):
            said = {"lora_name": name, "lora_path": str(self._adapters / folder)}
            self._http.post(LOAD, json={**said, "load_inplace": True})

    def check(self) -> None:
        """Nobody else has noticed anything."""
        self.tidy()
        if self.answer() != self.kept:
            self.seen.wrong.append("an adapter answers otherwise than before")
        if self.names() != self.listed:
            self.seen.wrong.append(f"{self.names()} are loaded, and were {self.listed}")


def named(body: Any, there: Mapping[str, Any]) -> Any:
    """The same, where names, paths and versions are some that may be there: a schema's strings
    never are."""
    if isinstance(body, list):
        return [named(part, there) for part in body]
    if not isinstance(body, dict):
        return body
    return {key: there[key] if key in there else named(v, there) for key, v in body.items()}


def fuzz(door: Door, route: str, mode: GenerationMode, until: float) -> None:
    """Requests of one route, of one kind, until a time."""
    operation = door.schema[route]["POST"]
    strategy = operation.as_strategy(generation_mode=mode)

    @seed(time.time_ns())  # without one, the end of the time is told as a failure to reproduce
    @settings(
        max_examples=10**9, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(
        case=strategy, odd=st.integers(0, 9), there=door.there, keys=st.sets(st.sampled_from(KEYS))
    )
    def one(case: Any, odd: int, there: dict[str, Any], keys: set[str]) -> None:
        if time.monotonic() > until:
            raise _Over
        body = named(case.body, {key: there[key] for key in keys})
        if odd == 0 and isinstance(body, dict) and body:  # what a schema's strings are not
            key = sorted(body)[-1]
            body = body | {key: (HALF, *ODD)[len(body) % (len(ODD) + 1)]}
        if not isinstance(body, NotSet):
            door.send(route, body)

    try:
        one()
    except _Over:
        return


class _Over(BaseException):
    """The time is up."""


@contextmanager
def opened() -> Iterator[Door]:
    """A server with adapters to load, and one that it refuses."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        home = Path(folder).resolve()
        adapters = home / "adapters"
        adapters.mkdir()
        mixed = FIXTURES / "conditioned" / "scales-a" / "adapters"
        for name, source in (("plain", PLAIN.folder), ("red", mixed / "red"),
                             ("green", mixed / "green")):  # fmt: skip
            shutil.copytree(source, adapters / name)
        (adapters / "broken").mkdir()
        (adapters / "broken" / "adapter_config.json").write_text("{")
        settings = {"merge": {"store": str(home / "store")}, "adapter_roots": [str(adapters)]}
        argv = command(base_with_tokenizer(home / "base_llama"), free_port(), settings)
        with serving(argv, home / "server.log", VLLM_ALLOW_RUNTIME_LORA_UPDATING="1") as server:
            yield Door(server, adapters)


def main(argv: list[str]) -> int:
    """1 when anything was wrong."""
    parser = argparse.ArgumentParser(prog="http_fields", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    given = parser.parse_args(argv)
    turns = [
        (route, mode)
        for route in (LOAD, UNLOAD, ROLLBACK, COMPLETIONS, CHAT, RESPONSES, MESSAGES)
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    ]
    with opened() as door:
        for route, mode in turns:
            fuzz(door, route, mode, time.monotonic() + given.seconds / len(turns))
            door.check()
    seen = door.seen
    for (route, status), count in sorted(seen.answers.items()):
        print(f"{route:28} {status}  {count}")
    print("codes:", dict(seen.codes.most_common()))
    for wrong in seen.wrong[:20]:
        print("WRONG:", wrong)
    return 1 if seen.wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
