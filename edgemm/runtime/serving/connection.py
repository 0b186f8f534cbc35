"""One HTTP connection that can't be kept open, or filled, by a client that does not go on."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from edgemm.runtime.serving.options import Limits


def guarded(limits: Limits) -> type[HttpToolsProtocol]:
    """uvicorn's protocol, with limits that it does not have: time and size of the head, time to take an answer."""

    class Guarded(HttpToolsProtocol):
        _head_bytes, _in_head = 0, False
        _head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._await_head()

        def _await_head(self) -> None:
            if self._head_timer is None:
                self._head_timer = self.loop.call_later(limits.header_s, self.transport.abort)

        def _head_is_there(self) -> None:
            self._head_bytes, self._in_head = 0, False
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def on_message_begin(self) -> None:
            self._in_head = True
            self._await_head()
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._head_is_there()
            super().on_headers_complete()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._in_head:
                self._head_bytes += len(data)
                if self._head_bytes > limits.header_bytes:
                    self.transport.write(b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\n\r\n")
                    self._close_soon()
            elif self.cycle is None or self.cycle.response_complete:  # line ends between two requests
                self._await_head()

        def _close_soon(self) -> None:
            """Send what is left, unless the client does not take it."""
            self.transport.close()
            self.loop.call_later(limits.write_s, self.transport.abort)

        def timeout_keep_alive_handler(self) -> None:
            super().timeout_keep_alive_handler()
            self._close_soon()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._write_timer = self.loop.call_later(limits.write_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._write_timer.cancel()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head_is_there()
            super().connection_lost(exc)

    return Guarded
