"""``/v1/models``, ``/health`` and ``/metrics``."""

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from grinqh_jax.decoding.bits import DEFAULT_BITS
from grinqh_jax.server.errors import APIError
from grinqh_jax.server.metrics import CONTENT_TYPE
from grinqh_jax.server.service import Service


class Models:
    """Handles questions about the server."""

    def __init__(self, service: Service):
        self._service = service
        self._created = int(time.time())

    async def index(self, request: Request) -> Response:
        """Lists the only model."""
        return JSONResponse({"object": "list", "data": [self._model(self._service.name)]})

    async def show(self, request: Request) -> Response:
        """Describes the model, which may have bits as a suffix of its name."""
        name = request.path_params["name"]
        self._service.bits(name)
        return JSONResponse(self._model(name))

    async def health(self, request: Request) -> Response:
        """Says whether the engine takes requests."""
        if self._service.engine.error is not None:
            raise APIError(503, "the engine has ended; restart the server", code="engine_ended")
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """Returns the metrics in Prometheus' text format."""
        return Response(self._service.metrics.render(), headers={"content-type": CONTENT_TYPE})

    def _model(self, name: str) -> dict[str, Any]:
        service = self._service
        targets = service.generator.targets
        dial = None
        if targets is not None:
            dial = {"least": targets[0], "most": targets[-1], "default": min(DEFAULT_BITS, targets[-1])}
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "grinqh-jax",
            "max_model_len": service.context,
            "bits": dial,
            "chat": service.generator.tokenizer.has_chat_template,
        }
