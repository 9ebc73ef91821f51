"""Files of an adapter folder as people have them: served with PEFT's numbers, or refused."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
from peft_folders import (
    WEIGHTS,
    as_hub_cache,
    as_pickle,
    assert_serves,
    cast,
    make,
    of_peft,
    shard,
    write_index,
)
from safetensors.torch import load_file, save_file

from vllm_lora_ext.adapters import Limits, load_adapter
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.merging import load_factors

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def base(bases):
    return bases["base_llama"]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "adapter"


@pytest.fixture
def want(folder, base):
    return make(folder, base)


def refusal(folder, **options):
    with pytest.raises(AdapterError) as caught:
        load_adapter(folder, **options)
    assert "fix: " in caught.value.text
    return caught.value


class TestOtherFiles:
    @pytest.mark.parametrize(
        ("name", "tensors"),
        [
            ("value_head.safetensors", {"v_head.summary.weight": torch.zeros(1, 128)}),
            ("model.safetensors", {"model.norm.weight": torch.ones(128)}),
            ("optimizer.safetensors", {"exp_avg": torch.ones(3, dtype=torch.int64)}),
            ("new_embeddings.safetensors", {"input_embeddings": torch.ones(2, 128)}),
        ],
    )
    def test_tensors_of_something_else(self, name, tensors, folder, base, want):
        alone = load_adapter(folder).digest
        save_file(tensors, folder / name)
        assert_serves(folder, base, want)
        assert load_adapter(folder).digest == alone

    def test_what_a_trainer_leaves(self, folder, base, want):
        shutil.copytree(folder, folder.parent / "checkpoint-10")
        shutil.move(folder.parent / "checkpoint-10", folder / "checkpoint-10")
        for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth"):
            (folder / name).write_bytes(pickle.dumps(print))
        (folder / "broken.safetensors").write_bytes(b"")
        (folder / "runs.safetensors").mkdir()
        (folder / "README.md").write_text("A LoRA")
        (folder / "tokenizer.json").write_text("{")
        (folder / "model-00001-of-00002.safetensors").write_bytes(b"half a model")
        assert_serves(folder, base, want)

    def test_the_weights_of_something_else_alone(self, folder, want):
        (folder / WEIGHTS).rename(folder / "value_head.safetensors")
        error = refusal(folder)
        assert error.code == "unexpected_file" and "value_head" in error.text

    def test_a_classifier_of_x_lora_is_a_gate(self, folder, want):
        save_file({"last.weight": torch.ones(2, 2)}, folder / "xlora_classifier.safetensors")
        error = refusal(folder)
        assert error.code == "unexpected_file" and "xlora_classifier" in error.text

    def test_without_a_config_two_names_may_both_be_the_weights(self, folder, want):
        (folder / "adapter_config.json").unlink()
        shutil.copy(folder / WEIGHTS, folder / "model.safetensors")
        assert refusal(folder).code == "unexpected_file"


class TestShards:
    @pytest.mark.parametrize("parts", [1, 2, 3])
    def test_are_read_whole(self, parts, folder, base, want):
        whole = load_adapter(folder).digest
        shard(folder, parts)
        assert_serves(folder, base, want)
        assert load_adapter(folder).digest == whole

    def test_of_the_other_name(self, folder, base, want):
        shard(folder, stem="model")
        assert_serves(folder, base, want)

    def test_beside_the_whole(self, folder, base, want):
        whole = (folder / WEIGHTS).read_bytes()
        shard(folder)
        (folder / WEIGHTS).write_bytes(whole)
        (folder / "adapter_model-00002-of-00002.safetensors").unlink()
        assert_serves(folder, base, want)

    def test_a_missing_shard(self, folder, want):
        shard(folder)
        (folder / "adapter_model-00002-of-00002.safetensors").unlink()
        error = refusal(folder)
        assert error.code == "missing_file" and "00002-of-00002" in error.text

    def test_a_missing_index(self, folder, want):
        shard(folder)
        (folder / f"{WEIGHTS}.index.json").unlink()
        error = refusal(folder)
        assert error.code == "missing_file" and "index.json" in error.text

    def test_a_tensor_in_no_shard(self, folder, want):
        table = shard(folder)
        file = folder / "adapter_model-00001-of-00002.safetensors"
        tensors = load_file(file)
        name, _ = tensors.popitem()
        save_file(tensors, file)
        error = refusal(folder)
        assert error.code == "missing_tensor" and name in error.text and name in table

    def test_a_tensor_in_two_shards(self, folder, want):
        table = shard(folder)
        one, two = sorted(set(table.values()))
        first, second = load_file(folder / one), load_file(folder / two)
        save_file(second | {"model.twice": torch.ones(1)}, folder / two)
        save_file(first | {"model.twice": torch.ones(1)}, folder / one)
        write_index(folder, table | {"model.twice": one})
        error = refusal(folder)
        assert error.code == "duplicate_tensor" and "model.twice" in error.text

    def test_a_tensor_that_the_index_puts_elsewhere(self, folder, want):
        table = shard(folder)
        name = min(table)
        other = next(file for file in table.values() if file != table[name])
        write_index(folder, table | {name: other})
        assert refusal(folder).code == "missing_tensor"

    def test_a_tensor_that_the_index_does_not_know(self, folder, want):
        table = shard(folder)
        name = min(table)
        write_index(folder, {n: file for n, file in table.items() if n != name})
        error = refusal(folder)
        assert error.code == "unexpected_tensor" and name in error.text

    def test_a_shard_that_the_index_does_not_know(self, folder, want):
        table = shard(folder)
        extra = "adapter_model-00003-of-00003.safetensors"
        shutil.copy(folder / min(table.values()), folder / extra)
        error = refusal(folder)
        assert error.code == "unexpected_file" and extra in error.text

    @pytest.mark.parametrize(
        "table",
        [None, [], {}, {"a": 1}, {"a": "b.bin"}, {"a": ""}, {"a": "sub/x.safetensors"},
         {"a": "/etc/x.safetensors"}, {"a": "../x.safetensors"}],
    )  # fmt: skip
    def test_an_index_that_is_none(self, table, folder, want):
        shard(folder)
        write_index(folder, table)
        assert refusal(folder).code == "bad_index"

    def test_a_nan_in_the_second(self, folder, want):
        file = folder / sorted(set(shard(folder).values()))[1]
        tensors = load_file(file)
        next(iter(tensors.values())).view(-1)[0] = float("nan")
        save_file(tensors, file)
        assert refusal(folder).code == "not_finite"

    def test_limits_count_all_of_them(self, folder, want):
        shard(folder)
        for limits in (
            Limits(tensors=10), Limits(file_bytes=4000), Limits(header_bytes=50),
            Limits(json_bytes=1500), Limits(read_bytes=2000),
        ):  # fmt: skip
            assert refusal(folder, limits=limits).code == "too_large", limits


class TestLinks:
    def test_into_the_hubs_blobs(self, folder, base, want, tmp_path):
        snapshot = as_hub_cache(folder, tmp_path / "cache")
        assert_serves(snapshot, base, want)
        assert load_adapter(snapshot).digest == load_adapter(folder).digest
        assert_serves(snapshot, base, want, roots=[tmp_path / "cache"])
        assert_serves(snapshot, base, want, roots=[snapshot])

    @pytest.mark.parametrize("absolute", [True, False])
    def test_into_a_store(self, absolute, folder, base, want, tmp_path):
        store = tmp_path / "store"
        store.mkdir()
        for i, file in enumerate(sorted(folder.iterdir())):
            shutil.move(file, store / f"{i}")
            file.symlink_to(store / f"{i}" if absolute else f"../store/{i}")
        assert_serves(folder, base, want)
        assert_serves(folder, base, want, roots=[tmp_path])
        assert_serves(folder, base, want, roots=[folder, store])
        assert refusal(folder, roots=[folder]).code == "path_not_allowed"
        assert refusal(folder, roots=[tmp_path / "elsewhere"]).code == "path_not_allowed"

    def test_of_shards(self, folder, base, want, tmp_path):
        shard(folder)
        snapshot = as_hub_cache(folder, tmp_path / "cache")
        assert_serves(snapshot, base, want, roots=[tmp_path / "cache"])

    def test_into_a_store_with_a_defect(self, folder, want, tmp_path):
        cut = (folder / WEIGHTS).read_bytes()[:-8]
        (tmp_path / "blob").write_bytes(cut)
        (folder / WEIGHTS).unlink()
        (folder / WEIGHTS).symlink_to(tmp_path / "blob")
        assert refusal(folder).code == "bad_safetensors"

    def test_to_nothing_and_to_itself(self, folder, want):
        (folder / WEIGHTS).unlink()
        (folder / WEIGHTS).symlink_to("nowhere")
        assert refusal(folder).code == "missing_file"
        (folder / WEIGHTS).unlink()
        (folder / WEIGHTS).symlink_to(WEIGHTS)
        assert refusal(folder).code == "bad_file"


class TestDtypes:
    @pytest.mark.parametrize(
        "dtype",
        [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16],
    )
    def test_as_peft_reads_them(self, dtype, folder, base, want):
        want = of_peft(cast(folder, dtype), base)
        assert_serves(folder, base, want)
        assert (
            load_adapter(folder).modules["model.layers.0.mlp.up_proj"].a_RK.dtype == torch.float32
        )

    def test_float64_beyond_float32(self, folder, want):
        tensors = load_file(cast(folder, torch.float64) / WEIGHTS)
        tensors[min(tensors)].view(-1)[0] = 1e300
        save_file(tensors, folder / WEIGHTS)
        assert refusal(folder).code == "not_finite"

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
    def test_a_nan_of_eight_bits(self, dtype, folder, want):
        tensors = load_file(folder / WEIGHTS)
        name = min(tensors)
        tensors[name].view(-1)[0] = float("nan")
        save_file(tensors | {name: tensors[name].to(dtype)}, folder / WEIGHTS)
        assert refusal(folder).code == "not_finite"

    def test_eight_bits_with_a_scale_are_quantised(self, folder, want):
        tensors = load_file(cast(folder, torch.float8_e4m3fn) / WEIGHTS)
        save_file(tensors | {min(tensors) + "_scale": torch.ones(1)}, folder / WEIGHTS)
        assert refusal(folder).code == "unexpected_tensor"

    @pytest.mark.parametrize(
        "dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64]
    )
    def test_no_floats(self, dtype, folder, want):
        assert refusal(cast(folder, dtype)).code == "bad_dtype"


class TestPickles:
    @pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
    def test_weights_only_where_allowed(self, name, folder, base, want):
        as_pickle(folder, name)
        error = refusal(folder)
        assert error.code == "pickle_refused" and '"pickle": "weights_only"' in error.text
        assert_serves(folder, base, want, pickle="weights_only")

    def test_of_half_precision(self, folder, base, want):
        want = of_peft(cast(folder, torch.bfloat16), base)
        assert_serves(as_pickle(folder), base, want, pickle="weights_only")

    def test_linked_from_the_hub(self, folder, base, want, tmp_path):
        snapshot = as_hub_cache(as_pickle(folder), tmp_path / "cache")
        assert_serves(snapshot, base, want, pickle="weights_only", roots=[tmp_path])
        assert (
            refusal(folder, pickle="weights_only", limits=Limits(file_bytes=99)).code == "too_large"
        )

    def test_safetensors_come_first(self, folder, base, want):
        (folder / "adapter_model.bin").write_bytes(pickle.dumps(print))
        assert_serves(folder, base, want, pickle="weights_only")

    @pytest.mark.parametrize("hostile", [print, [1], {"a": 1}, {1: torch.ones(1)}, {}])
    def test_that_hold_more_than_tensors(self, hostile, folder, want):
        as_pickle(folder)
        torch.save(hostile, folder / "adapter_model.bin")
        assert refusal(folder, pickle="weights_only").code == "pickle_refused"
        (folder / "adapter_model.bin").write_bytes(pickle.dumps(hostile))
        assert refusal(folder, pickle="weights_only").code == "pickle_refused"

    def test_that_run_code(self, folder, want, tmp_path):
        class Bomb:
            def __reduce__(self):
                return (open, (str(tmp_path / "ran"), "w"))

        as_pickle(folder)
        torch.save({"a": Bomb()}, folder / "adapter_model.bin")
        assert refusal(folder, pickle="weights_only").code == "pickle_refused"
        assert not (tmp_path / "ran").exists()

    def test_of_something_else(self, folder, want):
        as_pickle(folder).joinpath("adapter_model.bin").rename(folder / "optimizer.pt")
        assert refusal(folder, pickle="weights_only").code == "missing_file"

    @pytest.mark.parametrize(
        ("code", "change"),
        [
            ("not_finite", lambda t: t[min(t)].view(-1)[0].fill_(float("inf"))),
            ("missing_tensor", lambda t: t.pop(min(t))),
            ("unexpected_tensor", lambda t: t.update(surprise=torch.ones(2))),
            ("rank_mismatch", lambda t: t.update({min(t): t[min(t)][:4]})),
            ("bad_dtype", lambda t: t.update({min(t): t[min(t)].long()})),
        ],
    )
    def test_are_checked_like_any(self, code, change, folder, want):
        tensors = load_file(as_pickle_source(folder))
        change(tensors)
        torch.save(tensors, folder / "adapter_model.bin")
        (folder / WEIGHTS).unlink()
        assert refusal(folder, pickle="weights_only").code == code

    def test_that_claim_more_than_they_hold(self, folder, want):
        tensors = load_file(folder / WEIGHTS)
        tensors["big"] = torch.ones(1).expand(1 << 20, 1 << 20)
        torch.save(tensors, folder / "adapter_model.bin")
        (folder / WEIGHTS).unlink()
        assert refusal(folder, pickle="weights_only").code == "too_large"


def as_pickle_source(folder):
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    return folder / WEIGHTS


def test_a_merge_knows_no_roots_and_follows_no_link(folder, want, tmp_path):
    """A server that merges must not be sent out of its roots by a link."""
    shutil.move(folder / WEIGHTS, tmp_path / "blob")
    (folder / WEIGHTS).symlink_to(tmp_path / "blob")
    with pytest.raises(AdapterError, match="path_not_allowed"):
        load_factors(folder)
