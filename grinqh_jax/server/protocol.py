"""uvicorn's HTTP/1.1 protocol with time limits for clients, and refusals in OpenAI's shape."""

import asyncio
import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from grinqh_jax.server.errors import APIError


def protocol(receive_seconds: float) -> type[H11Protocol]:
    """Returns a protocol that closes connections whose clients send headers too slowly, or stop reading.

    Args:
      receive_seconds: Most seconds from the first byte of a request, or from the start of the connection, to
        the end of the header. uvicorn's own limit covers only the time between two requests. Also the most
        seconds in which a client takes nothing of a response that waits for it.
    """

    class LimitedProtocol(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None

        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            transport.set_write_buffer_limits(high=0)  # so that writing pauses while anything is unread
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_watching()
            self._stop_watching_reader()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._watch_reader()

        def resume_writing(self) -> None:
            self._stop_watching_reader()
            super().resume_writing()

        def send_400_response(self, msg: str) -> None:
            if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
                self.transport.close()  # An earlier response is under way.
                return
            waiting, _ = self.conn.trailing_data
            large = len(waiting) > (self.config.h11_max_incomplete_event_size or 0)
            self._refuse(
                APIError(431, "the header is too large; shorten it")
                if large
                else APIError(400, "the request is not HTTP/1.1", code="invalid_http")
            )

        def _watch(self) -> None:
            """Starts the clock if a header is awaited, and stops it otherwise."""
            awaited = self.conn.their_state is h11.IDLE and self.conn.our_state is h11.IDLE
            started = self.cycle is None or bool(self.conn.trailing_data[0])
            if not (awaited and started):
                self._stop_watching()
            elif self._deadline is None:
                self._deadline = self.loop.call_later(receive_seconds, self._expire)

        def _stop_watching(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _watch_reader(self) -> None:
            """Closes the connection if the client has received nothing when the time is up."""
            left = self.transport.get_write_buffer_size()

            def check() -> None:
                if self.transport.get_write_buffer_size() < left:
                    self._watch_reader()
                else:
                    self.transport.abort()

            self._unread = self.loop.call_later(receive_seconds, check)

        def _stop_watching_reader(self) -> None:
            if self._unread is not None:
                self._unread.cancel()
                self._unread = None

        def _expire(self) -> None:
            self._deadline = None
            if self.transport.is_closing():
                return
            self._refuse(
                APIError(408, f"the header did not arrive within {receive_seconds:g} s; send it faster")
            )

        def _refuse(self, error: APIError) -> None:
            body = json.dumps(error.body()).encode()
            head = (
                f"HTTP/1.1 {error.status} Refused\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
            self.transport.close()

    return LimitedProtocol
