"""What the tests of `ktls.aio` share: a loop that tolerates nothing, protocols that take notes."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest

from ktls import aio

from .conftest import (
    MODES,
    Identity,
    our_context,
    server_context,
    stdlib_context,
    tcp_pair,
)
from .conftest import client_context as pyopenssl_client
from .record_peer import RecordPeer

_T = TypeVar("_T")
LIMIT = 30  # seconds, for whatever a test waits for


def run(
    main: Callable[[], Coroutine[Any, Any, _T]],
    *,
    factory: Callable[[], Any] = aio.EventLoop,
    expected: tuple[str, ...] = (),
    limit: float = LIMIT,
) -> _T:
    """Runs a test's coroutine in debug mode; nothing may be reported but what is expected.

    Args:
        main: The coroutine function.
        factory: Makes the loop.
        expected: How the messages begin that the loop's exception handler must get, in this order.
        limit: How long it may take, in seconds.
    """
    reports: list[dict[str, Any]] = []
    loop: asyncio.AbstractEventLoop = factory()
    loop.set_debug(True)
    loop.slow_callback_duration = limit
    loop.set_exception_handler(lambda _, context: reports.append(context))

    async def bounded() -> _T:
        result = await asyncio.wait_for(main(), limit)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        if left:
            _, pending = await asyncio.wait(left, timeout=limit)
            assert not pending, "tasks are left"
        return result

    try:
        result = loop.run_until_complete(bounded())
    finally:
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
    assert len(reports) == len(expected), reports
    for each, beginning in zip(reports, expected, strict=True):
        assert each["message"].startswith(beginning), reports
    return result


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Any:  # noqa: ANN401
    """Asyncio has nothing to complain about."""
    yield
    loud = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert not [each for each in loud if each.name == "asyncio"], loud


class Recorder(asyncio.Protocol):
    """Takes notes of all that a transport calls."""

    def __init__(self) -> None:
        """Starts with an empty sheet."""
        self.events: list[str] = []
        self.data = bytearray()
        self.keep_open = False
        self.error: BaseException | None = None
        self.transport: Any = None
        self._changed = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Comes first."""
        self.transport = transport
        self._note("made")

    def data_received(self, data: bytes) -> None:
        """Notes the data."""
        self.data += data
        self._note("data")

    def eof_received(self) -> bool:
        """Perhaps goes on sending."""
        self._note("eof")
        return self.keep_open

    def pause_writing(self) -> None:
        """Notes it."""
        self._note("pause")

    def resume_writing(self) -> None:
        """Notes it."""
        self._note("resume")

    def connection_lost(self, exc: BaseException | None) -> None:
        """Comes last."""
        assert "lost" not in self.events
        self.error = exc
        self._note("lost")

    def _note(self, event: str) -> None:
        if self.events[-1:] != ["data"] or event != "data":
            self.events.append(event)
        self._changed.set()

    async def until(self, event: str) -> None:
        """Waits for an event."""
        while event not in self.events:
            self._changed.clear()
            await self._changed.wait()

    async def until_data(self, size: int) -> bytes:
        """Waits for so many bytes."""
        while len(self.data) < size:
            self._changed.clear()
            await self._changed.wait()
        return bytes(self.data)


class BufferedRecorder(Recorder, asyncio.BufferedProtocol):
    """The same with a buffer of its own, which is tiny."""

    def get_buffer(self, sizehint: int) -> bytearray:
        """A few bytes."""
        self.buffer = bytearray(100)
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Notes the data."""
        self.data_received(bytes(self.buffer[:nbytes]))


async def thread(function: Callable[..., _T], *arguments: Any) -> _T:  # noqa: ANN401
    """Runs what blocks."""
    return await asyncio.to_thread(function, *arguments)


@dataclass
class Meeting:
    """A transport of ours, its protocol, and the peer: records, or an ``ssl`` socket."""

    transport: aio.Transport
    protocol: Recorder
    peer: Any

    async def closed(self) -> None:
        """Ends both."""
        self.peer_socket.close()
        self.transport.abort()
        await self.protocol.until("lost")

    @property
    def peer_socket(self) -> socket.socket:
        """The peer's."""
        peer: socket.socket = self.peer.sock if isinstance(self.peer, RecordPeer) else self.peer
        return peer


@dataclass
class Meet:
    """Makes connections between a transport and a peer.

    Attributes:
        identity: Of the server.
        version: The TLS version.
        side: Ours.
        mode: Which directions go to the kernel.
        library: Of our context.
    """

    identity: Identity
    version: str = "TLSv1.3"
    side: str = "server"
    mode: str = "userspace"
    library: str = "ssl"

    async def records(self, protocol: Recorder | None = None, **keywords: Any) -> Meeting:  # noqa: ANN401
        """With a peer that makes and reads records."""

        def peer(sock: socket.socket) -> RecordPeer:
            make = pyopenssl_client if self.side == "server" else server_context
            context = make(self.identity, self.version)
            return RecordPeer(sock, context, server_side=self.side != "server")

        return await self._meet(peer, protocol, keywords)

    async def ssl(self, protocol: Recorder | None = None, **keywords: Any) -> Meeting:  # noqa: ANN401
        """With a peer of the ``ssl`` module."""

        def peer(sock: socket.socket) -> ssl.SSLSocket:
            server = self.side == "server"
            context = stdlib_context(self.identity, self.version, server_side=not server)
            name = "localhost" if server else None
            return context.wrap_socket(sock, server_side=not server, server_hostname=name)

        return await self._meet(peer, protocol, keywords)

    async def _meet(
        self,
        peer: Callable[[socket.socket], Any],
        protocol: Recorder | None,
        keywords: dict[str, Any],
    ) -> Meeting:
        accepted, connecting = tcp_pair()
        server = self.side == "server"
        ours, theirs = (accepted, connecting) if server else (connecting, accepted)
        theirs.settimeout(LIMIT)
        if keywords.pop("narrow", False):
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 17)
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)
        options = {**MODES[self.mode], **keywords.pop("options", {})}
        context = our_context(self.library, self.identity, self.version, server_side=server)
        making = asyncio.ensure_future(thread(peer, theirs))
        note = protocol or Recorder()
        loop: Any = asyncio.get_running_loop()
        keywords |= {"ssl": context, "ktls_options": options}
        if server:
            transport, _ = await loop.connect_accepted_socket(lambda: note, ours, **keywords)
        else:
            transport, _ = await aio.create_connection(
                lambda: note, sock=ours, server_hostname="localhost", **keywords
            )
        return Meeting(transport, note, await making)


@pytest.fixture
def meet(identity: Identity, version: str, side: str, mode: str) -> Meet:
    """Makes connections, on either side, in every mode."""
    return Meet(identity, version, side, mode)


@pytest.fixture(params=["userspace", pytest.param("kernel", marks=pytest.mark.kernel)])
def place(request: pytest.FixtureRequest) -> str:
    """Both directions in the kernel, or neither."""
    return str(request.param)


@pytest.fixture
def server_meet(identity: Identity, version: str, place: str) -> Meet:
    """The same as a server, where that is enough."""
    return Meet(identity, version, "server", place)
