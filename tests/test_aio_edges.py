"""`ktls.aio` at its edges: callbacks that surprise, ends that meet, what is out of luck."""

from __future__ import annotations

import asyncio
import errno
import gc
import io
import logging
import os
import select
import socket
import ssl
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest

import ktls
from ktls import Alert, RecordType, aio
from ktls.aio import client as aio_client
from ktls.aio import server as aio_server
from ktls.aio import transport as aio_transport
from ktls.aio.handshaking import shake_hands
from ktls.records import split
from ktls.types import AlertLevel

from .aio_kit import BufferedRecorder, Meet, Meeting, Recorder, place, quiet, run, server_meet
from .aio_kit import thread as in_background
from .conftest import MODES, Identity, server_context, tcp_pair
from .record_peer import notice_nothing
from .test_aio import BLOB, CLOSE_NOTIFY, DATA, path, receive_to_end, reset
from .test_aio_server import LOCALHOST, ask, client, echo, port_of, server

__all__ = ["client", "path", "place", "quiet", "server", "server_meet"]  # fixtures

TLS13 = pytest.mark.parametrize("version", ["TLSv1.3"], indirect=True)
TLS12 = pytest.mark.parametrize("version", ["TLSv1.2"], indirect=True)
KERNEL = pytest.mark.parametrize(
    "place", [pytest.param("kernel", marks=pytest.mark.kernel)], indirect=True
)


async def until(condition: Callable[[], object]) -> None:
    """Waits for what no event tells."""
    while not condition():
        await asyncio.sleep(0.001)


def raising(name: str, kind: type[Recorder] = Recorder) -> Recorder:
    """A protocol one of whose methods raises."""

    def fail(self: Recorder, *_: object) -> NoReturn:
        del self
        raise LookupError(name)

    made: Recorder = type("Raising", (kind,), {name: fail})()
    return made


async def receive_cut_off(meeting: Meeting) -> bool:
    """Whether what a record peer gets is cut: nothing but the beginning of `BLOB`, and no alert."""

    def receiving() -> bool:
        stream = bytearray()
        with suppress(ConnectionError):
            while data := meeting.peer.sock.recv(1 << 18):
                stream += data
        records = [meeting.peer.rx.open(record) for record in split(bytes(stream))]
        data = b"".join(content for kind, content in records if kind == DATA)
        others = [content for kind, content in records if kind == RecordType.ALERT]
        return not others and len(data) < len(BLOB) and BLOB.startswith(data)

    return await in_background(receiving)


# -- protocols -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("connection_made", Recorder, "Exception in callback"),
        ("resume_writing", Recorder, "protocol.resume_writing() failed"),
        ("get_buffer", BufferedRecorder, "Fatal error: protocol.get_buffer() call failed."),
        ("buffer_updated", BufferedRecorder, "Fatal error: protocol.buffer_updated() call failed."),
        ("connection_lost", Recorder, "Exception in callback"),
    ],
)
@TLS13
def test_callback_that_raises(
    server_meet: Meet, name: str, kind: type[Recorder], message: str
) -> None:
    """Each is reported once, and nothing is left of the connection in the end."""

    async def main() -> None:
        meeting = await server_meet.records(raising(name, kind), narrow=True)
        if kind is BufferedRecorder:
            meeting.peer.send(DATA, b"data")
            await meeting.protocol.until("lost")
            assert isinstance(meeting.protocol.error, LookupError)
        elif name == "resume_writing":
            meeting.transport.write(BLOB)
            assert await in_background(meeting.peer.receive_data, len(BLOB)) == BLOB
        else:
            meeting.transport.write(b"alive")
            assert await in_background(meeting.peer.receive_data, 5) == b"alive"
        meeting.transport.abort()
        await until(lambda: meeting.transport._tls is None)
        meeting.peer.sock.close()

    run(main, expected=(message,))


@pytest.mark.parametrize("name", ["get_buffer", "buffer_updated"])
@TLS13
def test_callback_that_raises_while_data_wait(server_meet: Meet, name: str) -> None:
    """The connection ends once, and what waited isn't announced as all."""

    async def main() -> None:
        meeting = await server_meet.records(raising(name, BufferedRecorder), narrow=True)
        meeting.transport.pause_reading()
        meeting.transport.write(BLOB)
        meeting.peer.send(DATA, b"data")
        meeting.transport.resume_reading()
        await meeting.protocol.until("lost")
        assert isinstance(meeting.protocol.error, LookupError)
        assert await receive_cut_off(meeting)
        meeting.peer.sock.close()

    run(main, expected=(f"Fatal error: protocol.{name}() call failed.",))


@TLS13
def test_reset_while_reading_is_paused(server_meet: Meet) -> None:
    """Writing finds it, once: the error's frames have views of what waited."""

    async def main() -> None:
        meeting = await server_meet.records(narrow=True)
        meeting.transport.pause_reading()
        meeting.transport.write(BLOB)
        assert meeting.transport.get_write_buffer_size()
        reset(meeting.peer.sock)
        await meeting.protocol.until("lost")
        assert isinstance(meeting.protocol.error, ConnectionError)
        assert meeting.protocol.events == ["made", "pause", "lost"]

    run(main)


@TLS13
def test_empty_buffer(server_meet: Meet) -> None:
    """A protocol that has no room can't go on."""

    class Full(BufferedRecorder):
        def get_buffer(self, sizehint: int) -> bytearray:
            return bytearray()

    async def main() -> None:
        meeting = await server_meet.records(Full())
        meeting.peer.send(DATA, b"data")
        await meeting.protocol.until("lost")
        assert isinstance(meeting.protocol.error, RuntimeError)
        meeting.peer.sock.close()

    run(main, expected=("Fatal read error on socket transport",))


@TLS13
def test_other_protocol_within_a_callback(server_meet: Meet) -> None:
    """What userspace has decrypted already goes to whoever is the protocol then."""
    following = Recorder()

    class Changing(BufferedRecorder):
        def buffer_updated(self, nbytes: int) -> None:
            super().buffer_updated(nbytes)
            self.transport.set_protocol(following)

    async def main() -> None:
        meeting = await server_meet.records(Changing())
        meeting.peer.send(DATA, BLOB[:5000])
        assert meeting.transport.get_protocol() is not following
        assert await following.until_data(4900) == BLOB[100:5000]
        assert meeting.protocol.data == BLOB[:100]
        meeting.transport.abort()
        await following.until("lost")
        meeting.peer.sock.close()

    run(main)


@TLS13
def test_pause_and_resume_within_a_callback(server_meet: Meet) -> None:
    class Hesitating(BufferedRecorder):
        def buffer_updated(self, nbytes: int) -> None:
            super().buffer_updated(nbytes)
            self.transport.pause_reading()
            self.transport.resume_reading()

    async def main() -> None:
        meeting = await server_meet.records(Hesitating())
        meeting.peer.send_data(BLOB[:20000])
        assert await meeting.protocol.until_data(20000) == BLOB[:20000]
        await meeting.closed()

    run(main)


@TLS13
def test_no_reference_cycles(server_meet: Meet) -> None:
    """A connection that is over goes at once, however it ended."""

    async def live(how: str) -> weakref.ref[aio.Transport]:
        meeting = await server_meet.records()
        if how == "alert":
            meeting.peer.send(RecordType.ALERT, bytes([AlertLevel.FATAL, Alert.INTERNAL_ERROR]))
        elif how == "garbage":
            meeting.peer.sock.sendall(bytes([DATA, 3, 3, 0, 64]) + bytes(64))
        elif how == "reset":
            reset(meeting.peer.sock)
        elif how == "eof":
            meeting.peer.send(*CLOSE_NOTIFY)
        else:
            getattr(meeting.transport, how)()
        if how == "close":
            assert await receive_to_end(meeting) == (b"", True)
        meeting.peer.sock.close()
        await meeting.protocol.until("lost")
        meeting.protocol.transport = meeting.protocol.error = None
        return weakref.ref(meeting.transport)

    async def main() -> None:
        gc.collect()
        gc.disable()
        try:
            for how in ("abort", "close", "eof", "alert", "garbage", "reset"):
                alive = await live(how)
                for _ in range(3):
                    await asyncio.sleep(0)
                assert alive() is None, how
        finally:
            gc.enable()

    run(main)


# -- the end ---------------------------------------------------------------------------------------


@TLS13
def test_acknowledgements_are_progress(server_meet: Meet) -> None:
    """The peer reads slowly, and as yet there is no room for more: the wait begins anew."""

    async def main() -> None:
        meeting = await server_meet.records(narrow=True)
        transport = meeting.transport
        transport.write(BLOB)
        transport.close()
        transport._acknowledged = before = transport._count_acknowledged()
        while transport._count_acknowledged() <= before:
            await in_background(meeting.peer.receive)
        transport._expire()
        assert not transport._lost
        while "lost" not in meeting.protocol.events:
            transport._expire()
            await asyncio.sleep(0.01)
        assert isinstance(meeting.protocol.error, TimeoutError)
        meeting.peer.sock.close()

    run(main)


@TLS13
def test_progress_has_an_end(server_meet: Meet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that takes byte after byte can't keep a connection for ever."""
    monkeypatch.setattr(aio_transport, "_MOST_TIMEOUTS", 3)

    async def main() -> None:
        meeting = await server_meet.records(narrow=True)
        transport = meeting.transport
        transport.write(BLOB)
        transport.close()
        for _ in range(3):
            assert not transport._lost
            transport._acknowledged = transport._count_acknowledged() - 1
            transport._expire()
        await meeting.protocol.until("lost")
        assert isinstance(meeting.protocol.error, TimeoutError)
        meeting.peer.sock.close()

    run(main)


@TLS12
def test_close_notify_while_data_wait(server_meet: Meet) -> None:
    """TLS 1.2 discards them (RFC 5246 section 7.2.1), and the protocol is told."""

    async def main() -> None:
        meeting = await server_meet.records(narrow=True)
        meeting.transport.write(BLOB)
        meeting.peer.send(*CLOSE_NOTIFY)
        await meeting.protocol.until("eof")
        data, polite = await receive_to_end(meeting)
        assert BLOB.startswith(data)
        assert polite
        meeting.peer.sock.close()
        await meeting.protocol.until("lost")
        assert isinstance(meeting.protocol.error, BrokenPipeError)

    run(main)


def test_data_before_a_reset(server_meet: Meet) -> None:
    """The protocol gets them, and then the error."""

    async def main() -> None:
        meeting = await server_meet.records()
        meeting.transport.pause_reading()
        notice_nothing(meeting.transport.get_extra_info("socket"))
        meeting.peer.send_data(BLOB[:40000])
        meeting.peer.reset()
        meeting.transport.resume_reading()
        await meeting.protocol.until("lost")
        assert meeting.protocol.data == BLOB[:40000]
        assert meeting.protocol.events == ["made", "data", "lost"]
        assert isinstance(meeting.protocol.error, ConnectionResetError)

    run(main)


@TLS13
def test_abort_after_an_error(server_meet: Meet) -> None:
    """The error is what connection_lost tells."""

    async def main() -> None:
        meeting = await server_meet.records()
        meeting.peer.sock.sendall(bytes([DATA, 3, 3, 0, 64]) + bytes(64))
        while not meeting.transport.is_closing():
            await asyncio.sleep(0)
        meeting.transport.abort()
        await meeting.protocol.until("lost")
        assert isinstance(meeting.protocol.error, ktls.DecryptError)
        meeting.peer.sock.close()

    run(main)


@pytest.mark.parametrize("how", ["alert", "empty buffer"])
@TLS13
def test_error_while_data_wait(server_meet: Meet, how: str) -> None:
    """What waits is cut off, so no close_notify may call it an end."""

    class Full(BufferedRecorder):
        def get_buffer(self, sizehint: int) -> bytearray:
            return bytearray()

    async def main() -> None:
        protocol = Full() if how == "empty buffer" else Recorder()
        meeting = await server_meet.records(protocol, narrow=True)
        meeting.transport.write(BLOB)
        alert = (RecordType.ALERT, bytes([AlertLevel.FATAL, Alert.INTERNAL_ERROR]))
        meeting.peer.send(*(alert if how == "alert" else (DATA, b"data")))
        assert await receive_cut_off(meeting)
        await protocol.until("lost")
        assert isinstance(protocol.error, ktls.AlertReceived | RuntimeError)
        meeting.peer.sock.close()

    run(main, expected=("Fatal read error on socket transport",) * (how != "alert"))


@TLS13
def test_close_of_a_full_socket_without_an_event(
    server_meet: Meet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With small buffers there may be none when room comes: it is tried again all the same."""

    async def main() -> None:
        meeting = await server_meet.records(narrow=True)
        tls = meeting.transport._tls
        assert tls is not None
        with pytest.raises(ktls.WouldBlockError):
            tls.sendall(BLOB)
        monkeypatch.setattr(meeting.transport, "_watch_writing", lambda: None)
        meeting.transport.close()
        data, polite = await receive_to_end(meeting)
        assert polite
        assert BLOB.startswith(data)
        await meeting.protocol.until("lost")
        assert meeting.protocol.error is None
        meeting.peer.sock.close()

    run(main)


@TLS13
def test_write_eof_into_a_full_socket(server_meet: Meet) -> None:
    """close_notify is tried again when there is room, and sent once; receiving goes on."""

    async def main() -> None:
        meeting = await server_meet.records(narrow=True)
        tls = meeting.transport._tls
        assert tls is not None
        with pytest.raises(ktls.WouldBlockError) as full:
            tls.sendall(BLOB)
        meeting.transport.write_eof()
        assert not tls._close_notify_sent
        data, polite = await receive_to_end(meeting)
        assert polite
        assert BLOB.startswith(data)
        assert len(data) >= full.value.sent  # in userspace, a record more that was half out
        meeting.peer.send(DATA, b"still here")
        assert await meeting.protocol.until_data(10) == b"still here"
        meeting.transport.close()
        assert await receive_to_end(meeting) == (b"", False)
        await meeting.protocol.until("lost")
        assert meeting.protocol.error is None
        meeting.peer.sock.close()

    run(main)


@TLS13
def test_close_within_callbacks(server_meet: Meet) -> None:
    """From pause_writing, resume_writing, data_received: what was written arrives all the same."""

    def closing(name: str) -> Recorder:
        def close(self: Recorder, *_: object) -> None:
            self.transport.close()

        made: Recorder = type("Closing", (Recorder,), {name: close})()
        return made

    async def main() -> None:
        for name in ("pause_writing", "resume_writing", "data_received"):
            meeting = await server_meet.records(closing(name), narrow=True)
            if name == "data_received":
                meeting.peer.send(DATA, b"data")
                await until(meeting.transport.is_closing)
                expected = b""
            else:
                meeting.transport.write(BLOB)
                expected = BLOB
            assert await receive_to_end(meeting) == (expected, True)
            meeting.peer.sock.close()
            await meeting.protocol.until("lost")
            assert meeting.protocol.error is None

    run(main)


# -- files -----------------------------------------------------------------------------------------


@TLS13
@KERNEL
def test_reading_while_a_file_is_sent(server_meet: Meet, path: Path) -> None:
    """A pause that the protocol asks for meanwhile stays; that it goes on waits for the end."""

    async def main() -> None:
        for pauses in (True, False):
            meeting = await server_meet.records(narrow=True)
            transport = meeting.transport
            if not pauses:
                transport.pause_reading()
            with path.open("rb") as file:
                sending = asyncio.ensure_future(
                    asyncio.get_running_loop().sendfile(transport, file)
                )
                await until(file.tell)
                if pauses:
                    transport.pause_reading()
                else:
                    transport.resume_reading()
                meeting.peer.send(DATA, b"early")
                await asyncio.sleep(0.01)
                assert not meeting.protocol.data
                assert await in_background(meeting.peer.receive_data, len(BLOB)) == BLOB
                assert await sending == len(BLOB)
            assert transport.is_reading() is not pauses
            if pauses:
                await asyncio.sleep(0.01)
                assert not meeting.protocol.data
                transport.resume_reading()
            assert await meeting.protocol.until_data(5) == b"early"
            await meeting.closed()

    run(main)


@TLS13
@KERNEL
def test_write_eof_while_a_file_is_sent(server_meet: Meet, path: Path) -> None:
    """close_notify comes after the file."""

    async def main() -> None:
        meeting = await server_meet.records(narrow=True)
        with path.open("rb") as file:
            sending = asyncio.ensure_future(
                asyncio.get_running_loop().sendfile(meeting.transport, file)
            )
            await until(file.tell)
            meeting.transport.write_eof()
            assert await receive_to_end(meeting) == (BLOB, True)
            assert await sending == len(BLOB)
        await meeting.closed()

    run(main)


@TLS13
def test_file_that_shrinks(server_meet: Meet, path: Path) -> None:
    """What it still has is sent, and told."""

    async def main() -> None:
        meeting = await server_meet.records(narrow=True)
        with path.open("rb") as file:
            sending = asyncio.ensure_future(
                asyncio.get_running_loop().sendfile(meeting.transport, file, 0, len(BLOB))
            )
            await until(file.tell)
            os.truncate(path, 2 << 20)
            receiving = asyncio.ensure_future(receive_to_end(meeting))
            sent = await sending
        meeting.transport.close()
        assert await receiving == (BLOB[:sent], True)
        assert sent <= len(BLOB)
        meeting.peer.sock.close()
        await meeting.protocol.until("lost")

    run(main)


@TLS13
def test_sock_sendfile_of_what_has_a_position(server_meet: Meet) -> None:
    """As asyncio's: the offset counts, and the position is after the last byte sent."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        meeting = await server_meet.records()
        tls = meeting.transport._tls
        assert tls is not None
        file = io.BytesIO(BLOB[:1000])
        file.seek(5)
        assert await loop.sock_sendfile(tls, file) == 1000
        assert await loop.sock_sendfile(tls, file, 10, 100) == 100
        assert file.tell() == 110
        expected = BLOB[:1000] + BLOB[10:110]
        assert await in_background(meeting.peer.receive_data, 1100) == expected
        await meeting.closed()

    run(main)


# -- out of luck -----------------------------------------------------------------------------------


@TLS13
def test_no_descriptor_for_a_half_record(
    server_meet: Meet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the loop is told more often than it needs to be, but what comes is read."""
    refused = 0

    def refuse(*_: object) -> NoReturn:
        nonlocal refused
        refused += 1
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async def main() -> None:
        meeting = await server_meet.records()
        sealed = meeting.peer.tx.seal(DATA, b"in pieces")
        meeting.peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        monkeypatch.setattr(select, "epoll", refuse)
        for at in range(0, 12, 2):
            meeting.peer.sock.sendall(sealed[at : at + 2])
            await asyncio.sleep(0.005)
        if server_meet.mode == "userspace":
            await until(lambda: refused)
        meeting.transport.pause_reading()  # Linux 6.1 looks anew then
        meeting.transport.resume_reading()
        await asyncio.sleep(0.005)
        monkeypatch.undo()
        meeting.peer.sock.sendall(sealed[12:])
        assert await meeting.protocol.until_data(9) == b"in pieces"
        await meeting.closed()

    run(main)


def test_no_descriptor_for_ours(
    server: ssl.SSLContext, client: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller is told, and nothing is left."""

    def refuse(*_: object) -> NoReturn:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async def main() -> None:
        serving = await aio.start_server(echo, LOCALHOST, 0, ssl=server)
        async with serving:
            monkeypatch.setattr(aio_client, "duplicate", refuse)
            monkeypatch.setattr(aio_server, "duplicate", refuse)
            with pytest.raises(OSError, match="Too many open files"):
                await aio.open_connection(LOCALHOST, port_of(serving), ssl=client)
            with pytest.raises(OSError, match="Too many open files"):
                await aio.start_server(echo, LOCALHOST, 0, ssl=server)
            await asyncio.sleep(0)
            gc.collect()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(main)


@contextmanager
def shaking(sock: socket.socket, context: ssl.SSLContext) -> Iterator[Callable[[], object]]:
    """A client in the middle of its handshake; gives what completes it."""
    sock.settimeout(30)
    with context.wrap_socket(
        sock, server_hostname="localhost", do_handshake_on_connect=False
    ) as tls:
        yield tls.do_handshake


def test_server_closed_in_a_handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """wait_closed() ends when the last handshake has, even if its protocol can't be made."""

    def fail() -> asyncio.Protocol:
        raise LookupError

    async def main() -> None:
        serving = await aio.create_server(fail, LOCALHOST, 0, ssl=server)
        sock = socket.create_connection((LOCALHOST, port_of(serving)))
        with shaking(sock, client) as complete:
            await until(lambda: serving._handshakes)
            serving.close()
            closed = asyncio.ensure_future(serving.wait_closed())
            with suppress(OSError):
                await in_background(complete)
            await closed

    run(main, expected=("Exception in callback",))


@pytest.mark.parametrize("name", ["close_clients", "abort_clients"])
def test_clients_in_a_handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> None:
    """They are clients, too: a server that ends its clients waits for none of them."""

    async def main() -> None:
        serving = await aio.start_server(echo, LOCALHOST, 0, ssl=server)
        sock = socket.create_connection((LOCALHOST, port_of(serving)))
        with shaking(sock, client) as complete:
            await until(lambda: serving._handshakes)
            serving.close()
            getattr(serving, name)()
            assert not serving._handshakes
            await serving.wait_closed()
            with pytest.raises((OSError, ssl.SSLError)):
                await in_background(complete)

    run(main)


def test_callback_of_a_context_that_raises(identity: Identity, client: ssl.SSLContext) -> None:
    """It is the program's error, not the client's: it is reported."""
    context = server_context(identity)

    def fail(*_: object) -> NoReturn:
        raise LookupError("callback")

    context.set_alpn_select_callback(fail)
    client.set_alpn_protocols(["h2"])

    async def main() -> None:
        serving = await aio.start_server(echo, LOCALHOST, 0, ssl=context)
        async with serving:
            with pytest.raises((OSError, ssl.SSLError)):
                await ask(port_of(serving), client)
        await serving.wait_closed()

    run(main, expected=("SSL handshake failed",))


@pytest.mark.kernel
def test_required_and_gone(
    server: ssl.SSLContext, client: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    """A client that went away before it was accepted is nothing to warn of."""

    async def main() -> None:
        serving = await aio.start_server(
            echo, LOCALHOST, 0, ssl=server, ktls_options={"require": True}, start_serving=False
        )
        async with serving:
            for listener in serving._listeners or ():
                listener.listen(5)
            for end in (reset, socket.socket.close):
                end(socket.create_connection((LOCALHOST, port_of(serving))))
            await serving.start_serving()
            assert await ask(port_of(serving), client) == b"hello"
        await serving.wait_closed()

    run(main)
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


# -- servers ---------------------------------------------------------------------------------------


def test_odd_arguments(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="max_handshakes"):
            await aio.start_server(echo, LOCALHOST, 0, ssl=server, max_handshakes=0)
        first = await aio.start_server(
            echo, LOCALHOST, 0, ssl=server, backlog=0, reuse_port=True, max_handshakes=1
        )
        second = await aio.start_server(
            echo, LOCALHOST, port_of(first), ssl=server, reuse_port=True
        )
        async with first, second:
            for _ in range(4):
                assert await ask(port_of(first), client) == b"hello"
        everywhere = await aio.start_server(echo, None, 0, ssl=server)
        async with everywhere:
            for listener in everywhere.sockets:
                host = "::1" if listener.family == socket.AF_INET6 else LOCALHOST
                assert await ask(listener.getsockname()[1], client, host=host) == b"hello"

    run(main)


# -- start_tls -------------------------------------------------------------------------------------


def test_start_tls_cancelled(server: ssl.SSLContext) -> None:
    """The protocol gets its end; a cancellation is no error of the connection."""

    async def main() -> None:
        accepted, connecting = tcp_pair()
        loop = asyncio.get_running_loop()
        plain, _ = await loop.create_connection(Recorder, sock=accepted)
        protocol = Recorder()
        starting = asyncio.ensure_future(aio.start_tls(plain, protocol, server, server_side=True))
        await asyncio.sleep(0.01)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        await protocol.until("lost")
        assert protocol.error is None
        assert await in_background(connecting.recv, 1) == b""
        connecting.close()

    run(main)


@pytest.mark.parametrize("turns", [0, 1, 2])
def test_plain_transport_lost_after_the_handshake(
    server: ssl.SSLContext, client: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch, turns: int
) -> None:
    """Just before or just after there is an upper transport: the protocol has its end, once."""
    protocol = Recorder()

    async def main() -> None:
        accepted, connecting = tcp_pair()
        loop = asyncio.get_running_loop()
        plain, _ = await loop.create_connection(Recorder, sock=accepted)

        async def shake_hands_and_lose(*arguments: Any) -> None:  # noqa: ANN401
            await shake_hands(*arguments)
            plain.abort()
            for _ in range(turns):
                await asyncio.sleep(0)

        monkeypatch.setattr(aio_client, "shake_hands", shake_hands_and_lose)
        with shaking(connecting, client) as complete:
            completing = asyncio.ensure_future(in_background(complete))
            starting = aio.start_tls(plain, protocol, server, server_side=True)
            if turns:
                with pytest.raises(ConnectionAbortedError, match="during the handshake"):
                    await starting
            else:
                await starting
            await completing
            await protocol.until("lost")
            assert isinstance(protocol.error, ConnectionAbortedError if turns else type(None))
            for _ in range(3):
                await asyncio.sleep(0)

    run(main)
    assert protocol.events == ["lost"]


def test_start_tls_over_other_tls(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """Of asyncio's own TLS the socket is no place for ours; it goes on as if nothing had been."""

    async def main() -> None:
        serving = await asyncio.start_server(echo, LOCALHOST, 0, ssl=server)
        async with serving:
            reader, writer = await asyncio.open_connection(
                LOCALHOST, port_of(serving), ssl=client, server_hostname="localhost"
            )
            assert not isinstance(writer.transport, aio.Transport)
            with pytest.raises(TypeError, match=r"not supported by start_tls\(\)"):
                await aio.start_tls(
                    writer.transport, Recorder(), client, server_hostname="localhost"
                )
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
            writer.close()
            await writer.wait_closed()
            await asyncio.sleep(0.01)

    run(main, factory=asyncio.SelectorEventLoop)


def test_flow_control_after_start_tls(
    server: ssl.SSLContext, client: ssl.SSLContext, place: str
) -> None:
    """A stream reader that has enough holds up the sender, and no longer than it has."""
    options: Any = MODES[place]
    paused = asyncio.Event()

    async def receiving(reader: asyncio.StreamReader, writer: Any) -> None:  # noqa: ANN401
        await writer.start_tls(server)
        await until(lambda: not writer.transport.is_reading())
        held = len(reader._buffer)  # type: ignore[attr-defined]
        paused.set()
        assert held < 1 << 18
        assert await reader.readexactly(len(BLOB)) == BLOB
        writer.write(b"all")
        writer.close()
        await writer.wait_closed()

    async def main() -> None:
        serving = await asyncio.start_server(receiving, LOCALHOST, 0)
        async with serving:
            writer: Any
            reader, writer = await asyncio.open_connection(LOCALHOST, port_of(serving))
            await writer.start_tls(client, server_hostname="localhost")
            writer.write(BLOB)
            await paused.wait()
            assert await reader.read(-1) == b"all"
            writer.close()
            await writer.wait_closed()

    run(main, factory=lambda: aio.EventLoop(ktls_options=options))


@pytest.mark.parametrize("how", ["garbage", "silence"])
@TLS13
def test_tls_in_tls_that_fails(server_meet: Meet, server: ssl.SSLContext, how: str) -> None:
    """The inner TLS is asyncio's own, which aborts our transport."""

    async def main() -> None:
        meeting = await server_meet.records()
        loop = asyncio.get_running_loop()
        inner = Recorder()
        starting = asyncio.ensure_future(
            loop.start_tls(
                meeting.transport, inner, server, server_side=True, ssl_handshake_timeout=0.2
            )
        )
        if how == "garbage":
            meeting.peer.send(DATA, b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await starting
        await until(lambda: meeting.transport._tls is None)
        meeting.peer.sock.close()

    run(main)


# -- a loop that is closed -------------------------------------------------------------------------


def test_loop_closed_in_handshakes(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """On both sides: the sockets are closed, with a ResourceWarning each."""
    reports: list[dict[str, Any]] = []
    loop = aio.EventLoop()
    loop.set_exception_handler(lambda _, context: reports.append(context))

    async def main() -> list[socket.socket]:
        serving = await aio.start_server(echo, LOCALHOST, 0, ssl=server)
        stalling = socket.create_connection((LOCALHOST, port_of(serving)))
        await until(lambda: serving._handshakes)
        return [stalling]

    socks = loop.run_until_complete(main())
    loop.close()
    del loop
    with pytest.warns(ResourceWarning, match="unclosed"):
        gc.collect()
    for sock in socks:
        sock.settimeout(30)
        assert sock.recv(1) == b""
        sock.close()
    assert not reports


@TLS13
@KERNEL
def test_loop_closed_while_a_file_is_sent(server_meet: Meet, path: Path) -> None:
    """Only what any loop says of a task that is left."""
    reports: list[str] = []
    loop = aio.EventLoop()
    loop.set_exception_handler(lambda _, context: reports.append(context["message"]))

    async def main(file: Any) -> Any:  # noqa: ANN401
        meeting = await server_meet.records(narrow=True)
        sending = asyncio.ensure_future(
            asyncio.get_running_loop().sendfile(meeting.transport, file)
        )
        await until(file.tell)
        return meeting.peer, sending

    with path.open("rb") as file:
        peer, sending = loop.run_until_complete(main(file))
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
        del loop, sending
        with pytest.warns(ResourceWarning, match="unclosed"):
            gc.collect()
    assert reports == ["Task was destroyed but it is pending!"]
    peer.sock.close()
