"""Writes docs/dashboard.json, a Grafana dashboard of the plugin's metrics and some of vLLM's own.

python scripts/dashboard.py [--check]
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parent.parent / "docs" / "dashboard.json"
_WIDTH, _HEIGHT = 8, 8


def _rate(counter: str, by: str = "") -> str:
    grouped = f"sum by ({by}) " if by else "sum"
    return f"{grouped}(rate({counter}[$__rate_interval]))"


def _quantile(q: float, histogram: str) -> str:
    return f"histogram_quantile({q}, {_rate(f'{histogram}_bucket', 'le')})"


# Title, unit, what it says, and its lines: legend → query.
PANELS: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    ("Adapters held", "short", "In a slot, or in host memory only.",
     {"{{residency}}": "sum by (residency) (lora_ext:adapters)"}),
    ("Adapters by system", "short", "What is held, by the system that made it.",
     {"{{system}}": "sum by (system) (lora_ext:adapters)"}),
    ("Host memory of adapters", "bytes", "At the limit, each load evicts an idle adapter.",
     {"held": "sum(lora_ext:resident_bytes)", "limit": "sum(lora_ext:limit_bytes)"}),
    ("Slots", "short", "A step computes at most so many adapters.",
     {"used": "sum(lora_ext:slots_used)", "slots": "sum(lora_ext:slots)"}),
    ("Swaps per step", "short", "Adapters that go into a slot in a step. Above 1: more slots.",
     {"swaps": f"{_rate('lora_ext:activations_total')} / {_rate('lora_ext:adapter_steps_total')}"}),
    ("Time spent on swaps", "percentunit", "Of the thread that runs the steps.",
     {"share": _rate("lora_ext:activation_seconds_total")}),
    ("Bytes into slots", "Bps", "From host memory, all workers.",
     {"bytes": _rate("lora_ext:activation_bytes_total")}),
    ("Loads", "ops", "Adapters that were read and checked.",
     {"loads": _rate("lora_ext:load_seconds_count"),
      "evicted": _rate("lora_ext:adapters_evicted_total")}),
    ("Load seconds", "s", "From the request to load to its answer.",
     {"p50": _quantile(0.5, "lora_ext:load_seconds"),
      "p99": _quantile(0.99, "lora_ext:load_seconds")}),
    ("Refusals", "ops", "Answers that are a typed error, by code (docs/errors.md).",
     {"{{code}}": _rate("lora_ext:refusals_total", "code")}),
    ("Derived adapters", "ops", "Mixes, scales and users: made anew, found, and put out.",
     {"made": _rate("lora_ext:derived_adapters_made_total"),
      "found": _rate("lora_ext:derived_adapters_hit_total"),
      "evicted": _rate("lora_ext:derived_adapters_evicted_total"),
      "gates computed": _rate("lora_ext:gate_passes_total")}),
    ("Expert load", "percentunit", "Share of each expert in traced requests (setting trace).",
     {"{{adapter}} {{expert}}": "sum by (adapter, expert) (lora_ext:traced_expert_weight)"
      " / on (adapter) group_left sum by (adapter) (lora_ext:traced_expert_weight)"}),
    ("Time to first token", "s", "vLLM's own.",
     {"p50": _quantile(0.5, "vllm:time_to_first_token_seconds"),
      "p99": _quantile(0.99, "vllm:time_to_first_token_seconds")}),
    ("Requests", "short", "vLLM's own.",
     {"running": "sum(vllm:num_requests_running)", "waiting": "sum(vllm:num_requests_waiting)"}),
)  # fmt: skip


def dashboard() -> dict[str, Any]:
    """As Grafana imports it."""
    return {
        "title": "vLLM adapters (vllm-lora-ext)", "uid": "vllm-lora-ext", "schemaVersion": 39,
        "refresh": "30s", "time": {"from": "now-1h", "to": "now"}, "tags": ["vllm", "lora"],
        "templating": {"list": [
            {"name": "datasource", "label": "Prometheus", "type": "datasource",
             "query": "prometheus"},
        ]},
        "panels": [_panel(i, *panel) for i, panel in enumerate(PANELS)],
    }  # fmt: skip


def _panel(i: int, title: str, unit: str, says: str, lines: dict[str, str]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "id": i + 1, "type": "timeseries", "title": title, "description": says,
        "datasource": source, "fieldConfig": {"defaults": {"unit": unit, "min": 0}},
        "gridPos": {"x": i % 3 * _WIDTH, "y": i // 3 * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "targets": [
            {"refId": chr(ord("A") + n), "datasource": source, "expr": query, "legendFormat": name}
            for n, (name, query) in enumerate(lines.items())
        ],
    }  # fmt: skip


def metric_names() -> set[str]:
    """Every metric that the written dashboard asks for."""
    panels = json.loads(FILE.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    return {name for query in queries for name in re.findall(r"[a-z_]+:\w+", query)}


def main() -> None:
    text = json.dumps(dashboard(), indent=1) + "\n"
    if "--check" in sys.argv[1:]:
        if FILE.read_text() != text:
            raise SystemExit(f"{FILE} is not what this script writes: run it without --check")
        return
    FILE.write_text(text)


if __name__ == "__main__":
    main()
