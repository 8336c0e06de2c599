"""``/v1/answers/ID/bits``: turns the dial of answers while they run."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from grinqh_jax.server.body import parse
from grinqh_jax.server.schema import Turn, Turned
from grinqh_jax.server.service import Service


class Turning:
    """Handles changes of the bits of running answers."""

    def __init__(self, service: Service):
        self._service = service

    async def turn(self, request: Request) -> Response:
        """Changes the bits of all unfinished answers to a request, from their next decode chunks on."""
        body = await parse(request, Turn, self._service.limits)
        name = request.path_params["id"]
        before, now = self._service.turn(name, body.bits)
        return JSONResponse(Turned(id=name, bits=now, previous_bits=before).model_dump())
