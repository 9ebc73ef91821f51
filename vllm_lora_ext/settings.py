"""What an operator can set, and the switch that turns the plugin off.

Settings come through vLLM's own flag, so they are part of its compile-cache key:

    vllm serve BASE --enable-lora --additional-config '{"lora_ext": {"host_cache_mb": 4096}}'
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from vllm_lora_ext.errors import AdapterError

KEY = "lora_ext"
DISABLE_ENV = "VLLM_LORA_EXT_DISABLE"
ROUTER_ROWS_LIMIT = 512
OLDER_VERSIONS = 2
"""Of each adapter that is replaced, those that stay for a rollback, while there is room."""
ROUTER_ROWS_DEFAULT = 64
GATES_LIMIT = 1 << 16
USUAL_EXPERTS = 16

_MERGE, _REWARD, _RANKS = "merge", "reward", "rank_attention"
_TOKEN_LENGTH = 16
_EXAMPLE = f'--additional-config \'{{"{KEY}": {{"host_cache_mb": 4096}}}}\''
_ALLOWED = {
    "adapter_roots": "a list of existing folders, or null for no limit",
    "max_router_rows": f"a whole number from 1 to {ROUTER_ROWS_LIMIT}, or null",
    "host_cache_mb": "a whole number, 1 or more, or null",
    "slot_wait_s": "a number, 0 or more",
    "triton": "true, false, or null",
    "extend_weights": "a number, 0 or more",
    "fuse_activation": "true or false",
    "prefetch_weights": "true or false",
    "trace": "true or false",
    "pickle": '"weights_only", or null for no pickles',
    "two_pass": "true or false, or null for what --lora-modules needs",
    "rank_attention": "an object with heads and head_size, or null for no such adapters",
    "max_gates": f"a whole number from 1 to {GATES_LIMIT}, or null",
    "accept_config_keys": "a list of keys of adapter_config.json",
    "max_request_adapters": "a whole number, 1 or more",
    "max_request_spans": "a whole number, 1 or more",
    "merge": "an object, or null for no merged adapters by name",
    "reward": "an object, or null for no reward models",
    "admin_token_file": "an existing file, or null for no token",
}
_ALLOWED_REWARD = {
    "models": "an object of name: existing folder",
    "router_device": "a device of torch, cpu or cuda",
}
_ALLOWED_RANKS = {
    "heads": "a whole number from 1 to 64",
    "head_size": "a whole number from 8 to 512 that the attention backend takes",
}
_ALLOWED_MERGE = {
    "enabled": "true or false",
    "adapters": "an object of name: existing folder",
    "recipes": "an object of name: existing recipe file",
    "describe": "an object of library, model, top_k and temperature, or null",
    "max_terms": "a whole number, 1 or more",
    "max_rank": "a whole number, 1 or more, or null for --max-lora-rank",
    "max_mixes": "a whole number, 1 or more",
    "max_disk_mb": "a whole number, 1 or more",
    "max_seconds": "a number above 0",
    "store": "a folder, or null for one in the user's cache",
}
_INSIDE = {_MERGE: _ALLOWED_MERGE, _REWARD: _ALLOWED_REWARD, _RANKS: _ALLOWED_RANKS}
_Kind = Literal["folder", "file"]
_ON = {"1", "true", "yes"}
_OFF = {"", "0", "false", "no"}


def _real_folder(item: object) -> Path:
    path = _path(item)
    if wrong := _missing(path, "folder"):
        raise ValueError(wrong)
    return path.resolve()


def _missing(path: Path, kind: _Kind) -> str | None:
    """What is wrong with a path, or None."""
    if not path.exists():
        return f"{path} does not exist"
    right = path.is_dir() if kind == "folder" else path.is_file()
    return None if right else f"{path} is not a {kind}"


def _path(item: object) -> Path:
    if not isinstance(item, str | Path) or not str(item):
        raise ValueError("not a path")
    return Path(item).expanduser()


# Of the front end: they need not be there where a worker reads the same settings.
_FrontPath = Annotated[Path, BeforeValidator(lambda item: _path(item).resolve())]
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?$")]


class DescribeSettings(BaseModel):
    """Adapters from descriptions (SG-LoRA): `describe:"answers with ISO codes"`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    library: _FrontPath
    """A folder that `ExpertLibrary.save` wrote, the experts' folders below it."""

    model: _FrontPath
    """The sentence-embedding model that the library was built with."""

    top_k: int = Field(default=4, ge=1)
    temperature: float = Field(default=0.1, gt=0, allow_inf_nan=False)


class MergeSettings(BaseModel):
    """Merged adapters by name in a request: `model: "cat:math*0.6+code*0.4"`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    enabled: bool = True

    adapters: dict[_Name, _FrontPath] = {}
    """Adapters to merge beside those that vLLM has loaded: name → folder."""

    recipes: dict[_Name, _FrontPath] = {}
    """`recipe:NAME` → the recipe's file."""

    describe: DescribeSettings | None = None

    max_terms: int = Field(default=8, ge=1)
    """Adapters in one mix."""

    max_rank: int | None = Field(default=None, ge=1)
    """Ranks of a mix; never more than `--max-lora-rank`."""

    max_mixes: int = Field(default=64, ge=1)
    """Different mixes that the server knows at a time; the one that idles longest goes first."""

    max_disk_mb: int = Field(default=4096, ge=1)
    """Of merged adapters that are kept for the next time."""

    max_seconds: float = Field(default=120.0, gt=0, allow_inf_nan=False)
    """For one merge."""

    store: Annotated[Path, BeforeValidator(_path)] | None = None
    """Where merged adapters lie; on several machines, a folder that all of them see."""

    def folder(self) -> Path:
        """Where merged adapters lie."""
        if self.store is not None:
            return self.store.absolute()
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(cache).expanduser() / "vllm-lora-ext" / "merged"

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    def _paths(self) -> Iterator[tuple[tuple[str, str], Path, _Kind]]:
        for name, path in self.adapters.items():
            yield ("adapters", name), path, "folder"
        for name, path in self.recipes.items():
            yield ("recipes", name), path, "file"
        if self.describe is not None:
            yield ("describe", "library"), self.describe.library, "folder"
            yield ("describe", "model"), self.describe.model, "folder"


class RewardSettings(BaseModel):
    """Reward models (DMoERM) of a pooling server: `POST /v1/lora_ext/reward`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    models: dict[_Name, _FrontPath] = Field(min_length=1)
    """Name in a request → folder."""

    router_device: str = Field(default="cpu", min_length=1)
    """Where the routers run, in the server's front end."""

    def __hash__(self) -> int:
        return hash(self.model_dump_json())


class RankAttentionSettings(BaseModel):
    """What adapters keep of each token in each slice of a linear layer (`routing.attention`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    heads: int = Field(ge=1, le=64)
    """Most heads of an adapter's attention."""

    head_size: int = Field(ge=8, le=512)
    """Most numbers of a head."""


class LoraExtSettings(BaseModel):
    """Everything under the key `lora_ext` of vLLM's `--additional-config`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    adapter_roots: tuple[Path, ...] | None = None
    """Adapters are only read from below these folders. None: from anywhere vLLM can read."""

    max_router_rows: int | None = Field(default=None, ge=1, le=ROUTER_ROWS_LIMIT)
    """Router rows reserved per adapter slot and layer. None: `min(max_lora_rank, 64)`."""

    host_cache_mb: int | None = Field(default=None, ge=1)
    """Host memory for loaded adapters, on each rank. None: as much as `--max-cpu-loras` adapters of
    the full rank need, and at least 2048."""

    slot_wait_s: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Seconds for which requests of other adapters may be preferred to one that waits for a slot,
    because theirs are in the slots already."""

    triton: bool | None = None
    """On a GPU: the fused Triton kernels in place of the PyTorch path. None: when they pass a
    check at start; true: the engine does not start when they fail it."""

    extend_weights: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """On a GPU: A and routers of all slots stand below a layer's weight where they are at most this
    share of its rows and it is not quantised, so that small steps need one launch less. 0.1 is
    where that pays; 0: never. Base rows in a step with adapters may differ in their last bits."""

    fuse_activation: bool = False
    """On a GPU: the launch behind gate and up of an MLP activates as well, where the kernels know
    the activation. gate and up are then not rounded in between; experts that are MLP blocks are
    refused."""

    prefetch_weights: bool = False
    """On a GPU, with `VLLM_LORA_ENABLE_DUAL_STREAM=1`: beside a layer's product in a small step,
    its adapters' B and the next layer's A and routers are fetched into L2, on the second stream."""

    trace: bool = False
    """Whether a request may ask what its adapter's gates decided. Needs an engine without CUDA
    graphs; off, nothing of it is there."""

    two_pass: bool | None = None
    """Whether X-LoRA is served: steps with it run the model twice, and every token takes twice the
    KV cache. None: where `--lora-modules` has such a folder."""

    max_gates: int | None = Field(default=None, ge=1, le=GATES_LIMIT)
    """With `two_pass`: gates that a classifier may give a token, layers times experts. None: 16
    experts for each linear layer. It costs 4 bytes for each token of `--max-num-batched-tokens`."""

    rank_attention: RankAttentionSettings | None = None
    """Experimental: adapters whose A x attends to that of earlier tokens are served, and every
    token has room for their keys and values in the KV cache. None: they are refused."""

    pickle: Literal["weights_only"] | None = None
    """Whether `adapter_model.bin` is read where there is no safetensors file. None: refused."""

    accept_config_keys: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Keys of `adapter_config.json` that no format knows, and that are ignored, not refused."""

    max_request_adapters: int = Field(default=8, ge=1)
    """Adapters that one request may name."""

    max_request_spans: int = Field(default=64, ge=1)
    """Spans of tokens that one request may name."""

    merge: MergeSettings | None = None
    """Merged adapters by name in a request. None: such names are unknown models."""

    reward: RewardSettings | None = None
    """Reward models by name in a request. None: there are none."""

    admin_token_file: _FrontPath | None = None
    """A file whose one line is the token without which a client may load, replace and unload no
    adapter (header `X-Lora-Ext-Token`). None: whoever reaches the load routes may."""

    @field_validator("accept_config_keys", mode="before")
    @classmethod
    def _as_tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("adapter_roots", mode="before")
    @classmethod
    def _real_folders(cls, value: object) -> object:
        if value is None:
            return None
        if not isinstance(value, list | tuple):
            raise ValueError("not a list")
        return tuple(_real_folder(item) for item in value)

    def check_front_end(self) -> None:
        """Raises AdapterError `bad_settings` where a folder that the front end uses is missing."""
        if self.admin_token_file is not None:
            read_token(self.admin_token_file)
        for name, path, kind in () if self.merge is None else self.merge._paths():
            if wrong := _missing(path, kind):
                raise _wrong_value([_MERGE, *name], wrong, str(path), _ALLOWED_MERGE.get(name[0]))
        for model, path in ({} if self.reward is None else self.reward.models).items():
            if wrong := _missing(path, "folder"):
                name = ("models", model)
                raise _wrong_value([_REWARD, *name], wrong, str(path), _ALLOWED_REWARD["models"])

    @property
    def of_kernels(self) -> dict[str, object]:
        """By name, the settings that turn kernels on which nothing else needs."""
        return {
            "extend_weights": self.extend_weights, "fuse_activation": self.fuse_activation,
            "prefetch_weights": self.prefetch_weights,
        }  # fmt: skip

    def readable_roots(self) -> tuple[Path, ...] | None:
        """Where the engine may read adapters: `adapter_roots`, and what was merged from there."""
        if self.adapter_roots is None:
            return None
        return (*self.adapter_roots, (self.merge or MergeSettings()).folder())

    def reading(self) -> dict[str, Any]:
        """Arguments of `load_adapter` for an adapter that the engine reads."""
        return {
            "roots": self.readable_roots(), "pickle": self.pickle,
            "accept_config_keys": self.accept_config_keys, "parts": True,
        }  # fmt: skip

    def router_rows(self, max_lora_rank: int) -> int:
        """Router rows per slot for an engine started with this `--max-lora-rank`."""
        if self.max_router_rows is not None:
            return self.max_router_rows
        return min(max_lora_rank, ROUTER_ROWS_DEFAULT)

    @classmethod
    def from_additional_config(cls, additional_config: Mapping[str, Any] | None) -> LoraExtSettings:
        """The settings inside vLLM's additional config; defaults where it has none.

        Read and checked once a process: the same section gives the same object.
        """
        section = dict(additional_config or {}).get(KEY)
        if section is None:
            return cls()
        if not isinstance(section, Mapping):
            raise AdapterError(
                "bad_settings",
                f"{KEY} in --additional-config is not an object",
                seen=section,
                limit=f"an object with any of {', '.join(_ALLOWED)}",
                fix=_EXAMPLE,
            )
        return _read(json.dumps(dict(section), default=str))


def read_token(path: Path) -> str:
    """The token in a file.

    Raises:
        AdapterError: `bad_settings`, there is none, or one that is easily guessed.
    """
    try:
        token = path.read_text().strip()
    except (OSError, ValueError) as error:
        raise _bad_token(f"{path} cannot be read: {error}", None) from None
    if len(token) < _TOKEN_LENGTH or not token.isascii() or len(token.split()) != 1:
        raise _bad_token(f"{path} holds no token", f"{len(token)} characters")
    return token


def _bad_token(what: str, seen: str | None) -> AdapterError:
    return AdapterError(
        "bad_settings", f"setting {KEY}.admin_token_file is wrong ({what})", seen=seen,
        limit=f"one ASCII word of {_TOKEN_LENGTH} characters or more",
        fix="openssl rand -hex 32 > FILE; chmod 600 FILE",
    )  # fmt: skip


@lru_cache(maxsize=8)
def _read(section: str) -> LoraExtSettings:
    try:
        return LoraExtSettings(**json.loads(section))
    except ValidationError as error:
        raise _as_adapter_error(error) from None


def disabled(environ: Mapping[str, str] = os.environ) -> bool:
    """True when the off switch is set: vLLM then runs as if the plugin were not installed."""
    value = environ.get(DISABLE_ENV, "").strip().lower()
    if value in _ON:
        return True
    if value in _OFF:
        return False
    raise AdapterError(
        "bad_settings",
        f"the environment variable {DISABLE_ENV} has an unknown value",
        seen=value,
        limit="1, true or yes to turn the plugin off; 0, false, no or unset to keep it on",
        fix=f"{DISABLE_ENV}=1, or unset it",
    )


def _as_adapter_error(error: ValidationError) -> AdapterError:
    first = error.errors()[0]
    *parents, last = [str(part) for part in first["loc"]] or [KEY]
    allowed, known = (_ALLOWED, parents[:1] or [last])
    if parents[:1] in ([_MERGE], [_REWARD], [_RANKS]):
        allowed = _INSIDE[parents[0]]
        known = [*parents[1:2], last]
    if first["type"] == "extra_forbidden":
        return AdapterError(
            "bad_settings",
            f"{'.'.join([KEY, *parents])} has no setting named {last}",
            seen=last,
            limit=allowed.get("describe") if parents[1:] else ", ".join(allowed),
            fix=f"remove or rename it, for example {_EXAMPLE}",
        )
    reason = first["msg"].removeprefix("Value error, ")
    return _wrong_value([*parents, last], reason, first["input"], allowed.get(known[0]))


def _wrong_value(name: Sequence[str], reason: str, seen: object, limit: object) -> AdapterError:
    return AdapterError(
        "bad_settings",
        f"setting {'.'.join([KEY, *name])} is wrong ({reason})",
        seen=seen,
        limit=limit,
        fix=f"correct {name[-1]} in --additional-config, or leave it out to get the default",
    )
