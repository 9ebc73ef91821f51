"""Settings of an `adapter_config.json` as PEFT takes them: served with its numbers, or refused."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from peft.tuners.lora import LoraRuntimeConfig
from peft.tuners.lora.config import MontecloraConfig, VeloraConfig
from peft_folders import WEIGHTS, assert_serves, make, of_peft, set_config
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from vllm_lora_ext.adapters import load_adapter
from vllm_lora_ext.adapters.memory import MemorySource, load_memory_adapter
from vllm_lora_ext.adapters.readers import peft_config
from vllm_lora_ext.errors import AdapterError

pytestmark = pytest.mark.filterwarnings("ignore")
DOCS = Path(__file__).parents[2] / "docs/adapters.md"


@pytest.fixture
def base(bases):
    return bases["base_llama"]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "adapter"


def refusal(folder, **options):
    with pytest.raises(AdapterError) as caught:
        load_adapter(folder, **options)
    assert "fix: " in caught.value.text
    return caught.value


PATTERNS = {
    "target_regex": {"target_modules": r".*\.(0|2)\.(self_attn\.(q|v)_proj|mlp\.up_proj)$"},
    "target_long_regex": {
        "target_modules": r"(?:.*?(?:language|text|layers).*?(?:self_attn|attention|mlp).*?"
        r"(?:q_proj|v_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.(?:(?:up_proj)))"
    },
    "exclude_regex": {"target_modules": "all-linear", "exclude_modules": r".*\.[02]\..*_proj"},
    "exclude_list": {"target_modules": "all-linear", "exclude_modules": ["q_proj", "down_proj"]},
    "one_layer": {"layers_to_transform": 1},
    "layers_of_a_list": {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "layers_of_patterns": {"layers_to_transform": [2], "layers_pattern": ["h", r"lay\w+"]},
    "groups_that_repeat": {
        "rank_pattern": {r"(?:\w+\.)*q_proj": 3, r"(layers|h)(\.\d+)+\.mlp\.(up|down)_proj": 5},
        "alpha_pattern": {r"(\w+\.)+down_proj": 40, r"^model\.layers\.1\..*$": 2, ".*": 9},
    },
    "lookaround": {
        "rank_pattern": {r".*(?<!\.1)\.mlp\.(?!down)\w+_proj": 5, r"[\w.]+\.[12]\..*up.*": 7},
        "alpha_pattern": {r"(?=.*\.0\.).*": 3, r"(?P<n>\d)\.mlp.*": 24},
    },
    "dots_and_tails": {
        "rank_pattern": {"model.layers.0.mlp.up_proj": 2, "1.mlp.up_proj": 4, "proj": 6},
        "alpha_pattern": {"mlp.up_proj": 5, "self_attn.q_proj": 7},
        "use_rslora": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", PATTERNS)
def test_patterns(case, folder, base):
    make(folder, base, **PATTERNS[case])
    assert_serves(folder, base, of_peft(folder, base))  # PEFT sorts the tables when it saves


@pytest.mark.parametrize(
    "pattern",
    ["(", "a{2}{3}+*", r"(.|..|...)*[^a-z]", "(?:(?:a?){5000}){5000}", "(((a{0,99}){0,99}){0,99})",
     "x{e<=1}", "[[:alpha:]]+", "a" * 5000, r"\L<names>", "(?V1)a"],
)  # fmt: skip
@pytest.mark.parametrize("table", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_break_or_never_end(table, pattern, folder, base):
    make(folder, base)
    set_config(folder, **{table: {pattern: 8}})
    start = time.process_time()
    error = refusal(folder)
    assert error.code == "bad_value" and table in error.text
    assert time.process_time() - start < 10


def test_many_slow_patterns_share_one_limit(folder, base):
    make(folder, base)
    slow = {rf"(.|..|...)*{i}[^a-z]": 8 for i in range(1000)}
    set_config(folder, rank_pattern=slow)
    start = time.process_time()
    refusal(folder)
    assert time.process_time() - start < 10


def test_as_many_patterns_as_layers_are_quick(folder):
    names = [f"model.layers.{i}.{part}" for i in range(80) for part in
             ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
              "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")]  # fmt: skip
    config = peft_config.read_peft_config(
        {"r": 8, "lora_alpha": 8, "rank_pattern": {name: 1 + i for i, name in enumerate(names)}}
    )
    start = time.process_time()
    assert [config.rank(name) for name in names] == list(range(1, len(names) + 1))
    assert [config.scale(name) for name in names] == [8 / (1 + i) for i in range(len(names))]
    assert time.process_time() - start < 5


def test_a_pattern_that_says_another_rank(folder, base):
    make(folder, base, rank_pattern={"q_proj": 4})
    set_config(folder, rank_pattern={r"(\w+\.)*q_proj": 5})
    assert refusal(folder).code == "rank_mismatch"


class TestValuesThatMeanTheSame:
    @pytest.mark.parametrize(
        ("drop", "values"),
        [
            ((), {"r": 8.0, "lora_alpha": 16.0}),
            (("peft_type",), {}),
            ((), {"peft_type": None}),
            (("task_type", "peft_version", "inference_mode", "auto_mapping", "revision"), {}),
            ((), {"task_type": None, "target_modules": None, "bias": None, "use_rslora": None}),
            (("peft_version",), {"rank_pattern": None, "alpha_pattern": None}),
            ((), {"rank_pattern": {"q_proj": 8.0}, "alpha_pattern": {"q_proj": 16.0}}),
            *(((key,), {}) for key in ("rank_pattern", "alpha_pattern", "use_rslora")),
        ],
    )
    def test_are_served(self, drop, values, folder, base):
        want = make(folder, base)
        set_config(folder, drop, **values)
        assert_serves(folder, base, want)

    @pytest.mark.parametrize(
        ("code", "values"),
        [
            ("bad_value", {"r": 8.5}), ("bad_value", {"r": "8"}), ("bad_value", {"r": True}),
            ("bad_value", {"r": 1e300}), ("bad_value", {"r": None}),
            ("bad_value", {"lora_alpha": "16"}), ("bad_value", {"lora_alpha": None}),
            ("bad_value", {"rank_pattern": {"q_proj": 8.5}}), ("rank_mismatch", {"r": 4.0}),
            ("bad_value", {"rank_pattern": {"q_proj": True}}),
            ("rank_mismatch", {"rank_pattern": {"q_proj": 4.0}}),
            ("unknown_peft_type", {"peft_type": ""}), ("unknown_peft_type", {"peft_type": "lora"}),
        ],
    )  # fmt: skip
    def test_others_are_not(self, code, values, folder, base):
        make(folder, base)
        assert refusal(set_config(folder, **values)).code == code

    def test_without_peft_type_the_names_must_be_those_of_lora(self, folder, base):
        make(folder, base)
        set_config(folder, ("peft_type",), use_moram=True)
        assert refusal(folder).code == "missing_key"


SWITCHES = {
    "dropout": {"lora_dropout": 0.5},
    "runtime": {"runtime_config": LoraRuntimeConfig(ephemeral_gpu_offload=True)},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "no_init": {"init_lora_weights": False},
    "mica": {"init_lora_weights": "mica"},
    "lora_ga": {"init_lora_weights": "lora_ga"},
    "velora": {"velora_config": VeloraConfig()},
    "monteclora": {"monteclora_config": MontecloraConfig()},
    "megatron": {"megatron_core": "my.core"},
}


@pytest.mark.parametrize("case", SWITCHES)
def test_switches_of_training_change_nothing(case, folder, base):
    make(folder, base, **SWITCHES[case])
    assert_serves(folder, base, of_peft(folder, base))


@pytest.mark.parametrize("name", ["velora_embed", "monteclora_sampler.expert_weights"])
def test_what_training_leaves_must_belong_to_it(name, folder, base):
    """Only beside the setting, and at a layer that is adapted."""
    make(folder, base)
    whole = load_file(folder / WEIGHTS)
    for module, said in (("q_proj", None), ("k_proj", {"a": 1})):
        set_config(folder, **{f"{name.split('_')[0]}_config": said})
        left = f"base_model.model.model.layers.0.self_attn.{module}.lora_{name}"
        save_file(whole | {left: torch.ones(4)}, folder / WEIGHTS)
        assert refusal(folder).code == "unexpected_tensor"


@pytest.mark.parametrize(
    "values",
    [
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0, "tau": 0.99}},
        {"loftq_config": {"loftq_bits": 4}},
        {"corda_config": {"corda_method": "ipm"}},
        {"lora_ga_config": {"direction": "ArB2r"}},
        {"runtime_config": {"ephemeral_gpu_offload": True}},
        {"inference_mode": False, "lora_dropout": 0.9},
        {"qalora_group_size": 32, "revision": "main"},
        {"fan_in_fan_out": True},
    ],
)
def test_what_a_config_may_say_besides(values, folder, base):
    want = make(folder, base)
    set_config(folder, **values)
    assert_serves(folder, base, of_peft(folder, base))
    assert_serves(folder, base, want)


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "no"]
)
def test_inits_that_change_the_base(init, folder, base):
    make(folder, base)
    error = refusal(set_config(folder, init_lora_weights=init))
    assert error.code == "unsupported_feature" and "init_lora_weights" in error.text


def test_tied_adapters(folder):
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=True)
    base = LlamaForCausalLM(config).eval()
    make(folder, base, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    assert_serves(folder, base, of_peft(folder, base))


class TestTransposedWeights:
    """Conv1D, GPT-2's layer, keeps [in, out]; A and B, and so the delta, do not."""

    @pytest.fixture(scope="class")
    def gpt2(self):
        torch.manual_seed(0)
        config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=512, n_positions=64)
        return GPT2LMHeadModel(config).eval()

    @pytest.mark.parametrize("said", [True, False])
    def test_lora(self, said, gpt2, folder):
        targets = ["c_attn", "c_fc", "c_proj"]
        want = make(folder, gpt2, target_modules=targets, fan_in_fan_out=said)
        assert_serves(folder, gpt2, want)

    def test_vera(self, gpt2, folder):
        config = VeraConfig(target_modules=["c_attn"], r=8, fan_in_fan_out=True, d_initial=0.5)
        model = get_peft_model(GPT2LMHeadModel(gpt2.config), config).eval()
        model.base_model.model.load_state_dict(gpt2.state_dict(), strict=False)
        for name, weight in model.named_parameters():
            if "vera_lambda_b" in name:
                torch.nn.init.normal_(weight, std=0.5)
        model.save_pretrained(folder)
        assert json.loads((folder / "adapter_config.json").read_text())["fan_in_fan_out"]
        sizes = {"sizes": {"c_attn": [64, 192]}}
        assert_serves(folder, gpt2, of_peft(folder, gpt2), settings=sizes)

    def test_a_transposed_a(self, gpt2, folder):
        make(folder, gpt2, target_modules=["c_attn"], fan_in_fan_out=True)
        tensors = load_file(folder / WEIGHTS)
        name = min(tensors)
        save_file(tensors | {name: tensors[name].T.contiguous()}, folder / WEIGHTS)
        assert refusal(folder).code == "rank_mismatch"


class TestKeysThatNobodyKnows:
    @pytest.mark.parametrize("value", [None, False, {}, [], ""])
    def test_neutral_values_pass(self, value, folder, base):
        want = make(folder, base)
        assert_serves(set_config(folder, some_new_option=value), base, want)

    @pytest.mark.parametrize("value", [16, True, "on", [1], {"a": 1}, 0.5])
    def test_others_need_the_operator(self, value, folder, base):
        want = make(folder, base)
        set_config(folder, some_new_option=value)
        error = refusal(folder)
        assert error.code == "unknown_key"
        assert "some_new_option" in error.text and "accept_config_keys" in error.text
        assert refusal(folder, accept_config_keys=["another"]).code == "unknown_key"
        assert_serves(folder, base, want, accept_config_keys=["some_new_option"])

    @pytest.mark.parametrize(
        ("code", "values"),
        [
            ("unsupported_feature", {"lora_bias": True}), ("unsupported_feature", {"bias": "all"}),
            ("unsupported_feature", {"init_lora_weights": "pissa"}),
            ("missing_key", {"use_moram": True}), ("bad_value", {"r": "8"}),
        ],
    )  # fmt: skip
    def test_what_is_known_is_not_theirs_to_accept(self, code, values, folder, base):
        make(folder, base)
        assert refusal(set_config(folder, **values), accept_config_keys=list(values)).code == code

    def test_of_an_adapter_in_memory(self, folder, base):
        make(folder, base)
        tensors = load_file(folder / WEIGHTS)
        config = json.loads((folder / "adapter_config.json").read_text()) | {"some_new_option": 3}
        source = MemorySource.of(tensors, config)
        with pytest.raises(AdapterError, match="accept_config_keys"):
            load_memory_adapter(source)
        got = load_memory_adapter(source, accept_config_keys=["some_new_option"])
        assert got.modules.keys() == load_adapter(folder).modules.keys()

    def test_of_another_method(self, folder):
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32}
        llama = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
        model = get_peft_model(LlamaForCausalLM(llama), VeraConfig(target_modules=["q_proj"], r=8))
        model.save_pretrained(folder)
        set_config(folder, some_new_option=3)
        given = {"settings": {"sizes": {"q_proj": [32, 32]}}}
        assert "accept_config_keys" in refusal(folder, **given).text
        assert load_adapter(folder, **given, accept_config_keys=["some_new_option"]).modules


def test_every_field_of_pefts_config_is_decided_and_in_the_docs():
    fields = {field.name for field in dataclasses.fields(LoraConfig)} | {"peft_version"}
    decided = peft_config.HARMLESS | peft_config.REFUSED.keys() | {"bias"}
    assert fields <= decided
    rows = set(re.findall(r"`(\w+)`", DOCS.read_text().split("## PEFT's settings")[1]))
    assert fields <= rows
