"""`systems` and `inspect` as a user runs them: why not, and how much memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_runs import NAMES, good, run
from safetensors.torch import save_file
from typer.testing import CliRunner

from vllm_lora_ext.adapters import load_adapter
from vllm_lora_ext.adapters.model import LowRank, MixBlock, RoutedAdapter, RoutedModule
from vllm_lora_ext.cli import app
from vllm_lora_ext.kernels.gated_lora import Site
from vllm_lora_ext.kernels.gated_lora.backends import choice
from vllm_lora_ext.routing import GateSpec
from vllm_lora_ext.summary import adapter_bytes, slot_bytes, summarise


def test_systems() -> None:
    code, rows = run("systems")
    assert code == 0
    by_name = {row["name"]: row for row in rows}
    assert by_name["loramoe"]["status"] == "served" and not by_name["loramoe"]["reason"]
    assert by_name["lily"]["status"] == "refused" and by_name["lily"]["reason"]
    assert by_name["hira"]["status"] == "convert" and by_name["hira"]["needs"] == ["base", "rank"]
    plain = CliRunner().invoke(app, ["systems"])
    assert plain.exit_code == 0 and "LoRAMoE" in plain.stdout
    assert "lily is refused" in plain.stdout


def test_inspect_says_why_a_known_system_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LILY"}))
    names = [f"base_model.model.model.layers.0.mlp.up_proj.lily_{p}.weight" for p in
             ("A", "B", "router")]  # fmt: skip
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "adapter_model.safetensors")
    code, found = run("inspect", tmp_path)
    assert code == 1
    assert found["system"]["name"] == "lily"
    assert found["system"]["reason"][:30] in found["error"]["message"]
    done = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert done.exit_code == 1 and "Lily" in done.output


@pytest.mark.parametrize("name", NAMES)
def test_inspect_counts_what_is_there(name: str) -> None:
    code, found = run("inspect", good(name))
    adapter = load_adapter(good(name))
    assert code == 0
    assert sum(group["layers"] for group in found["modules"]) == len(adapter.modules)
    assert sum(group["layers"] for group in found["blocks"]) == len(adapter.blocks)
    assert found["paper"] and found["title"] and found["format"]
    assert 0 < found["adapter_mib"] <= found["slot_mib"]
    assert CliRunner().invoke(app, ["inspect", str(good(name))]).exit_code == 0


def test_memory_counts_blocks_and_a_shared_a_once() -> None:
    router = GateSpec(source="router", blocks=(2, 2, 2), score="softmax")
    shared = RoutedModule(torch.ones(2, 10), torch.ones(7, 6), router, torch.ones(3, 10))
    parts = {"up_proj": LowRank(torch.ones(6, 10), torch.ones(14, 6)),
             "down_proj": LowRank(torch.ones(6, 14), torch.ones(10, 6))}  # fmt: skip
    block = MixBlock(router, torch.ones(3, 10), parts)
    one = RoutedAdapter({"m.up": shared}, "x")
    both = RoutedAdapter({"m.up": shared}, "x", blocks={"model.layers.0.mlp": block})
    assert adapter_bytes(one) == 2 * (2 * 10 + 7 * 6) + 4 * 3 * 10
    assert adapter_bytes(both) - adapter_bytes(one) == 4 * 3 * 10 + 2 * 2 * (6 * 10 + 6 * 14)
    assert slot_bytes(one, 8, on_cpu=True) == 4 * ((8 + 3) * 10 + 8 * 7)
    sizes = ((10, (14, 14)), (14, (10,)))  # vLLM fuses up_proj with gate_proj
    sites = [Site(1, k, n, 8, 4, torch.bfloat16, "cpu") for k, n in sizes]
    sites[0].reserve_routers(3)
    more = sum(t.nbytes for s in sites for t in (s.a_SRK, s.router_SGK, *s.bt_SRN))
    assert slot_bytes(both, 8, True) - slot_bytes(one, 8, True) == more
    found = summarise(both)
    assert (found["rank"], found["router_rows"]) == (6, 3)
    (group,) = found["blocks"]
    assert (group["experts"], group["ranks"], group["layers"]) == (3, [2], 1)
    assert found["modules"][0]["shared_a"]


@pytest.mark.parametrize("on_cpu", [False, True])
def test_the_memory_of_a_slot_is_what_is_allocated(on_cpu: bool) -> None:
    """Linears have buffers of ours; the embedding and the output matrix those of vLLM."""
    plain, wide = GateSpec(), GateSpec(source="router", blocks=(1,) * 20)
    modules = {
        "model.layers.0.up": RoutedModule(
            torch.ones(20, 3000), torch.ones(2000, 20), wide, torch.ones(20, 3000)
        ),
        "lm_head": RoutedModule(torch.ones(4, 3000), torch.ones(5000, 4), plain),
        "model.embed_tokens": RoutedModule(
            torch.ones(4, 5000), torch.ones(3000, 4), plain, kind="embedding"
        ),
    }
    found = summarise(RoutedAdapter(modules, "x"))
    assert "--max-lora-rank 32" in found["flags"]
    backend = choice.without_triton("cpu") if on_cpu else choice.triton()
    site = Site(1, 3000, (2000,), 32, 32, torch.bfloat16, "cpu", backend)
    site.reserve_routers(20)
    ours = [site.a_SRK, site.router_SGK, *site.bt_SRN]
    if not on_cpu:
        ours += [site.store.tables.ints_SI, site.store.tables.floats_SF]
    theirs = 2 * 2 * 32 * (5000 + 3000)
    seen = found["slot_mib_cpu" if on_cpu else "slot_mib"]
    assert seen == round((sum(t.nbytes for t in ours) + theirs) / 2**20, 2)


def test_memory_of_fused_layers() -> None:
    """By the sizes of their slices, where an adapter does not have them all."""

    def slot(**out: int) -> int:
        modules = {
            f"a.{name}_proj": RoutedModule(
                torch.ones(2, 12 if name == "o" else 10), torch.ones(n, 2)
            )
            for name, n in out.items()
        }
        return slot_bytes(RoutedAdapter(modules, "plain"), 8, on_cpu=True)

    def sites(*layers: tuple[int, tuple[int, ...]]) -> int:
        return sum(4 * 8 * (len(sizes) * width + sum(sizes)) for width, sizes in layers)

    output = (12, (10,))
    assert slot(q=12, k=6, v=6) == slot(q=12, v=6) == slot(q=12, k=6) == sites((10, (12, 6, 6)))
    assert slot(v=6, o=10) == sites((10, (12, 6, 6)), output)
    assert slot(q=12) == sites((10, (12, 12, 12)))
    assert slot(gate=20) == slot(up=20) == slot(gate=20, up=20) == sites((10, (20, 20)))
    assert slot(down=20) == sites((10, (20,)))


@pytest.mark.parametrize("command", ["systems", "inspect", "convert", "verify"])
def test_help_teaches_and_documents_exit_codes(command: str) -> None:
    done = CliRunner().invoke(app, [command, "--help"])
    text = " ".join(done.stdout.replace("│", " ").split())
    assert done.exit_code == 0
    assert "Example" in text and f"vllm-lora-ext {command}" in text
    assert "Exit code 0" in text
