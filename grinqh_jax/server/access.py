"""Who may use the server: names of the host, API keys."""

import hmac
import ipaddress
from collections.abc import Collection, Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from grinqh_jax.server.errors import APIError

OPEN_PATHS = ("/", "/health")
"""Paths that need no API key: a page without data, and the check of a load balancer."""


class Access:
    """Passes a request on if its host is expected and its API key is right."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], hosts: Collection[str] | None):
        """Wraps an application.

        Args:
          app: Application.
          keys: API keys, any of which is right; none are needed if it is empty.
          hosts: Accepted names in the header ``Host``, beside those of loopback; None for any name. Without
            an API key this check keeps away web pages that let a name of theirs point to loopback.
        """
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await refusal.response()(scope, receive, send)

    def _refusal(self, scope: Scope) -> APIError | None:
        headers = Headers(scope=scope)
        host = _host_name(headers.get("host", ""))
        if self._hosts is not None and not (host in self._hosts or is_loopback(host)):
            return APIError(
                403, f"the host {host!r:.80} is not this server's; start it with --allowed-host", code="host"
            )
        if not self._keys or scope["path"] in OPEN_PATHS:
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode()
        right = [hmac.compare_digest(given, each) for each in self._keys]  # each, so that times are equal
        if scheme.lower() == "bearer" and any(right):
            return None
        return APIError(
            401,
            "the API key is missing or wrong; send it as Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _host_name(host: str) -> str:
    """Returns the name in a header ``Host``, without the port."""
    name = host.partition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
    return name.lower().rstrip(".")


def is_loopback(name: str) -> bool:
    """Whether a name or an address means this machine and is reachable from this machine only."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
