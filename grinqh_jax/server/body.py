"""Reads the body of a request: size, time, JSON, and the schema's fields."""

import asyncio
import time
from typing import Any, TypeVar

import pydantic
from pydantic_core import from_json
from starlette.requests import Request

from grinqh_jax.server.errors import APIError, ClientDisconnected
from grinqh_jax.server.limits import Limits
from grinqh_jax.server.unsupported import without_neutral_fields

Body = TypeVar("Body", bound=pydantic.BaseModel)

DISCARD_SECONDS = 1.0
"""Time in which the rest of a refused body is discarded, so that the client reads the refusal."""

SHOWN_ERRORS = 5
"""Most errors of a body that a message lists."""

_CLOSE = {"Connection": "close"}


async def parse(request: Request, schema: type[Body], limits: Limits) -> Body:
    """Returns the body of a request.

    Raises:
      APIError: 408, 413 or 415, or 400 with the names of the fields that are wrong or not supported.
      ClientDisconnected: The client has left.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        # A page of another origin can send other types without asking, but not this one.
        shown = f"{content_type:.60}" or "missing"
        raise APIError(415, f"the content type is {shown}; send application/json", headers=_CLOSE)
    body = await _read(request, limits)
    try:
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise APIError(400, f"the body is not JSON: {error!s:.200}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise APIError(400, "the body is not a JSON object", code="invalid_json")
    return validate(schema, fields)


def validate(schema: type[Body], fields: dict[str, Any]) -> Body:
    """Returns the fields as an object of the schema. Raises APIError with the names of the wrong ones."""
    try:
        return schema.model_validate(without_neutral_fields(fields))
    except pydantic.ValidationError as error:
        problems = [_problem(each) for each in error.errors(include_url=False, include_context=False)]
        shown = "; ".join(dict.fromkeys(message for _, message in problems[:SHOWN_ERRORS]))
        more = f"; and {len(problems) - SHOWN_ERRORS} more" if len(problems) > SHOWN_ERRORS else ""
        raise APIError(400, f"{shown}{more}", param=problems[0][0] or None) from None


def _problem(error: Any) -> tuple[str, str]:
    """Returns the field, empty if it is none alone, and the message of an error of pydantic."""
    names = [str(part) for part in error["loc"] if isinstance(part, int) or _is_field(part)]
    field = f"{'.'.join(names):.100}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        field = f"{error['loc'][-1]!s:.100}"
        return field, f"{field!r} is not a field that this server knows; leave it out"
    if not field and message.partition(": ")[0].isidentifier():  # of several fields, the first is named
        return message.partition(": ")[0], message
    return field, f"{field}: {message}" if field else message


def _is_field(part: str) -> bool:
    """Whether a part of a location is a field and not a type of a union."""
    return part.isidentifier() and part not in ("str", "int", "float")


async def _read(request: Request, limits: Limits) -> bytes:
    declared = request.headers.get("content-length", "0")
    too_large = APIError(413, f"the body has more than {limits.body_bytes} bytes; shorten it", headers=_CLOSE)
    if len(declared) > 15 or int(declared) > limits.body_bytes:
        await _discard(request)
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.receive_seconds):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnected
                body += message.get("body", b"")
                if len(body) > limits.body_bytes:
                    break
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        raise APIError(
            408,
            f"the body did not arrive within {limits.receive_seconds:g} s; send it faster",
            headers=_CLOSE,
        ) from None
    await _discard(request)
    raise too_large


async def _discard(request: Request) -> None:
    started = time.monotonic()
    try:
        async with asyncio.timeout(DISCARD_SECONDS):
            while time.monotonic() - started < DISCARD_SECONDS:
                message = await request.receive()
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return
    except TimeoutError:
        return
