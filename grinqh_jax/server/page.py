"""The web page at ``/``: one file without anything from elsewhere."""

from importlib import resources

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

_HEADERS = {
    # The page runs its own script, shows text as text, and talks to this server only.
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Page:
    """Handles requests for the page."""

    def __init__(self) -> None:
        self._html = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")

    async def show(self, request: Request) -> Response:
        """Returns the page."""
        return HTMLResponse(self._html, headers=_HEADERS)
