"""Errors in the shape of OpenAI's protocol."""

import logging
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from grinqh_jax.errors import UsageError
from grinqh_jax.serving.errors import AnswerError, EngineError

CLIENT_CLOSED = 499
"""Status, in nginx' logs and in the metrics, of a request whose client has left."""

INVALID_REQUEST, SERVER_ERROR = "invalid_request_error", "server_error"


class APIError(Exception):
    """A request that gets an error as its response.

    Attributes:
      status: HTTP status.
      message: Value, place and remedy, on one line.
      param: Field of the request, or None.
      code: Code for programs, or None.
      headers: Headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """Returns the JSON body."""
        kind = SERVER_ERROR if self.status >= 500 else INVALID_REQUEST
        if self.status == 429:
            kind = "rate_limit_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """Returns the response."""
        return JSONResponse(self.body(), self.status, self.headers)


class ClientDisconnected(Exception):
    """The client has closed the connection, so nobody reads a response."""


def as_api_error(error: Exception) -> APIError:
    """Returns the error that a client sees. It does not show the message of an unexpected error."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, AnswerError) and isinstance(error.__cause__, UsageError):
        return APIError(400, str(error.__cause__))  # a schema that proves too complex
    if isinstance(error, EngineError) and not isinstance(error, AnswerError):
        return APIError(
            503, "the engine has ended; try again later", code="engine_ended", headers={"Retry-After": "5"}
        )
    if isinstance(error, UsageError):
        return APIError(400, str(error))
    if isinstance(error, HTTPException):
        headers = dict(error.headers or {})
        return APIError(error.status_code, str(error.detail), headers=headers)
    return APIError(500, "the server failed on this request; its log has the reason")


def log(error: Exception) -> None:
    """Logs an error that the client does not see."""
    logging.getLogger(__name__).error("a request failed", exc_info=error)


async def respond(request: Request, error: Exception) -> Response:
    """Handles an exception of a handler."""
    if isinstance(error, ClientDisconnected):
        return Response(status_code=CLIENT_CLOSED)  # for the metrics
    if isinstance(error, HTTPException) and error.status_code == 404:
        return APIError(404, f"no such path: {request.url.path!r:.100}", code="unknown_url").response()
    if isinstance(error, HTTPException) and error.status_code == 405:
        message = f"{request.method:.20} is not allowed on {request.url.path!r:.100}"
        return APIError(405, message, headers=dict(error.headers or {})).response()
    if isinstance(error, AnswerError):
        log(error)
    return as_api_error(error).response()


HANDLERS = dict.fromkeys(
    (APIError, ClientDisconnected, EngineError, UsageError, HTTPException, Exception), respond
)
"""Exception handlers of the application."""
