"""A TLS connection as an asyncio transport."""

from __future__ import annotations

import asyncio
import bz2
import gc
import io
import os
import socket
import struct
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import ktls
from ktls import Alert, RecordType, aio, offload
from ktls.types import AlertLevel

from . import aio_kit
from .aio_kit import BufferedRecorder, Meet, Meeting, Recorder, meet, place, quiet, run, server_meet
from .aio_kit import thread as in_background
from .conftest import receive, tcp_pair

__all__ = ["meet", "place", "quiet", "server_meet"]  # fixtures

DATA = RecordType.APPLICATION_DATA
CLOSE_NOTIFY = (RecordType.ALERT, bytes([AlertLevel.WARNING, Alert.CLOSE_NOTIFY]))
BLOB = os.urandom(3 << 20)


def reset(sock: socket.socket) -> None:
    """Closes with a RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


async def receive_to_end(meeting: Meeting) -> tuple[bytes, bool]:
    """All data that a record peer gets, and whether close_notify came after it."""

    def receiving() -> tuple[bytes, bool]:
        data = bytearray()
        while (record := meeting.peer.receive_other_than_tickets()) is not None:
            if record[0] != DATA:
                assert record == CLOSE_NOTIFY
                return bytes(data), True
            data += record[1]
        return bytes(data), False

    return await in_background(receiving)


# -- data ------------------------------------------------------------------------------------------


def test_both_ways(meet: Meet) -> None:
    """Much and little, in order, and an end that both sides understand."""

    async def main() -> None:
        meeting = await meet.ssl()
        for part in (b"a", BLOB, b"z"):
            meeting.transport.write(part)
        meeting.transport.writelines([b"one", b"two"])
        expected = b"a" + BLOB + b"zonetwo"
        assert await in_background(receive, meeting.peer, len(expected)) == expected
        await in_background(meeting.peer.sendall, BLOB)
        assert await meeting.protocol.until_data(len(BLOB)) == BLOB
        meeting.transport.close()
        assert meeting.transport.is_closing()
        assert await in_background(meeting.peer.recv, 1) == b""
        meeting.peer.close()
        await meeting.protocol.until("lost")
        assert meeting.protocol.error is None
        events = [each for each in meeting.protocol.events if each in ("made", "data", "lost")]
        assert events == ["made", "data", "lost"]

    run(main)


@pytest.mark.parametrize("library", ["ssl", "pyopenssl"])
def test_what_it_tells(server_meet: Meet, library: str) -> None:
    """Frameworks see https; users see where records are made, and why."""
    server_meet.library = library

    async def main() -> None:
        meeting = await server_meet.ssl()
        tell = meeting.transport.get_extra_info
        kernel = server_meet.mode == "kernel"
        assert tell("ktls_send_enabled") is tell("ktls_recv_enabled") is kernel
        assert (tell("ktls_tx").reason is None) is kernel
        assert tell("ssl_object").version() == server_meet.version
        assert tell("ssl_object").selected_alpn_protocol() is None
        assert tell("cipher")[1:] == meeting.peer.cipher()[1:]
        assert type(tell("sslcontext")).__name__ in ("SSLContext", "Context")
        assert not tell("peercert")
        assert tell("peername") == meeting.peer.getsockname()
        assert tell("sockname") == meeting.peer.getpeername()
        assert tell("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert tell("nonsense", 5) == 5
        await meeting.closed()

    run(main)


def test_buffered_protocol(meet: Meet) -> None:
    """A reader with a tiny buffer gets all of a record that userspace has decrypted."""

    async def main() -> None:
        meeting = await meet.ssl(BufferedRecorder())
        await in_background(meeting.peer.sendall, BLOB[:50000])
        assert await meeting.protocol.until_data(50000) == BLOB[:50000]
        await meeting.closed()

    run(main)


def test_pausing_reading(meet: Meet) -> None:
    """What comes meanwhile waits, all of it; pausing may happen anywhere."""

    class Pausing(Recorder):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.transport.pause_reading()
            assert not self.transport.is_reading()
            asyncio.get_running_loop().call_soon(self.transport.resume_reading)

    async def main() -> None:
        meeting = await meet.ssl(Pausing())
        meeting.transport.pause_reading()
        meeting.transport.pause_reading()
        await in_background(meeting.peer.sendall, BLOB[:100000])
        await asyncio.sleep(0)
        assert not meeting.protocol.data
        meeting.transport.resume_reading()
        meeting.transport.resume_reading()
        assert await meeting.protocol.until_data(100000) == BLOB[:100000]
        await meeting.closed()

    run(main)


def test_flow_control(server_meet: Meet) -> None:
    """A slow reader pauses the writer; what is buffered is counted, and arrives."""

    async def main() -> None:
        meeting = await server_meet.records(narrow=True)
        transport = meeting.transport
        transport.set_write_buffer_limits(high=1000, low=10)
        assert transport.get_write_buffer_limits() == (10, 1000)
        transport.write(BLOB)
        assert meeting.protocol.events == ["made", "pause"]
        assert 0 < transport.get_write_buffer_size() < len(BLOB)
        assert await in_background(meeting.peer.receive_data, len(BLOB)) == BLOB
        await meeting.protocol.until("resume")
        assert transport.get_write_buffer_size() == 0
        await meeting.closed()

    run(main)


def test_wrong_calls(server_meet: Meet) -> None:
    async def main() -> None:
        meeting = await server_meet.ssl()
        with pytest.raises(TypeError):
            meeting.transport.write("text")  # type: ignore[arg-type]
        meeting.transport.write(b"")
        if server_meet.version == "TLSv1.2":
            assert not meeting.transport.can_write_eof()
            with pytest.raises(NotImplementedError):
                meeting.transport.write_eof()
        await meeting.closed()
        meeting.transport.write(b"late")  # as asyncio: no error
        meeting.transport.close()
        meeting.transport.abort()
        with pytest.raises(RuntimeError, match="closing"):
            await asyncio.get_running_loop().sendfile(meeting.transport, io.BytesIO(b"late"))

    run(main)


@pytest.mark.parametrize("version", ["TLSv1.3"], indirect=True)
def test_half_closed(meet: Meet) -> None:
    """TLS 1.3: after write_eof we read on; after the peer's close_notify we may write on."""

    async def main() -> None:
        meeting = await meet.records()
        meeting.transport.write(BLOB[:70000])
        meeting.transport.write_eof()
        with pytest.raises(RuntimeError):
            meeting.transport.write(b"more")
        assert await receive_to_end(meeting) == (BLOB[:70000], True)
        meeting.peer.send(DATA, b"still here")
        assert await meeting.protocol.until_data(10) == b"still here"
        await meeting.closed()
        other = Recorder()
        other.keep_open = True
        meeting = await meet.records(other)
        meeting.peer.send(*CLOSE_NOTIFY)
        await other.until("eof")
        meeting.transport.write(b"answer")
        assert await in_background(meeting.peer.receive_data, 6) == b"answer"
        meeting.transport.close()
        assert await receive_to_end(meeting) == (b"", True)
        meeting.peer.sock.close()
        await other.until("lost")

    run(main)


def test_peer_closes(meet: Meet) -> None:
    """close_notify is the end of data; so is, as with asyncio, a FIN without it."""

    async def main() -> None:
        for polite in (True, False):
            meeting = await meet.records()
            meeting.peer.send(DATA, b"last words")
            if polite:
                meeting.peer.send(*CLOSE_NOTIFY)
            meeting.peer.sock.shutdown(socket.SHUT_WR)
            await meeting.protocol.until("lost")
            assert meeting.protocol.events == ["made", "data", "eof", "lost"]
            assert meeting.protocol.error is None
            assert await receive_to_end(meeting) == (b"", True)
            meeting.peer.sock.close()

    run(main)


# -- the end ---------------------------------------------------------------------------------------


def test_close_flushes(meet: Meet) -> None:
    """All that was written arrives, then close_notify, however slow the reader."""

    async def main() -> None:
        meeting = await meet.records(narrow=True)
        meeting.transport.write(BLOB)
        meeting.transport.close()
        meeting.transport.write(b"too late")
        data, polite = await receive_to_end(meeting)
        assert data == BLOB
        assert polite
        await meeting.protocol.until("lost")
        assert meeting.protocol.error is None
        meeting.peer.sock.close()

    run(main)


def test_close_while_the_peer_sends(meet: Meet) -> None:
    """What comes after our close doesn't reset the connection, which would cut off our data."""

    async def main() -> None:
        meeting = await meet.records(narrow=True)
        meeting.transport.pause_reading()
        meeting.peer.send(DATA, b"unread")
        meeting.transport.write(BLOB)
        meeting.transport.close()
        meeting.peer.send(DATA, b"late")
        assert await receive_to_end(meeting) == (BLOB, True)
        meeting.peer.sock.close()
        await meeting.protocol.until("lost")
        assert bytes(meeting.protocol.data) == b""

    run(main)


def test_close_that_makes_no_progress(server_meet: Meet) -> None:
    async def main() -> None:
        meeting = await server_meet.records(narrow=True, ssl_shutdown_timeout=0.2)
        meeting.transport.write(BLOB)
        meeting.transport.close()
        await meeting.protocol.until("lost")
        assert isinstance(meeting.protocol.error, TimeoutError)
        meeting.peer.sock.close()

    run(main)


def test_abort(meet: Meet) -> None:
    """Nothing more goes out: to the peer the stream is cut, not ended."""

    async def main() -> None:
        meeting = await meet.records(narrow=True)
        meeting.transport.write(b"some")
        assert await in_background(meeting.peer.receive_data, 4) == b"some"
        meeting.transport.abort()
        assert "lost" not in meeting.protocol.events
        await meeting.protocol.until("lost")
        assert meeting.protocol.error is None
        assert await receive_to_end(meeting) == (b"", False)
        meeting.peer.sock.close()

    run(main)


def test_reset(meet: Meet) -> None:
    async def main() -> None:
        meeting = await meet.records(narrow=True)
        meeting.transport.write(BLOB)
        reset(meeting.peer.sock)
        await meeting.protocol.until("lost")
        assert isinstance(meeting.protocol.error, ConnectionError)

    run(main)


def test_abort_at_once(server_meet: Meet) -> None:
    """In connection_made: it is followed by connection_lost and nothing else."""

    class Aborting(Recorder):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self.transport.abort()

    async def main() -> None:
        meeting = await server_meet.records(Aborting())
        await meeting.protocol.until("lost")
        assert meeting.protocol.events == ["made", "lost"]
        meeting.peer.sock.close()

    run(main)


@pytest.mark.parametrize("name", ["data_received", "eof_received", "pause_writing"])
def test_protocol_that_raises(server_meet: Meet, name: str) -> None:
    """It is reported; where asyncio ends the connection, so do we."""

    class Raising(Recorder):
        def __getattribute__(self, asked: str) -> Any:  # noqa: ANN401
            if asked == name:
                return self._raise
            return super().__getattribute__(asked)

        def _raise(self, *_: object) -> None:
            raise LookupError(name)

    async def main() -> None:
        meeting = await server_meet.records(Raising(), narrow=True)
        meeting.peer.send(DATA, b"data") if name == "data_received" else None
        meeting.peer.send(*CLOSE_NOTIFY) if name == "eof_received" else None
        if name == "pause_writing":
            meeting.transport.write(BLOB)
            await meeting.closed()
        await meeting.protocol.until("lost")
        assert isinstance(meeting.protocol.error, LookupError | None)
        meeting.peer.sock.close()

    if name == "pause_writing":
        run(main, expected=("protocol.pause_writing() failed",))
    else:
        run(main, expected=(f"Fatal error: protocol.{name}() call failed.",))


def test_loop_closed_with_connections(server_meet: Meet) -> None:
    """As with asyncio: a ResourceWarning each, and no other noise."""
    loop = aio.EventLoop()
    meeting = loop.run_until_complete(server_meet.records())
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    del loop
    peer = meeting.peer
    del meeting
    with pytest.warns(ResourceWarning, match="unclosed"):
        gc.collect()
    assert peer.receive_other_than_tickets() is None
    peer.sock.close()


def test_fork(server_meet: Meet) -> None:
    """A child that dies with a copy of a connection says nothing to the peer."""

    async def main() -> None:
        meeting = await server_meet.records()
        child = os.fork()
        if not child:
            meeting.transport.__del__()
            os._exit(0)
        os.waitpid(child, 0)
        meeting.transport.write(b"alive")
        assert await in_background(meeting.peer.receive_data, 5) == b"alive"
        meeting.peer.send(DATA, b"so am I")
        assert await meeting.protocol.until_data(7) == b"so am I"
        await meeting.closed()

    run(main)


# -- records ---------------------------------------------------------------------------------------


def test_control_records_never_surface(meet: Meet) -> None:
    """A ticket, half a record, a KeyUpdate where it can be followed."""

    async def main() -> None:
        meeting = await meet.records()
        for ticket in meeting.peer.tickets:
            meeting.peer.send(RecordType.HANDSHAKE, ticket)
        sealed = meeting.peer.tx.seal(DATA, b"in two pieces")
        meeting.peer.sock.sendall(sealed[:9])
        for _ in range(5):
            await asyncio.sleep(0)
        meeting.peer.sock.sendall(sealed[9:])
        assert await meeting.protocol.until_data(13) == b"in two pieces"
        rekeys = meet.mode in ("userspace", "tx-only") or offload.can_rekey()
        if meet.version == "TLSv1.3" and rekeys:
            meeting.peer.update_keys(requested=False)
            meeting.peer.send(DATA, b"!")
            await meeting.protocol.until_data(14)
        assert meeting.protocol.events == ["made", "data"]
        await meeting.closed()

    run(main)


def test_half_a_record_costs_nothing(meet: Meet) -> None:
    """Linux 6.1 says that the socket is readable then, as long as it lasts."""

    async def main() -> None:
        meeting = await meet.records()
        sealed = meeting.peer.tx.seal(DATA, b"in two pieces")
        reads = 0
        ready = meeting.transport._read_ready

        def counting() -> None:
            nonlocal reads
            reads += 1
            ready()

        meeting.transport._reading._callback = counting
        meeting.transport.pause_reading()
        meeting.transport.resume_reading()
        meeting.peer.sock.sendall(sealed[:9])
        await asyncio.sleep(0.1)
        assert reads <= 4
        meeting.peer.sock.sendall(sealed[9:])
        assert await meeting.protocol.until_data(13) == b"in two pieces"
        meeting.peer.send(DATA, b"!")
        await meeting.protocol.until_data(14)
        await meeting.closed()

    run(main)


def test_fatal_alert(meet: Meet) -> None:
    async def main() -> None:
        meeting = await meet.records()
        meeting.peer.send(RecordType.ALERT, bytes([AlertLevel.FATAL, Alert.INTERNAL_ERROR]))
        await meeting.protocol.until("lost")
        assert isinstance(meeting.protocol.error, ktls.AlertReceived)
        assert meeting.protocol.error.description is Alert.INTERNAL_ERROR
        meeting.peer.sock.close()

    run(main)


def test_record_that_does_not_decrypt(meet: Meet) -> None:
    """The peer is told so, even by a transport that is through with it."""

    async def main() -> None:
        meeting = await meet.records()
        sealed = bytearray(meeting.peer.tx.seal(DATA, b"data"))
        sealed[-1] ^= 1
        meeting.peer.sock.sendall(sealed)
        record = await in_background(meeting.peer.receive_other_than_tickets)
        assert record == (RecordType.ALERT, bytes([AlertLevel.FATAL, Alert.BAD_RECORD_MAC]))
        await meeting.protocol.until("lost")
        assert isinstance(meeting.protocol.error, ktls.DecryptError)
        meeting.peer.sock.close()

    run(main)


# -- files -----------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of `BLOB`."""
    (tmp_path / "file").write_bytes(BLOB)
    return tmp_path / "file"


@pytest.mark.parametrize(
    ("offset", "count"),
    [(0, None), (5, None), (1 << 20, 100000), (5, len(BLOB)), (len(BLOB), None), (9 << 20, 5)],
)
def test_sendfile(server_meet: Meet, path: Path, offset: int, count: int | None) -> None:
    """After what was written before it; the position ends where the sending did."""
    expected = BLOB[offset : None if count is None else offset + count]

    async def main() -> None:
        meeting = await server_meet.records(narrow=True)
        receiving = asyncio.ensure_future(receive_to_end(meeting))
        meeting.transport.write(BLOB[:200000])
        with path.open("rb") as file:
            loop = asyncio.get_running_loop()
            assert await loop.sendfile(meeting.transport, file, offset, count) == len(expected)
            if expected:
                assert file.tell() == offset + len(expected)
        assert meeting.transport.is_reading()
        meeting.transport.write(b"end")
        meeting.transport.close()
        assert await receiving == (BLOB[:200000] + expected + b"end", True)
        meeting.peer.sock.close()
        await meeting.protocol.until("lost")

    run(main)


def test_sendfile_of_other_things(server_meet: Meet, tmp_path: Path) -> None:
    """What isn't a regular file is read; never are the bytes sent that its descriptor has."""
    packed = tmp_path / "packed"
    packed.write_bytes(bz2.compress(BLOB[:100000]))

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for fallback in (True, False):
            meeting = await server_meet.ssl()
            for file in (io.BytesIO(BLOB[:100000]), bz2.BZ2File(packed)):
                with file:
                    if not fallback:
                        with pytest.raises(asyncio.SendfileNotAvailableError):
                            await loop.sendfile(meeting.transport, file, fallback=False)
                        continue
                    assert await loop.sendfile(meeting.transport, file) == 100000
                    got = await in_background(receive, meeting.peer, 100000)
                    assert got == BLOB[:100000]
            await meeting.closed()

    run(main)


def test_sendfile_without_fallback(server_meet: Meet, path: Path) -> None:
    """Then it is the kernel or an error, which says why."""

    async def main() -> None:
        meeting = await server_meet.records()
        with path.open("rb") as file:
            sending = asyncio.get_running_loop().sendfile(meeting.transport, file, fallback=False)
            if server_meet.mode == "kernel":
                receiving = asyncio.ensure_future(receive_to_end(meeting))
                assert await sending == len(BLOB)
                meeting.transport.close()
                assert await receiving == (BLOB, True)
            else:
                with pytest.raises(asyncio.SendfileNotAvailableError, match="not asked for"):
                    await sending
        await meeting.closed()

    run(main)


def test_sendfile_at_once(server_meet: Meet, path: Path) -> None:
    """What fits is sent before anybody else runs: the loop isn't asked to stop reading for it."""

    async def main() -> None:
        meeting = await server_meet.records()
        with path.open("rb") as file:
            sending = meeting.transport.sendfile(file, 5, 1000)
            if server_meet.mode == "kernel":
                with pytest.raises(StopIteration) as done:
                    sending.send(None)
                assert done.value.value == 1000
                assert file.tell() == 1005
            else:
                with pytest.raises(asyncio.SendfileNotAvailableError):
                    await sending
                meeting.transport.write(BLOB[5:1005])
        assert meeting.transport.is_reading()
        meeting.transport.write(b"end")
        meeting.transport.close()
        assert await receive_to_end(meeting) == (BLOB[5:1005] + b"end", True)
        meeting.peer.sock.close()
        await meeting.protocol.until("lost")

    run(main)


def test_sendfile_is_alone(server_meet: Meet, path: Path) -> None:
    """Meanwhile nothing is read or written; cancelled, the connection goes on where it was."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        meeting = await server_meet.records(narrow=True)
        with path.open("rb") as file:
            sending = asyncio.ensure_future(loop.sendfile(meeting.transport, file))
            while not file.tell() and server_meet.mode == "kernel":
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert not meeting.transport.is_reading()
            if server_meet.mode == "kernel":  # in userspace asyncio's own reads and writes
                with pytest.raises(RuntimeError, match="sendfile is in progress"):
                    meeting.transport.write(b"between")
                with pytest.raises(RuntimeError, match="sendfile is in progress"):
                    await loop.sendfile(meeting.transport, file)
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending
            sent = file.tell()
        assert meeting.transport.is_reading()
        assert sent < len(BLOB)
        meeting.transport.write(b"end")
        meeting.transport.close()
        data, polite = await receive_to_end(meeting)
        assert polite
        assert data.endswith(b"end")
        assert BLOB.startswith(data[:-3])
        if server_meet.mode == "kernel":
            assert data[:-3] == BLOB[:sent]
        meeting.peer.sock.close()
        await meeting.protocol.until("lost")

    run(main)


@pytest.mark.parametrize("how", ["close", "abort", "reset"])
def test_sendfile_cut_off(server_meet: Meet, path: Path, how: str) -> None:
    """Its caller gets an error, the protocol its connection_lost."""

    async def main() -> None:
        meeting = await server_meet.records(narrow=True, ssl_shutdown_timeout=1)
        with path.open("rb") as file:
            sending = asyncio.ensure_future(
                asyncio.get_running_loop().sendfile(meeting.transport, file)
            )
            await asyncio.sleep(0)
            while not sending.done() and server_meet.mode == "kernel" and not file.tell():
                await asyncio.sleep(0)
            if how == "reset":
                reset(meeting.peer.sock)
            else:
                getattr(meeting.transport, how)()
            with pytest.raises(ConnectionError):
                await sending
        meeting.peer.sock.close()
        await meeting.protocol.until("lost")

    run(main)


@pytest.mark.parametrize("by", ["transport", "loop"])
def test_sendfile_through_small_buffers(
    server_meet: Meet, monkeypatch: pytest.MonkeyPatch, path: Path, by: str
) -> None:
    """A record fills them, which TCP is told is only a part: it goes out all the same."""
    monkeypatch.setattr(aio_kit, "tcp_pair", partial(tcp_pair, (2304, 12000)))

    async def main() -> None:
        loop = asyncio.get_running_loop()
        meeting = await server_meet.records()
        tls = meeting.transport._tls
        assert tls is not None
        receiving = asyncio.ensure_future(in_background(meeting.peer.receive_data, 50000))
        with path.open("rb") as file:
            if by == "transport":
                assert await loop.sendfile(meeting.transport, file, 0, 50000) == 50000
            else:
                assert await loop.sock_sendfile(tls, file, 0, 50000) == 50000
        assert await receiving == BLOB[:50000]
        await meeting.closed()

    run(main)


def test_sock_sendfile(server_meet: Meet, path: Path, tmp_path: Path) -> None:
    """Of a `ktls.Socket` it never writes plain bytes to the descriptor."""
    packed = tmp_path / "packed"
    packed.write_bytes(bz2.compress(BLOB[:100000]))

    async def main() -> None:
        loop = asyncio.get_running_loop()
        meeting = await server_meet.records(narrow=True)
        tls = meeting.transport._tls
        assert tls is not None
        receiving = asyncio.ensure_future(in_background(meeting.peer.receive_data, 2 * 100000 + 50))
        with path.open("rb") as plain, bz2.BZ2File(packed) as other:
            assert await loop.sock_sendfile(tls, plain, 0, 100000) == 100000
            assert await loop.sock_sendfile(tls, other) == 100000
            with pytest.raises(asyncio.SendfileNotAvailableError):
                await loop.sock_sendfile(tls, other, fallback=False)
            assert await loop.sock_sendfile(tls, io.BytesIO(BLOB), 7, 50) == 50
        assert await receiving == BLOB[:100000] * 2 + BLOB[7:57]
        await meeting.closed()

    run(main)
