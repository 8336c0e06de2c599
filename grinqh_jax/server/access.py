"""Who may use the server: names of the host, API keys."""

import hmac
import ipaddress
import socket
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
          hosts: Names that clients may use for the server, beside IP addresses and ``localhost``; None for
            any name. A web page of somebody else can let its own name point to the server (DNS rebinding).
            Its requests have that name in the header ``Host``.
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
        host = headers.get("host", "")
        if self._hosts is not None and not _is_expected(_host_name(host), self._hosts):
            return APIError(
                403,
                f"{host!r:.80} is no name of this server; use its IP address, or start it with "
                "--allowed-host NAME or with an API key",
                code="host",
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
    return _without_case(name)


def _without_case(name: str) -> str:
    return name.lower().rstrip(".")


def _is_expected(name: str, hosts: Collection[str]) -> bool:
    if name in hosts or name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)  # Nobody can let an address point elsewhere.
    except ValueError:
        return False
    return True


def own_names(host: str, allowed: Sequence[str]) -> frozenset[str] | None:
    """Returns the names of a server without API keys, for ``Access``.

    Args:
      host: Name or address that the server listens on.
      allowed: Further names, without ports; with ``*`` any name is accepted.

    Returns:
      The names, in lower case: those of the machine, also in its local network (``.local``), ``host`` and
      ``allowed``. None for any name.
    """
    if "*" in allowed:
        return None
    machine = socket.gethostname()
    names = machine, f"{machine}.local", socket.getfqdn(), host, *allowed
    return frozenset(_without_case(name) for name in names)
