"""The setting `merge`: off by default, errors that say what to do."""

from __future__ import annotations

import pytest

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.settings import LoraExtSettings


def _read(**merge):
    return LoraExtSettings.from_additional_config({"lora_ext": {"merge": merge}})


def test_off_by_default_and_hashable(tmp_path):
    assert LoraExtSettings().merge is None
    settings = _read(adapters={"a": str(tmp_path)}, store=str(tmp_path / "store"))
    assert hash(settings) == hash(_read(adapters={"a": str(tmp_path)}, store=f"{tmp_path}/store"))
    assert settings.merge.folder() == tmp_path / "store"


def test_the_engine_may_read_what_was_merged(tmp_path):
    section = {"adapter_roots": [str(tmp_path)], "merge": {"store": str(tmp_path / "s")}}
    settings = LoraExtSettings.from_additional_config({"lora_ext": section})
    assert settings.readable_roots() == (tmp_path.resolve(), tmp_path / "s")
    assert LoraExtSettings().readable_roots() is None


def test_paths_are_looked_for_in_the_front_end_only(tmp_path):
    """Workers read the same settings, on machines that may have none of these folders."""
    describe = {"library": f"{tmp_path}/library", "model": f"{tmp_path}/model"}
    settings = _read(
        adapters={"a": f"{tmp_path}/a"}, recipes={"r": f"{tmp_path}/r.yaml"}, describe=describe
    )
    assert settings.merge.adapters == {"a": tmp_path / "a"}
    for made in ("a", "r.yaml", "library", "model"):
        with pytest.raises(AdapterError, match=f"{tmp_path}/{made} does not exist"):
            settings.check_front_end()
        path = tmp_path / made
        path.touch() if made == "r.yaml" else path.mkdir()
    settings.check_front_end()


@pytest.mark.parametrize(
    ("merge", "words"),
    [
        ({"max_terms": 0}, ["merge.max_terms", "seen: 0", "1 or more"]),
        ({"max_seconds": float("nan")}, ["merge.max_seconds", "above 0"]),
        ({"bogus": 1}, ["no setting named bogus", "max_terms"]),
        ({"adapters": {"a": "/no/such"}}, ["merge.adapters.a", "does not exist", "folder"]),
        ({"adapters": {"a+b": "/tmp"}}, ["merge.adapters"]),
        ({"recipes": {"w": "/tmp"}}, ["merge.recipes.w", "is not a file"]),
        ({"describe": {"library": "/tmp", "bogus": 1, "model": "/tmp"}}, ["merge.describe has no"]),
        ({"describe": {"library": "/tmp", "model": "/tmp", "top_k": 0}}, ["merge.describe.top_k"]),
    ],
)
def test_bad_settings(merge, words):
    with pytest.raises(AdapterError) as caught:
        _read(**merge).check_front_end()
    assert caught.value.code == "bad_settings"
    for word in words:
        assert word in caught.value.text
