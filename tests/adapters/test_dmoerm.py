"""DMoERM: the authors' numbers from the authors' files, other shapes, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from make_adapters import FIXTURES
from make_reward import add_tokenizer, bare, defined, expert_hidden, hidden_of, make_reward_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from vllm_lora_ext.adapters.dmoerm import read_reward_model
from vllm_lora_ext.adapters.registry import load_adapter
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.serving.rewards import Bounds, Judge, Reward

ROOT, BASE = FIXTURES / "conditioned" / "dmoerm-a", FIXTURES / "bases" / "base_llama_tiny"
FOLDER, BOUND = ROOT / "adapter", 2e-5
META, NUMBERS = (
    json.loads((ROOT / "meta.json").read_text()),
    load_file(ROOT / "expected.safetensors"),
)
INNER = "innermoe/chat/ckpts/phase3.safetensors"
ROUTER = "router/best_router.safetensors"
ENGINE = Bounds(512, 80)


@pytest.fixture(scope="module")
def base() -> Any:
    return AutoModel.from_pretrained(BASE, dtype=torch.float32).eval()


def texts() -> list[dict[str, list[int]]]:
    return [
        {name: NUMBERS[f"{name}_{i}"].tolist() for name in ("router_ids", "inner_ids")}
        for i in range(len(META["requests"]))
    ]


def judged(folder: Path, base_path: Path, model: Any, asked: list[dict[str, Any]]) -> list[Reward]:
    """By our code, the passes in transformers."""
    adapter = read_reward_model(folder)
    judge = Judge(adapter, str(base_path), "cpu", ENGINE)
    readings = [judge.read(text, f"texts[{i}]") for i, text in enumerate(asked)]
    probs_TC = judge.route(readings)
    passes = judge.passes(readings, probs_TC)
    hidden = []
    for one in passes:
        expert = adapter.categories[one.category].experts[one.number]
        named = {
            f"base_model.base_model.model.{n.removeprefix('base_model.model.')}".replace(
                ".weight", f".{expert.point}.weight"
            ): t for n, t in expert.tensors.items()
        }  # fmt: skip
        hidden.append(
            expert_hidden(named, expert.point, expert.config["lora_alpha"], model, one.ids)
        )
    return judge.rewards(probs_TC, passes, hidden)


def test_the_authors_numbers_over_one_base(base: Any) -> None:
    found = judged(FOLDER, BASE, base, texts())
    for i, reward in enumerate(found):
        assert reward.category == META["requests"][i]["category"]
        assert META["categories"].index(reward.category) == int(NUMBERS[f"category_{i}"])
        wanted = NUMBERS[f"category_probs_{i}"]
        assert (torch.tensor(reward.category_probs) - wanted).abs().max() < BOUND
        assert abs(reward.reward - float(NUMBERS[f"shared_reward_{i}"])) < BOUND


def test_the_heads_over_the_authors_hidden_states() -> None:
    """Of each category's own base too: what one engine per category would give."""
    adapter = read_reward_model(FOLDER)
    for i, request in enumerate(META["requests"]):
        category = adapter.categories[request["category"]]
        assert [expert.point for expert in category.experts] == request["points"]
        for prefix in ("", "shared_"):
            got = category.head(NUMBERS[f"{prefix}hidden_{i}"])
            assert abs(got - float(NUMBERS[f"{prefix}reward_{i}"])) < BOUND


def test_the_experts_over_their_own_bases() -> None:
    for i, request in enumerate(META["requests"]):
        tensors = load_file(FOLDER / f"innermoe/{request['category']}/ckpts/phase3.safetensors")
        own = AutoModel.from_config(AutoConfig.from_pretrained(BASE), dtype=torch.float32).eval()
        weights = {
            n.rpartition("base_model.model.")[2].replace(".base_layer", ""): t
            for n, t in tensors.items() if "base_model.model." in n and "lora_" not in n
        }  # fmt: skip
        own.load_state_dict(weights)
        ids = NUMBERS[f"inner_ids_{i}"].tolist()
        for point, wanted in zip(request["points"], NUMBERS[f"hidden_{i}"], strict=True):
            got = expert_hidden(tensors, point, META["user_args"]["lora_alpha"], own, ids)
            assert (got - wanted).abs().max() < BOUND


@pytest.mark.parametrize("slopes", [1, 7])
def test_other_shapes_categories_and_numbers_of_experts(tmp_path: Path, slopes: int) -> None:
    config = AutoConfig.for_model(
        "qwen2", hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=3,
        num_key_value_heads=1, vocab_size=60, max_position_embeddings=128,
    )  # fmt: skip
    points = {"code": ["correct"], "maths": ["steps", "result", "brevity"], "talk": ["a", "b"]}
    folder = make_reward_model(
        tmp_path / "rm", config, points, others=["none"], rank=5, alpha=7, middle=7, slopes=slopes
    )
    model = bare(config, 99)
    model.save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(1)
    asked = [
        {n: torch.randint(60, (int(torch.randint(1, 30, (1,), generator=generator)),),
                          generator=generator).tolist() for n in ("router_ids", "inner_ids")}
        for _ in range(40)
    ]  # fmt: skip
    found = judged(folder, tmp_path / "base", model, asked)
    for text, reward in zip(asked, found, strict=True):
        probs, wanted = defined(folder, model, text["router_ids"], text["inner_ids"])
        assert (torch.tensor(probs) - torch.tensor(reward.category_probs)).abs().max() < BOUND
        assert (reward.reward is None) is (reward.category == "none")
        if wanted is not None:
            assert abs(wanted - reward.reward) < 1e-4
    assert {reward.category for reward in found} == {"none", "code", "maths", "talk"}


def test_a_batch_of_the_router_is_what_single_texts_are() -> None:
    judge = Judge(read_reward_model(FOLDER), str(BASE), "cpu", ENGINE)
    readings = [judge.read(text, "") for text in texts() * 4]
    together = judge.route(readings)
    alone = torch.cat([judge.route([reading]) for reading in readings])
    assert (together - alone).abs().max() < BOUND


def test_points_of_categories_without_files_may_be_named(tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER, tmp_path / "rm")
    said = json.loads((folder / "routing.json").read_text())
    said["points"]["roleplay"] = ["empathy_ability"]
    (folder / "routing.json").write_text(json.dumps(said))
    assert list(read_reward_model(folder).categories) == ["chat", "subj_qa"]


def test_files_of_earlier_phases_and_releases_are_left_alone(tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER, tmp_path / "rm")
    (folder / "innermoe/chat/ckpts/phase1.pth").write_bytes(b"?")
    (folder / "innermoe/text/ckpts").mkdir(parents=True)  # not trained yet
    change(folder / ROUTER, lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": t[
        "value_head.bias"].clone()})  # fmt: skip
    assert read_reward_model(folder).digest == read_reward_model(FOLDER).digest


def test_what_the_digest_is_of(tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER, tmp_path / "rm")
    first = read_reward_model(folder)
    change(folder / INNER, lambda t: t | {"prelu.weight": t["prelu.weight"] + 1})
    assert read_reward_model(folder).digest != first.digest


def change(file: Path, how: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    save_file(how(load_file(file)), file)


def without(pattern: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda t: {n: v for n, v in t.items() if not re.search(pattern, n)}


def wider(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda t: t | {name: torch.cat([t[name], t[name]], -1)}


def nan(t: dict[str, Any]) -> dict[str, Any]:
    name = next(n for n in t if "lora_A" in n)
    return t | {name: torch.full_like(t[name], float("nan"))}


@pytest.mark.parametrize(
    ("file", "how", "code"),
    [
        (INNER, without(r"v_proj\.lora_B\.empathy"), "missing_tensor"),
        (INNER, without("final_value_head2.bias"), "missing_tensor"),
        (INNER, without(r"lora_[AB]\.empathy"), "setting_mismatch"),
        (INNER, without("v_proj.lora"), "setting_mismatch"),  # target_modules
        (INNER, wider("final_value_head1.weight"), "bad_shape"),
        (INNER, lambda t: t | {"prelu.weight": torch.ones(3)}, "bad_shape"),
        (INNER, nan, "not_finite"),
        (INNER, lambda t: t | {"surprise.weight": torch.ones(3)}, "unexpected_tensor"),
        (INNER, lambda t: t | {"prelu.weight": torch.ones(1, dtype=torch.long)}, "bad_dtype"),
        (ROUTER, without("^value_head.weight"), "missing_tensor"),
        (ROUTER, without("^model"), "missing_tensor"),
        (ROUTER, lambda t: t | {"value_head.weight": torch.ones(4, 32)}, "setting_mismatch"),
        (ROUTER, lambda t: t | {"head.weight": torch.ones(4)}, "unexpected_tensor"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, file: str, how: Any, code: str) -> None:
    folder = shutil.copytree(FOLDER, tmp_path / "rm")
    change(folder / file, how)
    assert refusal(folder) == code


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ({"lora_alpha": None}, "bad_value"),
        ({"lora_alpha": "4"}, "bad_value"),
        ({"lora_alpha": float("nan")}, "bad_json"),
        ({"categories": ["chat"]}, "bad_value"),
        ({"categories": ["chat", "subj_qa"]}, "setting_mismatch"),
        ({"categories": ["chat", "chat", "subj_qa", "a", "b"]}, "bad_value"),
        ({"points": {"chat": ["logic"]}}, "setting_mismatch"),
        ({"points": {"unheard": ["logic"]}}, "bad_value"),
        ({"points": []}, "bad_value"),
        ({"target_modules": ["q_proj"]}, "setting_mismatch"),
        ({"extra": 1}, "unknown_key"),
        ({"system": "reclora"}, "bad_value"),
        (["lora_alpha"], "missing_setting"),
        (["points"], "missing_setting"),
        (["categories"], "missing_setting"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, said: Any, code: str) -> None:
    folder = shutil.copytree(FOLDER, tmp_path / "rm")
    had = json.loads((folder / "routing.json").read_text())
    had = had | said if isinstance(said, dict) else {k: v for k, v in had.items() if k not in said}
    (folder / "routing.json").write_text(json.dumps(had))
    assert refusal(folder) == code


def test_settings_may_be_given(tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER, tmp_path / "rm")
    (folder / "routing.json").unlink()
    given = read_reward_model(folder, META["user_args"])
    assert given.digest == read_reward_model(FOLDER).digest
    assert refusal(FOLDER, {"lora_alpha": 8}) == "setting_mismatch"


def test_the_system_may_be_named(tmp_path: Path) -> None:
    given = META["user_args"] | {"system": "dmoerm"}
    assert read_reward_model(FOLDER, given).digest == read_reward_model(FOLDER).digest


def test_folders_that_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == "missing_file"
    folder = shutil.copytree(FOLDER, tmp_path / "rm")
    shutil.rmtree(folder / "innermoe/chat")
    shutil.rmtree(folder / "innermoe/subj_qa")
    assert refusal(folder) == "missing_file"
    (folder / ROUTER).rename((folder / ROUTER).with_suffix(".pth"))
    assert refusal(folder) == "pickle_refused"


def test_as_an_adapter_it_is_named() -> None:
    with pytest.raises(AdapterError) as caught:
        load_adapter(FOLDER)
    assert caught.value.code == "unsupported_feature"
    assert "vllm-lora-ext reward" in caught.value.text


def refusal(folder: Path, settings: dict[str, Any] | None = None) -> str:
    with pytest.raises(AdapterError) as caught:
        read_reward_model(folder, settings)
    assert "fix: " in caught.value.text
    return caught.value.code


def test_a_base_of_another_architecture_is_refused() -> None:
    with pytest.raises(AdapterError) as caught:
        Judge(read_reward_model(FOLDER), str(FIXTURES / "bases/base_llama"), "cpu", ENGINE)
    assert caught.value.code == "wrong_base"
    with pytest.raises(AdapterError) as caught:
        Judge(read_reward_model(FOLDER), "/no/such/base", "cpu", ENGINE)
    assert caught.value.code == "not_found"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ({}, "router_ids is missing"),
        ({"router_ids": [5]}, "inner_ids is missing"),
        ({"router_ids": [], "inner_ids": [5]}, "router_ids"),
        ({"router_ids": [5], "inner_ids": [80]}, "inner_ids"),
        ({"router_ids": [80], "inner_ids": [5]}, "router_ids"),
        ({"router_ids": [-1], "inner_ids": [5]}, "router_ids[0]"),
        ({"router_ids": [1.5], "inner_ids": [5]}, "router_ids[0]"),
        ({"router_ids": ["5"], "inner_ids": [5]}, "router_ids[0]"),
        ({"router_ids": [5], "inner_ids": [5] * 513}, "too long"),
        ({"router_ids": [5], "inner_ids": [5], "more": 1}, "more"),
        ([5], "wrong"),
        ("text", "wrong"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, "reply"),
        ({"messages": [{"role": "system", "content": "a"}] * 2}, "role"),
        ({"messages": [{"role": "user", "content": "a"},
                       {"role": "assistant", "content": "b"}]}, "tokenizer"),
    ],
)  # fmt: skip
def test_texts_that_are_refused(text: Any, words: str) -> None:
    judge = Judge(read_reward_model(FOLDER), str(BASE), "cpu", ENGINE)
    with pytest.raises(AdapterError) as caught:
        judge.read(text, "texts[3]")
    assert caught.value.code == "bad_value"
    assert "texts[3]" in caught.value.text and words in caught.value.text


def test_a_chat_is_read_as_the_authors_do(tmp_path: Path) -> None:
    """Every turn of the user to the router; the last turn and its reply to the experts."""
    base = shutil.copytree(BASE, tmp_path / "base")
    add_tokenizer(base)
    judge = Judge(read_reward_model(FOLDER), str(base), "cpu", ENGINE)
    chat = [("user", "t10 t11"), ("assistant", "t12"), ("user", "t13"), ("assistant", "t14 t15")]
    reading = judge.read({"messages": [{"role": r, "content": c} for r, c in chat]}, "text")
    assert reading.router_ids == [5, 10, 11, 5, 13]
    assert reading.inner_ids == [5, 13, 6, 14, 15, 7]


def test_hidden_states_need_no_padding_mask(base: Any) -> None:
    ids = texts()[0]["inner_ids"]
    with torch.inference_mode():
        padded = base(torch.tensor([ids + [0] * 9])).last_hidden_state[0, len(ids) - 1]
    assert (padded - hidden_of(base, ids)).abs().max() < 1e-6
