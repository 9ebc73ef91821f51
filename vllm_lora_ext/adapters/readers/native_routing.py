"""The section `routing` of the native format: each layer's gate, and whose router it has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from vllm_lora_ext.adapters.folder import CONFIG
from vllm_lora_ext.adapters.gates import make_gate
from vllm_lora_ext.adapters.model import RoutedModule
from vllm_lora_ext.adapters.readers.peft_config import bad_value
from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.routing import GateSpec

_KEYS = ("default", "modules", "routers")
_NEEDED = ("default", "modules")
_OF_THE_ROUTER = ("router_GK", "bias_G", "logit_bias_G", "norm")


class Routing:
    """What the section says of the layers that there are.

    Args:
        section: as it stands in the config.
        modules: names of all layers with tensors of their own.
    Attributes:
        gates: module → its gate, that of the entry with the longest tail of its name, or the
            default.
        owners: module → the module whose router it has, where that is another one.
    Raises:
        AdapterError: `bad_value`, `unknown_key`, `missing_key`, `bad_gate`.
    """

    def __init__(self, section: Any, modules: list[str]) -> None:
        if not isinstance(section, dict):
            raise bad_value(f"routing in {CONFIG}", section, "an object")
        for key in sorted(set(section) - set(_KEYS)):
            raise AdapterError(
                "unknown_key", f"routing in {CONFIG} holds an unknown key '{key}'",
                seen=section[key], limit=sorted(_KEYS), fix=f"remove '{key}'",
            )  # fmt: skip
        for key in _NEEDED:  # a lost gate would be a plain LoRA without a word
            if key not in section:
                raise AdapterError(
                    "missing_key", f"routing in {CONFIG} has no '{key}'",
                    fix=f"add \"{key}\", {{}} if there is nothing to say",
                )  # fmt: skip
        default = read_gate(section["default"], "routing.default")
        entries = _table(section, "modules")
        specs = {
            tail: read_gate(fields, f"routing.modules['{tail}']")
            for tail, fields in entries.items()
        }
        chosen = _longest(specs, modules, "modules")
        self.gates = {m: specs[chosen[m]] if m in chosen else default for m in modules}
        self.owners = self._owners(_table(section, "routers"), modules)

    def _owners(self, entries: dict[str, Any], modules: list[str]) -> dict[str, str]:
        owners = {}
        for module, tail in _longest(entries, modules, "routers").items():
            other = entries[tail]
            owner = module[: len(module) - len(tail)] + other if isinstance(other, str) else ""
            if owner not in modules or owner == module:
                raise AdapterError(
                    "bad_gate", f"routing.routers in {CONFIG} gives '{tail}' the router of a layer"
                    " that is not there", seen=other, limit="another layer of the adapter, named"
                    " as far as the layer itself is", fix="mend the layer's name",
                )  # fmt: skip
            owners[module] = owner
        return owners

    def with_routers(self, modules: Mapping[str, RoutedModule]) -> dict[str, RoutedModule]:
        """The layers, each with the router that it has in common with another.

        Raises:
            AdapterError: `unexpected_tensor`, it has one of its own; `missing_tensor`, the other
                has none; `bad_gate`, their gates differ.
        """
        found = dict(modules)
        for name, owner in self.owners.items():
            module, other = modules[name], modules[owner]
            if any(getattr(module, field) is not None for field in _OF_THE_ROUTER):
                raise AdapterError(
                    "unexpected_tensor", f"{name} has a router, and routing.routers in {CONFIG}"
                    f" gives it that of {owner}", fix="remove its tensors, or the entry",
                )  # fmt: skip
            if owner in self.owners or other.router_GK is None:
                raise AdapterError(
                    "missing_tensor", f"{name} has the router of {owner}, which has none of its"
                    " own", limit=f"a tensor {owner}.router.weight", fix="mend routing.routers",
                )  # fmt: skip
            if _choice(module.gate) != _choice(other.gate):
                raise AdapterError(
                    "bad_gate", f"{name} has the router of {owner}, and another gate",
                    seen=module.gate.to_dict(), limit=other.gate.to_dict(),
                    fix="give both layers one gate; only 'blocks' may differ",
                )  # fmt: skip
            found[name] = replace(module, **{f: getattr(other, f) for f in _OF_THE_ROUTER})
        return found


def read_gate(fields: Any, where: str) -> GateSpec:
    """A gate out of the config.

    Raises:
        AdapterError: `bad_value`, and what `make_gate` raises.
    """
    if not isinstance(fields, dict):
        raise bad_value(f"{where} in {CONFIG}", fields, "an object with the fields of a gate")
    return make_gate(fields, where)


def tails(module: str) -> list[str]:
    """A module's name and all its tails: `a.b.c`, `b.c`, `c`."""
    words = module.split(".")
    return [".".join(words[i:]) for i in range(len(words))]


def _table(section: Mapping[str, Any], key: str) -> dict[str, Any]:
    table = section.get(key, {})
    if not isinstance(table, dict):
        raise bad_value(f"routing.{key} in {CONFIG}", table, "an object")
    return table


def _longest(table: Mapping[str, Any], modules: Iterable[str], key: str) -> dict[str, str]:
    """Module → the entry with the longest tail of its name, if there is one."""
    found = {}
    for module in modules:
        tail = next((t for t in tails(module) if t in table), None)
        if tail is not None:
            found[module] = tail
    for tail in table:
        if tail not in found.values():
            raise AdapterError(
                "bad_gate", f"routing.{key} in {CONFIG} has an entry that no layer uses",
                seen=tail, fix="remove it, or mend the layer's name",
            )  # fmt: skip
    return found


def shared_routers(modules: Mapping[str, RoutedModule]) -> dict[str, str]:
    """Module → the first one that has the very same router; modules whose own it is left out."""
    first: dict[tuple[object, ...], str] = {}
    owners = {}
    for name in sorted(modules):
        m = modules[name]
        if m.router_GK is None:
            continue
        key = *(id(getattr(m, field)) for field in _OF_THE_ROUTER), _choice(m.gate)
        owner = first.setdefault(key, name)
        if owner != name:
            owners[name] = owner
    return owners


def _choice(gate: GateSpec) -> GateSpec:
    """A gate without its ranks."""
    return replace(gate, blocks=(1,) * gate.num_gates)


def routing_of(modules: Mapping[str, RoutedModule]) -> dict[str, Any]:
    """The section for these layers: the commonest gate as the default, the others by the layers'
    full names."""
    # Sorted, so that equal adapters give equal files, and equal digests.
    specs = {name: modules[name].gate for name in sorted(modules)}
    default = Counter(specs.values()).most_common(1)[0][0] if specs else GateSpec()
    others = {name: spec.to_dict() for name, spec in specs.items() if spec != default}
    section: dict[str, Any] = {"default": default.to_dict(), "modules": others}
    if routers := shared_routers(modules):
        section["routers"] = routers
    return section
