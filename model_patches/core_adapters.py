"""The adapters of one engine core, and what they mean for its requests.

What `core` patches asks here, what `core_calls` answers is known here.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

import msgspec
from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import RequestStatus

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.conditioned import Conditions, Key
from vllm_lora_ext.model_patches.encoder_keys import key_by_version
from vllm_lora_ext.model_patches.gate_pass import GatePasses
from vllm_lora_ext.model_patches.held import Held
from vllm_lora_ext.model_patches.ledger import Ledger
from vllm_lora_ext.model_patches.loading import Loading
from vllm_lora_ext.model_patches.plan import promised
from vllm_lora_ext.model_patches.traffic import STATS, total
from vllm_lora_ext.model_patches.turns import Turns
from vllm_lora_ext.model_patches.versions import OfVersion
from vllm_lora_ext.settings import LoraExtSettings

KEY = "_lora_ext_key"
"""Attribute of a request: by what its blocks are known."""

_making = threading.Lock()


class CoreAdapters:
    """The adapters of one engine core: its ledger, and what that means for the core's requests."""

    def __init__(self, core: Any) -> None:
        self._core, self._scheduler = core, core.scheduler
        if core.request_block_hasher is not None:
            core.request_block_hasher = self._keyed(core.request_block_hasher)
        self._refused: list[EngineCoreOutput] = []

        def rpc(method: str, *args: Any) -> list[Any]:
            answers: list[Any] = core.model_executor.collective_rpc(method, args=args)
            return answers

        self._rpc = rpc
        self._counted: dict[str, float] = {}
        self._conditions = Conditions(core.vllm_config)
        self._towers = core.vllm_config.lora_config.enable_tower_connector_lora
        self.gates = GatePasses(core, rpc)
        self.loading = Loading(rpc, self.add, lambda lora_id: self.ledger.place(lora_id))
        self.ledger = Ledger(
            rpc,
            core.vllm_config.lora_config.max_loras,
            self._named, self._running, self._replaced, self._lost,
        )  # fmt: skip
        self.ledger.doubt()  # workers may have been called before this was made
        settings = LoraExtSettings.from_additional_config(core.vllm_config.additional_config)
        slots = core.vllm_config.lora_config.max_loras
        self.turns = Turns(core.scheduler, slots, settings.slot_wait_s)

    def _requests(self, at: int) -> list[Any]:
        requests = self._scheduler.requests.values()
        return [r for r in requests if _id_of(r) == at and not r.is_finished()]

    def _named(self) -> set[int]:
        requests = self._scheduler.requests.values()
        named = {_id_of(r) for r in requests if not r.is_finished()} | self.gates.adapters
        return named - {0}

    def _running(self) -> set[int]:
        return {_id_of(r) for r in self._scheduler.running} - {0}

    def add(
        self, lora: LoRARequest, source: Any, at: int | None = None, expected: str | None = None
    ) -> dict[str, Any]:
        """Has an adapter loaded (`Ledger.add`): `{"version": digest, "path": where it is from,
        "evicted": ids, "understands": what a request may say to it, "before": the digest of what
        requests got before, or None, "read": whether there was anything to do}`, or
        `{"error": text}`."""
        before = self.ledger.last(lora.lora_int_id)
        read = self.ledger.reads(lora, source)
        try:
            evicted = self.ledger.add(lora, source, at, expected)
        except AdapterError as error:
            return {"error": str(error)}
        return self._reply(lora.lora_int_id, evicted, before, read)

    def roll_back(self, lora: LoRARequest, version: str, expected: str | None) -> dict[str, Any]:
        """As `Ledger.roll_back`; answers as `add`."""
        before = self.ledger.last(lora.lora_int_id)
        try:
            self.ledger.roll_back(lora, version, expected)
        except AdapterError as error:
            return {"error": str(error)}
        return self._reply(lora.lora_int_id, [], before, read=False)

    def _reply(
        self, lora_id: int, evicted: list[int], before: str | None, read: bool
    ) -> dict[str, Any]:
        held = self.ledger.current(lora_id)
        assert held is not None, "it was just loaded"
        return {
            "version": held.version, "path": held.path, "evicted": evicted,
            "understands": held.understands, "before": before, "read": read,
        }  # fmt: skip

    def state(self, count: bool) -> dict[str, Any]:
        """What is held and where, as plain values.

        Args:
            count: what is held only, and also what was counted since the last time that somebody
                asked so.
        """
        ranks: list[dict[str, Any]] = self._rpc(STATS)
        in_flight = Counter(map(_id_of, self._scheduler.requests.values()))
        state = {
            "adapters": self.ledger.listing(set(ranks[0]["active"]), in_flight, not count),
            "slots": ranks[0]["slots"], "slots_used": len(ranks[0]["active"]),
            "resident_bytes": sum(rank["resident_bytes"] for rank in ranks),
            "limit_bytes": sum(rank["limit_bytes"] for rank in ranks),
        }  # fmt: skip
        if count:
            now = asdict(total(rank["traffic"] for rank in ranks)) | self.ledger.evicted
            state["counts"] = {name: now[name] - self._counted.get(name, 0) for name in now}
            self._counted = now
            state["experts"] = ranks[0]["experts"]
        return state

    def admit(self, request: Any) -> bool:
        """Has the adapter of a new request loaded; the request is refused when it cannot be, or
        when what the request says does not fit the adapter. From here on the request names the
        version that it is computed with."""
        lora: LoRARequest = request.lora_request
        try:
            at = self.ledger.enter(lora, promised(request))
            held = self._held(at)
            self._conditions.complete(request, held, sent=False)
        except AdapterError as error:
            self._refuse(request, error)
            return False
        if lora.load_inplace:  # done
            request.lora_request = lora = msgspec.structs.replace(lora, load_inplace=False)
        if lora.lora_int_id != at:
            request.lora_request = OfVersion.of(lora, at)
        self._rekey(request, held, sent=False)
        return True

    def gate(self, lora: LoRARequest, version: str, ids: list[int]) -> Future[dict[str, Any]]:
        """The gate of an instruction for a template that is loaded, or is now.

        Raises:
            AdapterError: it cannot be loaded, is no such template or another one by now, or the
                ids are none that the model computes.
        """
        at = self.ledger.enter(lora, version)
        held = self._held(at)
        if not held.understands.get("instruction"):
            raise AdapterError(
                "bad_value", "the adapter has no use for an 'instruction'", seen=lora.lora_name,
                fix="leave 'instruction' away",
            )  # fmt: skip
        return self.gates.ask(at, version, ids)

    def step_aside(self) -> None:
        """A step of a core in the front end's own process, which is not waiting for its outputs
        now: they come with the next."""
        outputs, executed = self._core.step_fn()
        self._core.post_step(executed)
        for mine in (outputs or {}).values():
            self._refused += mine.outputs

    def _held(self, at: int) -> Held:
        held = self.ledger.held(at)
        assert held is not None, "what was added is held"
        return held

    def _keyed(self, hasher: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The block hasher; a request that has no key yet gets that of its adapter as it is now.

        It runs in the thread that takes requests in, before `admit` sees them.
        """

        def keyed_hasher(request: Any) -> Any:
            if request.lora_request is not None and not hasattr(request, KEY):
                at = self.ledger.find(request.lora_request.lora_int_id, promised(request))
                held = None if at is None else self.ledger.held(at)
                setattr(request, KEY, held and self._conditions.early_key(request, held))
            return hasher(request)

        return keyed_hasher

    def step(self, step: Callable[[], Any]) -> Any:
        """A step of the core, with what is done before and after it."""
        if self.loading.pending:
            self.loading.poll(idle=not self._scheduler.has_requests())
        self.ledger.tidy()
        self.turns.begin()
        outputs, executed = step()
        self.gates.take(outputs)
        if self._refused:
            outputs = dict(outputs or {})
            mine = outputs.setdefault(0, EngineCoreOutputs())
            mine.outputs = [*self._refused, *mine.outputs]  # in the order in which they came
            self._refused = []
        return outputs, executed

    def _replaced(self, at: int) -> None:
        """Somebody has put other weights into a version's place, behind the ledger's back: no block
        that they compute may be found as the old's.

        What a request has computed so far comes from the old weights. Its blocks from here on
        belong to neither version; their key is the request's own.
        """
        held = self._held(at)
        for request in self._requests(at):
            started = Scheduler._holds_kv_blocks(request)
            sent = started or request.num_preemptions > 0
            try:
                self._conditions.complete(request, held, sent)
            except AdapterError as error:
                self._end(request, error)
                continue
            self._rekey(request, held, sent, salt=request.request_id if started else "")

    def _rekey(self, request: Any, held: Held, sent: bool, salt: str = "") -> None:
        """Has a request's blocks and images known by what its adapter is now.

        Args:
            sent: whether workers have the request, and the names of its images.
        """
        key: Key = self._conditions.key(request, held, salt)
        renamed = self._towers and not sent and key_by_version(request, held.version)
        if renamed or getattr(request, KEY, None) != key:
            setattr(request, KEY, key)
            request.block_hashes.clear()
            request.update_block_hashes()

    def _lost(self, at: int, error: AdapterError) -> None:
        for request in self._requests(at):
            self._end(request, error)

    def _end(self, request: Any, error: AdapterError) -> None:
        self._scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ERROR)
        self._refuse(request, error)

    def _refuse(self, request: Any, error: AdapterError) -> None:
        output = EngineCoreOutput(
            request.request_id, [], finish_reason=FinishReason.ERROR, stop_reason=str(error)
        )
        queue = getattr(self._core, "output_queue", None)
        if queue is None:  # an engine in the front end's own process
            self._refused.append(output)
            return
        outputs = EngineCoreOutputs(outputs=[output], finished_requests={request.request_id})
        queue.put_nowait((request.client_index, outputs))


def _id_of(request: Any) -> int:
    return request.lora_request.lora_int_id if request.lora_request is not None else 0


def adapters_of(core: Any) -> CoreAdapters | None:
    """Of a core; None where LoRA is off.

    Made when first asked for: vLLM loads plugins while a core is being made.
    """
    if core.vllm_config.lora_config is None:
        return None
    found: CoreAdapters | None = core.__dict__.get("_lora_ext")
    if found is None:
        with _making:
            found = core.__dict__.get("_lora_ext")
            if found is None:
                found = core._lora_ext = core.scheduler._lora_ext = CoreAdapters(core)
    return found
