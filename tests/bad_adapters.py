"""Adapter folders that must be refused, as a table: engine and HTTP tests use the same ones.

    entry = build_bad("truncated", destination)

`stage` is "load" when `load_adapter` refuses the folder, "fit" when `check_fits` does, against
the tiny base model that the good folder was made for and the limits in `FIT`.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

FIXTURES = Path(__file__).parent / "fixtures"
ROUTED = FIXTURES / "routed"
GOOD = {name: ROUTED / name / "adapter" for name in ("plain-a", "loramoe-a", "meteora-a")}
# Made for a request, or acting on some tokens.
CONDITIONED = {
    name: FIXTURES / "conditioned" / name / "adapter"
    for name in ("reclora-a", "wavllm-a", "mmlora-a")
}
FIT = {"max_rank": 64, "max_router_rows": 32}

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]


class Bad(NamedTuple):
    build: Callable[[Path, Path], None]
    code: str
    good: str = "plain-a"
    stage: str = "load"


def weights_file(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def copy(dst: Path, good: Path) -> None:
    if dst != good:  # a second change to the same folder
        shutil.copytree(good, dst, dirs_exist_ok=True, symlinks=True)


def with_tensors(change: Callable[[Tensors], object]) -> Callable[[Path, Path], None]:
    """A builder that changes the tensors of a good folder in place."""

    def build(dst: Path, good: Path) -> None:
        copy(dst, good)
        tensors = load_file(weights_file(dst))
        change(tensors)
        whole = {
            name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()
        }
        save_file(whole, weights_file(dst), metadata={"format": "pt"})

    return build


def with_json(change: Callable[[Config], object], name: str = "adapter_config.json") -> Any:
    """A builder that changes a JSON file of a good folder in place."""

    def build(dst: Path, good: Path) -> None:
        copy(dst, good)
        config = json.loads((dst / name).read_text())
        change(config)
        (dst / name).write_text(json.dumps(config))

    return build


def with_text(old: str, new: str, name: str = "adapter_config.json") -> Any:
    """A builder that replaces text in a JSON file, for what json.dumps would not write."""

    def build(dst: Path, good: Path) -> None:
        copy(dst, good)
        text = (dst / name).read_text()
        assert old in text
        (dst / name).write_text(text.replace(old, new, 1))

    return build


def with_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path, Path], None]:
    """A builder that changes the bytes of the safetensors file."""

    def build(dst: Path, good: Path) -> None:
        copy(dst, good)
        file = weights_file(dst)
        file.write_bytes(change(file.read_bytes()))

    return build


def with_files(change: Callable[[Path], object]) -> Callable[[Path, Path], None]:
    def build(dst: Path, good: Path) -> None:
        copy(dst, good)
        change(dst)

    return build


def key(tensors: Tensors, part: str) -> str:
    """The first tensor name with `part` in it."""
    return next(name for name in sorted(tensors) if part in name)


def drop(part: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(key(tensors, part))


def replace(part: str, new: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({(name := key(tensors, part)): new(tensors[name])})


def poison(part: str, value: float) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        tensors[key(tensors, part)].view(-1)[0] = value

    return change


def add(name: str, *shape: int) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: torch.ones(shape)})


def rename(old: str, new: str) -> Callable[[Tensors], object]:
    """Rename a part of all names that hold it."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def widen(rank: int) -> Callable[[Path, Path], None]:
    """A plain adapter whose every module has `rank` ranks, config and tensors agreeing."""

    def build(dst: Path, good: Path) -> None:
        def change(tensors: Tensors) -> None:
            for name, t in tensors.items():
                a = "lora_A" in name
                shape = (rank, t.shape[1]) if a else (t.shape[0], rank)
                tensors[name] = torch.full(shape, 0.01)

        with_tensors(change)(dst, good)
        with_json(lambda c: c.update(r=rank))(dst, dst)

    return build


def resize(dst: Path, good: Path) -> None:
    """An adapter of a wider model of another name."""

    def change(tensors: Tensors) -> None:
        for name, t in tensors.items():
            a = "lora_A" in name
            tensors[name] = torch.full((t.shape[0], 96) if a else (96, t.shape[1]), 0.01)

    with_tensors(change)(dst, good)
    with_json(lambda c: c.update(base_model_name_or_path="org/another-model"))(dst, dst)


def more_experts(count: int) -> Callable[[Path, Path], None]:
    """LoRAMoE with `count` experts of rank 1."""

    def build(dst: Path, good: Path) -> None:
        def change(tensors: Tensors) -> None:
            modules = {n.rsplit(".lora_", 1)[0] for n in tensors}
            wide = {m: tensors[f"{m}.lora_A0.weight"].shape[1] for m in modules}
            out = {m: tensors[f"{m}.lora_B0.weight"].shape[0] for m in modules}
            tensors.clear()
            for m in modules:
                tensors[f"{m}.lora_route.weight"] = torch.full((count, wide[m]), 0.01)
                for e in range(count):
                    tensors[f"{m}.lora_A{e}.weight"] = torch.full((1, wide[m]), 0.01)
                    tensors[f"{m}.lora_B{e}.weight"] = torch.full((out[m], 1), 0.01)

        with_tensors(change)(dst, good)
        with_json(lambda c: c.update(r=1, lora_nums=count))(dst, dst)

    return build


def pickle_only(dst: Path) -> None:
    file = weights_file(dst)
    tensors = load_file(file)
    file.unlink()
    torch.save(tensors, dst / "adapter_model.bin")


def hostile_pickle(dst: Path) -> None:
    weights_file(dst).unlink()
    (dst / "adapter_model.bin").write_bytes(pickle.dumps(print))


def link_to_nothing(name: str) -> Callable[[Path], object]:
    """Replace a file by a link to nowhere."""

    def change(dst: Path) -> None:
        (dst / name).unlink()
        (dst / name).symlink_to("gone")

    return change


def shard_missing(dst: Path) -> None:
    """An index of two files, one of which is there."""
    names = sorted(load_file(weights_file(dst)))
    weights_file(dst).rename(dst / SHARD)
    table = dict.fromkeys(names, SHARD) | {names[0]: SHARD.replace("00001-", "00002-")}
    (dst / INDEX).write_text(json.dumps({"weight_map": table}))


def header(length: int) -> Callable[[bytes], bytes]:
    return lambda data: length.to_bytes(8, "little") + data[8:]


def huge_tensor(dst: Path) -> None:
    """A tiny file whose table of contents claims a tensor of 100 GB."""
    table = {
        "a.lora_A.weight": {"dtype": "F32", "shape": [5, 5 << 30], "data_offsets": [0, 100 << 30]}
    }
    text = json.dumps(table).encode()
    weights_file(dst).write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 64)


SIDE = "routing.json"
SHARD = "adapter_model-00001-of-00002.safetensors"
INDEX = "adapter_model.safetensors.index.json"
NAN, INF = float("nan"), float("inf")

BAD: dict[str, Bad] = {
    # files
    "truncated": Bad(with_bytes(lambda data: data[: len(data) // 2]), "bad_safetensors"),
    "empty_file": Bad(with_bytes(lambda data: b""), "bad_safetensors"),
    "header_only_half": Bad(with_bytes(lambda data: data[:100]), "bad_safetensors"),
    "header_of_100_gb": Bad(with_bytes(header(100 << 30)), "bad_safetensors"),
    "header_not_json": Bad(with_bytes(lambda d: d[:8] + b"x" * 40 + d[48:]), "bad_safetensors"),
    "tensor_of_100_gb": Bad(with_files(huge_tensor), "bad_safetensors"),
    "no_weights": Bad(with_files(lambda dst: weights_file(dst).unlink()), "missing_file"),
    "pickle_only": Bad(with_files(pickle_only), "pickle_refused"),
    "hostile_pickle": Bad(with_files(hostile_pickle), "pickle_refused"),
    "two_weight_files": Bad(
        with_files(lambda d: shutil.copy(weights_file(d), d / "adapter_model.safetensors")),
        "unexpected_file", "meteora-a",
    ),
    "shard_missing": Bad(with_files(shard_missing), "missing_file"),
    "shards_without_index": Bad(
        with_files(lambda d: weights_file(d).rename(d / SHARD)), "missing_file"
    ),
    "index_of_nothing": Bad(
        with_files(lambda d: weights_file(d).rename(d / INDEX)), "bad_json"
    ),
    "weights_are_a_folder": Bad(
        with_files(lambda d: (weights_file(d).unlink(), (d / "model.safetensors").mkdir())),
        "bad_file",
    ),
    "weights_link_to_nothing": Bad(
        with_files(link_to_nothing("adapter_model.safetensors")), "missing_file"
    ),
    "config_link_to_nothing": Bad(
        with_files(link_to_nothing("adapter_config.json")), "unknown_format"
    ),
    "int64": Bad(with_tensors(replace("q_proj.lora_A", lambda t: t.long())), "bad_dtype"),
    "float64_too_large": Bad(
        with_tensors(replace("q_proj.lora_A", lambda t: t.double() + 1e300)), "not_finite"
    ),
    # adapter_config.json
    "config_broken": Bad(with_text('"r": 8', '"r": 8 8'), "bad_json"),
    "config_list": Bad(
        with_files(lambda d: (d / "adapter_config.json").write_text("[1]")), "bad_json"
    ),
    "config_empty": Bad(
        with_files(lambda d: (d / "adapter_config.json").write_text("")), "bad_json"
    ),
    "config_not_utf8": Bad(
        with_files(lambda d: (d / "adapter_config.json").write_bytes(b"\xff\xfe{}")), "bad_json"
    ),
    "config_deep": Bad(
        with_files(lambda d: (d / "adapter_config.json").write_text('{"a":' * 200000)), "bad_json"
    ),
    "config_twice_r": Bad(with_text('"r": 8', '"r": 8, "r": 4'), "bad_json"),
    "config_5_mib": Bad(with_text('"r": 8', '"r": 8' + " " * (5 << 20)), "too_large"),
    "config_missing": Bad(
        with_files(lambda d: (d / "adapter_config.json").unlink()), "unknown_format"
    ),
    "alpha_nan": Bad(with_text('"lora_alpha": 16', '"lora_alpha": NaN'), "bad_json"),
    "alpha_1e999": Bad(with_text('"lora_alpha": 16', '"lora_alpha": 1e999'), "bad_json"),
    "alpha_1e30": Bad(with_json(lambda c: c.update(lora_alpha=1e30)), "bad_value"),
    "alpha_400_digits": Bad(with_json(lambda c: c.update(lora_alpha=10**400)), "bad_value"),
    "alpha_text": Bad(with_json(lambda c: c.update(lora_alpha="16")), "bad_value"),
    "alpha_missing": Bad(with_json(lambda c: c.pop("lora_alpha")), "missing_key"),
    "r_zero": Bad(with_json(lambda c: c.update(r=0)), "bad_value"),
    "r_negative": Bad(with_json(lambda c: c.update(r=-8)), "bad_value"),
    "r_other": Bad(with_json(lambda c: c.update(r=4)), "rank_mismatch"),
    "peft_type_unknown": Bad(
        with_json(lambda c: c.update(peft_type="SOLORA")), "unknown_peft_type"
    ),
    "oft": Bad(with_json(lambda c: c.update(peft_type="OFT")), "unsupported_feature"),
    "peft_type_empty": Bad(with_json(lambda c: c.update(peft_type="")), "unknown_peft_type"),
    "peft_type_list": Bad(with_json(lambda c: c.update(peft_type=["LORA"])), "unknown_peft_type"),
    "slow_pattern": Bad(
        with_json(lambda c: c.update(rank_pattern={"(.|..|...)*[^a-z]": 8})), "bad_value"
    ),
    "broken_pattern": Bad(with_json(lambda c: c.update(rank_pattern={"(": 8})), "bad_value"),
    "moram_without_a_bank": Bad(with_json(lambda c: c.update(use_moram=True)), "missing_key"),
    "unknown_number": Bad(with_json(lambda c: c.update(moram_topk=4)), "unknown_key"),
    "dora": Bad(with_json(lambda c: c.update(use_dora=True)), "missing_tensor"),
    "dora_vectors": Bad(
        with_tensors(add("base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector", 224)),
        "unsupported_feature",
    ),
    "alora_text": Bad(with_json(lambda c: c.update(alora_invocation_tokens="go")), "bad_value"),
    "alora_negative": Bad(
        with_json(lambda c: c.update(alora_invocation_tokens=[5, -6])), "bad_value"
    ),
    "alora_flags": Bad(
        with_json(lambda c: c.update(alora_invocation_tokens=[True])), "bad_value"
    ),
    "alora_empty": Bad(with_json(lambda c: c.update(alora_invocation_tokens=[])), "bad_value"),
    "bias_all": Bad(with_json(lambda c: c.update(bias="all")), "unsupported_feature"),
    "pissa": Bad(
        with_json(lambda c: c.update(init_lora_weights="pissa_niter_4")), "unsupported_feature"
    ),
    "modules_to_save": Bad(
        with_json(lambda c: c.update(modules_to_save=["lm_head"])), "unsupported_feature"
    ),
    # tensors of an ordinary LoRA
    "no_tensors": Bad(with_tensors(lambda t: t.clear()), "unknown_format"),
    "b_missing": Bad(with_tensors(drop("up_proj.lora_B")), "missing_tensor"),
    "a_missing": Bad(with_tensors(drop("up_proj.lora_A")), "missing_tensor"),
    "extra_tensor": Bad(with_tensors(add("surprise", 2, 2)), "unexpected_tensor"),
    "a_twice": Bad(
        with_tensors(add("model.layers.0.mlp.up_proj.lora_A.default.weight", 8, 128)),
        "duplicate_tensor",
    ),
    "b_other_rank": Bad(
        with_tensors(replace("up_proj.lora_B", lambda t: t[:, :4])), "rank_mismatch"
    ),
    "rank_64_tensors": Bad(
        with_tensors(replace("up_proj.lora_A", lambda t: t.repeat(8, 1))), "rank_mismatch"
    ),
    "a_transposed": Bad(with_tensors(replace("up_proj.lora_A", lambda t: t.T)), "rank_mismatch"),
    "a_vector": Bad(with_tensors(replace("up_proj.lora_A", lambda t: t[0])), "rank_mismatch"),
    "a_no_columns": Bad(with_tensors(replace("up_proj.lora_A", lambda t: t[:, :0])), "bad_shape"),
    "a_nan": Bad(with_tensors(poison("up_proj.lora_A", NAN)), "not_finite"),
    "b_inf": Bad(with_tensors(poison("up_proj.lora_B", INF)), "not_finite"),
    "b_overflows": Bad(with_tensors(poison("up_proj.lora_B", 3e38)), "not_finite"),
    # LoRAMoE
    "router_missing": Bad(with_tensors(drop("lora_route")), "missing_tensor", "loramoe-a"),
    "expert_missing": Bad(with_tensors(drop("lora_A3")), "missing_tensor", "loramoe-a"),
    "expert_too_many": Bad(
        with_tensors(add("base_model.model.model.layers.0.mlp.up_proj.lora_A8.weight", 2, 128)),
        "unexpected_tensor", "loramoe-a",
    ),
    "router_nan": Bad(with_tensors(poison("lora_route", NAN)), "not_finite", "loramoe-a"),
    "router_short": Bad(
        with_tensors(replace("lora_route", lambda t: t[:7])), "bad_shape", "loramoe-a"
    ),
    "expert_other_rank": Bad(
        with_tensors(replace("lora_B2", lambda t: t[:, :1])), "rank_mismatch", "loramoe-a"
    ),
    "lora_nums_missing": Bad(
        with_json(lambda c: c.pop("lora_nums")), "missing_key", "loramoe-a"
    ),
    "lora_nums_huge": Bad(
        with_json(lambda c: c.update(lora_nums=10**9)), "bad_value", "loramoe-a"
    ),
    "lora_nums_more": Bad(
        with_json(lambda c: c.update(lora_nums=9)), "missing_tensor", "loramoe-a"
    ),
    # MeteoRA
    "sidecar_missing": Bad(
        with_files(lambda d: (d / SIDE).unlink()), "missing_setting", "meteora-a"
    ),
    "top_k_missing": Bad(
        with_json(lambda c: c.pop("top_k"), SIDE), "missing_setting", "meteora-a"
    ),
    "k_more_than_experts": Bad(
        with_json(lambda c: c.update(top_k=7), SIDE), "k_too_large", "meteora-a"
    ),
    "k_zero": Bad(with_json(lambda c: c.update(top_k=0), SIDE), "bad_gate", "meteora-a"),
    "temperature_nan": Bad(
        with_text('"temperature": 1', '"temperature": NaN', SIDE), "bad_json", "meteora-a"
    ),
    "temperature_zero": Bad(
        with_json(lambda c: c.update(temperature=0), SIDE), "bad_gate", "meteora-a"
    ),
    "temperature_null": Bad(
        with_json(lambda c: c.update(temperature=None), SIDE), "bad_gate", "meteora-a"
    ),
    "order_short": Bad(
        with_json(lambda c: (c["expert_order"].pop(), c.pop("scaling")), SIDE),
        "setting_mismatch", "meteora-a",
    ),
    "order_twice": Bad(
        with_json(lambda c: c["expert_order"].__setitem__(1, "task_0"), SIDE), "bad_value",
        "meteora-a",
    ),
    "order_unknown": Bad(
        with_json(lambda c: c["expert_order"].__setitem__(1, "task_9"), SIDE), "missing_file",
        "meteora-a",
    ),
    "order_escapes": Bad(
        with_json(lambda c: c["expert_order"].__setitem__(1, "../task_1"), SIDE),
        "path_not_allowed", "meteora-a",
    ),
    "order_absolute": Bad(
        with_json(lambda c: c["expert_order"].__setitem__(1, "/etc"), SIDE),
        "path_not_allowed", "meteora-a",
    ),
    "scaling_other": Bad(
        with_json(lambda c: c["scaling"].__setitem__(1, 4.0), SIDE), "setting_mismatch",
        "meteora-a",
    ),
    "sidecar_unknown_key": Bad(
        with_json(lambda c: c.update(topk=2), SIDE), "unknown_key", "meteora-a"
    ),
    "gate_missing": Bad(with_tensors(drop("moe_gate")), "missing_tensor", "meteora-a"),
    "gate_short": Bad(
        with_tensors(replace("moe_gate", lambda t: t[:5])), "setting_mismatch", "meteora-a"
    ),
    "unknown_lora_tensor": Bad(
        with_tensors(add("base_model.model.model.layers.0.mlp.up_proj.lora_C.weight", 2)),
        "unexpected_tensor", "meteora-a",
    ),
    # made for a request
    "reclora_hard": Bad(
        with_json(lambda c: c.update(routing_mode="hard"), SIDE), "unsupported_feature", "reclora-a"
    ),
    "reclora_no_mode": Bad(
        with_json(lambda c: c.pop("mode"), SIDE), "missing_setting", "reclora-a"
    ),
    "reclora_other_gate": Bad(
        with_json(lambda c: c.update(which_in_gate="lora"), SIDE), "missing_tensor", "reclora-a"
    ),
    "reclora_other_rank": Bad(
        with_json(lambda c: c.update(lora_r=3), SIDE), "rank_mismatch", "reclora-a"
    ),
    "reclora_experts": Bad(
        with_json(lambda c: c.update(lora_assemble_num=7), SIDE), "bad_shape", "reclora-a"
    ),
    "reclora_user": Bad(
        with_json(lambda c: c.update(ctr_hidden_size=21), SIDE), "bad_shape", "reclora-a"
    ),
    "reclora_module_lost": Bad(
        with_json(lambda c: c.update(layers=["q", "k", "v"]), SIDE), "missing_tensor", "reclora-a"
    ),
    "reclora_module_more": Bad(
        with_json(lambda c: c.update(layers=["q"]), SIDE), "unexpected_tensor", "reclora-a"
    ),
    "reclora_nan": Bad(with_tensors(poison("ctr_final_layer", NAN)), "not_finite", "reclora-a"),
    "wavllm_no_layout": Bad(
        with_json(lambda c: c.pop("rope_layout"), SIDE), "missing_setting", "wavllm-a"
    ),
    "wavllm_no_gate": Bad(with_tensors(drop("scale_fc_2.weight")), "missing_tensor", "wavllm-a"),
    "wavllm_b_cut": Bad(
        with_tensors(replace("wv_lora_B", lambda t: t[:, :-1])), "bad_shape", "wavllm-a"
    ),
    "wavllm_layer_lost": Bad(
        with_tensors(lambda t: [t.pop(n) for n in list(t) if "layers.1." in n]),
        "missing_tensor", "wavllm-a",
    ),
    "wavllm_stranger": Bad(with_tensors(add("gpt_model.new", 2)), "unexpected_tensor", "wavllm-a"),
    "mmlora_half": Bad(with_tensors(drop("L_Slora_B")), "missing_tensor", "mmlora-a"),
    "mmlora_other_out": Bad(
        with_tensors(replace("V_Slora_B", lambda t: t[:-1])), "bad_shape", "mmlora-a"
    ),
    "mmlora_no_factor": Bad(
        with_json(lambda c: c.pop("scaling_visual"), SIDE), "missing_setting", "mmlora-a"
    ),
    "mmlora_other_system": Bad(
        with_json(lambda c: c.update(system="wavllm"), SIDE), "bad_value", "mmlora-a"
    ),
    # against the model and the server
    "layer_unknown": Bad(
        with_tensors(rename("layers.2.", "layers.7.")), "unknown_module", stage="fit"
    ),
    "other_hidden_size": Bad(
        with_tensors(replace("q_proj.lora_A", lambda t: t[:, :96])), "shape_mismatch", stage="fit"
    ),
    "other_base": Bad(resize, "wrong_base", stage="fit"),
    "rank_too_large": Bad(widen(96), "rank_too_large", stage="fit"),
    "rank_beyond_vllm": Bad(widen(600), "rank_too_large", stage="fit"),
    "router_too_large": Bad(more_experts(40), "router_too_large", "loramoe-a", "fit"),
}  # fmt: skip


def build_bad(name: str, dst: Path) -> Bad:
    """Make the bad folder `name` at `dst`; the entry says which code it must give."""
    entry = BAD[name]
    dst.mkdir(parents=True, exist_ok=True)
    entry.build(dst, (GOOD | CONDITIONED)[entry.good])
    return entry
