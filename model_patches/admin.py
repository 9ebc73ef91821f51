"""Who may change what is loaded."""

from __future__ import annotations

import hmac
from pathlib import Path

from vllm.logger import init_logger

from vllm_lora_ext.errors import AdapterError
from vllm_lora_ext.model_patches.exchange import Exchange
from vllm_lora_ext.settings import read_token

TOKEN_HEADER = "x-lora-ext-token"

logger = init_logger(f"vllm.{__name__}")


class AdminToken:
    """The token of the setting `admin_token_file`, read anew each time: it may be changed while the
    server runs."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def check(self, exchange: Exchange | None) -> None:
        """Raises AdapterError `no_token`, `wrong_token`.

        Args:
            exchange: None: the server itself asks, for what it was started with.
        """
        if exchange is None:
            return
        given = exchange.headers.get(TOKEN_HEADER)
        if given is None:
            raise AdapterError(
                "no_token", "adapters of this server are loaded, replaced and unloaded by its"
                " operator only", fix=f"send the token in the header {TOKEN_HEADER}",
            )  # fmt: skip
        if not hmac.compare_digest(given.encode(), self._token().encode()):
            raise AdapterError(
                "wrong_token", "this is not the token of the server's operator",
                fix="ask the operator",
            )  # fmt: skip

    def _token(self) -> str:
        try:
            return read_token(self._path)
        except AdapterError as error:
            logger.error("%s", error.text)
            raise AdapterError(
                "wrong_token", "the server's token cannot be read now", fix="ask the operator"
            ) from None
