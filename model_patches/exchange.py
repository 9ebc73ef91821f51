"""One HTTP exchange with a client, as the code that answers it sees it.

Target: `GenerateBaseServing.__init__`, whose `system_fingerprint` stands in answers. The middleware
(`Exchanges`) is put around the server's app by `adapters_http`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from vllm.entrypoints.generate.base.serving import GenerateBaseServing

VERSION_HEADER = "x-lora-ext-version"
"""Of an answer: the version of the adapter that gave it, or that now stands behind a name."""


@dataclass
class Exchange:
    """A request and what its answer will say.

    Args:
        headers: lower-case name → value, of the request.
        version: the adapter's; empty: none had a part in it.
    """

    headers: dict[str, str]
    version: str = ""


_current: ContextVar[Exchange | None] = ContextVar("lora_ext_exchange", default=None)

_Scope = MutableMapping[str, Any]
_Send = Callable[[_Scope], Awaitable[None]]


def current() -> Exchange | None:
    """The exchange that this code works for; None where nobody asked over HTTP."""
    return _current.get()


def note_version(version: str) -> None:
    """Has the answer say which version of its adapter gave it."""
    exchange = _current.get()
    if exchange is not None:
        exchange.version = version


class Exchanges:
    """ASGI middleware: makes the exchange, and the header of its answer."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: _Scope, receive: Any, send: _Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange({k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]})

        async def sending(message: _Scope) -> None:
            if message["type"] == "http.response.start" and exchange.version:
                header = VERSION_HEADER.encode(), exchange.version.encode()
                message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        token = _current.set(exchange)
        try:
            await self._app(scope, receive, sending)
        finally:
            _current.reset(token)


def _fingerprint(serving: Any) -> str | None:
    """Stock's, and behind it the adapter's version; none where the operator wants none."""
    stock: str | None = serving.__dict__.get("_lora_ext_fingerprint")
    exchange = _current.get()
    if stock is None or exchange is None or not exchange.version:
        return stock
    return f"{stock}-{exchange.version}"


def _keep(serving: Any, stock: str | None) -> None:
    serving.__dict__["_lora_ext_fingerprint"] = stock


def apply() -> None:
    """On the class that all routes which generate text have in common."""
    GenerateBaseServing.system_fingerprint = property(_fingerprint, _keep)
