"""The application: paths, handlers, and the checks around them."""

from collections.abc import Collection, Sequence

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from grinqh_jax.server.access import Access
from grinqh_jax.server.chat import Chat
from grinqh_jax.server.completions import Completions
from grinqh_jax.server.conversation import Conversations
from grinqh_jax.server.errors import HANDLERS
from grinqh_jax.server.metrics import Metrics
from grinqh_jax.server.models import Models
from grinqh_jax.server.page import Page
from grinqh_jax.server.service import Service
from grinqh_jax.server.tokens import Tokens
from grinqh_jax.server.turning import Turning


def application(
    service: Service,
    *,
    keys: Sequence[str] = (),
    hosts: Collection[str] | None = None,
    origins: Sequence[str] = (),
) -> ASGIApp:
    """Returns the application.

    Args:
      service: Model and engine.
      keys: API keys; none are needed if it is empty.
      hosts: Accepted names in the header ``Host`` (see ``Access``).
      origins: Origins whose web pages may use the server (CORS); none by default.
    """
    conversations = Conversations(service.generator.tokenizer)
    models, tokens = Models(service), Tokens(service, conversations)
    routes = [
        Route("/v1/chat/completions", Chat(service, conversations).create, methods=["POST"]),
        Route("/v1/completions", Completions(service).create, methods=["POST"]),
        Route("/v1/answers/{id}/bits", Turning(service).turn, methods=["POST"]),
        Route("/v1/models", models.index),
        Route("/v1/models/{name:path}", models.show),
        Route("/v1/tokenize", tokens.tokenize, methods=["POST"]),
        Route("/v1/detokenize", tokens.detokenize, methods=["POST"]),
        Route("/", Page().show),
        Route("/health", models.health),
        Route("/metrics", models.metrics),
    ]
    cors = [
        Middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
    ]
    app = Starlette(
        routes=routes,
        exception_handlers=dict(HANDLERS),
        middleware=[
            Middleware(_Counted, metrics=service.metrics, routes=routes),
            *(cors if origins else ()),
            Middleware(Access, keys=keys, hosts=hosts),
        ],
    )
    app.router.redirect_slashes = False  # A redirect would repeat the request's header Host.
    return app


class _Counted:
    """Counts responses by path, with names in place of its variable parts, and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Sequence[Route]):
        self._app = app
        self._metrics = metrics
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        matching = (route.path for route in self._routes if route.path_regex.match(scope["path"]))
        path = next(matching, "other")

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.responses.labels(path, str(message["status"])).inc()
            await send(message)

        try:
            await self._app(scope, receive, counted)
        except Exception:
            self._metrics.responses.labels(path, "500").inc()
            raise
