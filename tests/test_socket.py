"""Socket in all four modes against the ``ssl`` module: all that a ``socket.socket`` promises."""

from __future__ import annotations

import array
import errno
import gc
import os
import selectors
import socket
import ssl
import struct
import threading
import weakref
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import pytest
from cryptography import x509
from OpenSSL import SSL

import ktls
from ktls import RecordType

from .conftest import (
    Identity,
    InThread,
    MakePair,
    MakeRecordPair,
    both_libraries,
    client_context,
    fill,
    in_kernel,
    narrow,
    receive,
    server_context,
    tcp_pair,
)


@both_libraries
def test_data_both_ways(make_pair: MakePair, version: str, side: str, mode: str) -> None:
    pair = make_pair(version, side, mode)
    pair.peer.sendall(b"ping")
    assert pair.tls.recv(100) == b"ping"
    pair.tls.sendall(b"pong" * 10000)
    assert receive(pair.peer, 40000) == b"pong" * 10000
    pair.tls.close()
    assert pair.peer.recv(1) == b""


def test_every_way_to_send(make_pair: MakePair, version: str, mode: str) -> None:
    """Buffers of all kinds, each byte once and in order; empty ones send nothing."""
    pair = make_pair(version, "server", mode)
    numbers = array.array("I", range(1000))
    grid = memoryview(bytes(range(24))).cast("B", (4, 6))
    many = [bytes([number]) * number for number in range(100)]
    expected = b""
    for data in (b"bytes", bytearray(b"array"), memoryview(b"view"), numbers, memoryview(numbers)):
        plain = bytes(memoryview(data).cast("B"))
        assert pair.tls.send(data) == len(plain)
        pair.tls.sendall(data)
        assert pair.tls.sendmsg([data, b"", data]) == 2 * len(plain)
        expected += plain * 4
    assert pair.tls.send(grid) == 24
    pair.tls.sendall(grid)
    assert pair.tls.sendmsg(iter(many)) == sum(range(100))
    expected += bytes(range(24)) * 2 + b"".join(many)
    assert pair.tls.send(b"") == 0
    assert pair.tls.sendmsg([]) == 0
    assert pair.tls.sendmsg([b"", b""]) == 0
    pair.tls.sendall(b"")
    assert receive(pair.peer, len(expected)) == expected
    pair.tls.close()
    assert pair.peer.recv(1) == b""


def test_every_way_to_receive(make_pair: MakePair, version: str, mode: str) -> None:
    """Short and long buffers; none of size 0 takes anything."""
    pair = make_pair(version, "server", mode)
    pair.peer.sendall(b"0123456789" * 5)
    assert pair.tls.recv(0) == b""
    assert pair.tls.recv_into(bytearray()) == 0
    assert pair.tls.recv(4) == b"0123"
    buffer = bytearray(b"." * 8)
    assert pair.tls.recv_into(buffer, 6) == 6
    assert buffer == b"456789.."
    numbers = array.array("H", [0, 0])
    assert pair.tls.recv_into(numbers) == 4
    assert numbers.tobytes() == b"0123"
    assert pair.tls.recvmsg(6) == (b"456789", [], 0, None)
    first, second = bytearray(3), bytearray(100)
    count, *rest = pair.tls.recvmsg_into([bytearray(), first, second])
    assert rest == [[], 0, None]
    assert b"0123456789".startswith(bytes((first + second)[:count]))
    left = 30 - count
    assert len(pair.tls.recv(left, socket.MSG_WAITALL)) == left


def test_flags(make_pair: MakePair, version: str, mode: str) -> None:
    """MSG_PEEK leaves the data, MSG_WAITALL joins records, MSG_DONTWAIT doesn't wait."""
    pair = make_pair(version, "server", mode)
    pair.tls.settimeout(None)
    with pytest.raises(BlockingIOError):
        pair.tls.recv(1, socket.MSG_DONTWAIT)
    for _ in range(3):
        pair.peer.sendall(b"abcdef")
    for size in (2, 6, 2):
        assert pair.tls.recv(size, socket.MSG_PEEK) == b"abcdef"[:size]
    assert pair.tls.recv(18, socket.MSG_WAITALL) == b"abcdef" * 3
    pair.tls.sendall(b"x")
    assert pair.peer.recv(1) == b"x"  # and a TLS 1.3 server's tickets: unread, they would reset
    pair.peer.sendall(b"end")
    pair.peer.close()
    assert pair.tls.recv(100, socket.MSG_WAITALL) == b"end"
    assert pair.tls.recv(100, socket.MSG_WAITALL) == b""


def test_full_socket_with_dontwait(make_pair: MakePair, mode: str) -> None:
    """MSG_DONTWAIT on a blocking socket is BlockingIOError, no timeout."""
    pair = make_pair("TLSv1.3", "server", mode)
    narrow(pair)
    pair.tls.setblocking(False)
    fill(pair.tls, bytes(1 << 22))
    pair.tls.settimeout(None)
    pair.tls.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", 2, 0))
    pair.tls.close_timeout = 0.1
    with pytest.raises(ktls.WouldBlockError):
        pair.tls.sendall(bytes(1 << 22), socket.MSG_DONTWAIT)
    with pytest.raises(ktls.StalledError):
        pair.tls.close()


def test_bad_arguments(make_pair: MakePair, version: str, mode: str) -> None:
    """They are refused as by ``socket.socket``, and cost neither data nor the connection."""
    pair = make_pair(version, "server", mode)
    pair.tls.settimeout(5)
    pair.peer.sendall(b"data")
    for size in (-1, -(1 << 40)):
        with pytest.raises(ValueError, match="negative"):
            pair.tls.recv(size)
    with pytest.raises(ValueError, match="nbytes"):
        pair.tls.recv_into(bytearray(4), 5)
    with pytest.raises(ValueError, match="nbytes"):
        pair.tls.recv_into(bytearray(4), -1)
    with pytest.raises((TypeError, BufferError)):
        pair.tls.recv_into(b"read-only")
    with pytest.raises(TypeError):
        pair.tls.recv_into(memoryview(bytearray(8))[::2])
    wrong: Any = "text"
    for call in (pair.tls.send, pair.tls.sendall):
        with pytest.raises(TypeError):
            call(wrong)
    with pytest.raises(TypeError):
        pair.tls.sendmsg([wrong])
    with pytest.raises(ValueError, match="ancillary"):
        pair.tls.sendmsg([b"x"], [(282, 1, b"\x15")])
    with pytest.raises(ValueError, match="address"):
        pair.tls.sendmsg([b"x"], [], 0, ("127.0.0.1", 1))
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        pair.tls.shutdown(77)
    assert pair.tls.recv(100) == b"data"
    pair.tls.sendall(b"answer")
    assert pair.peer.recv(100) == b"answer"


def test_forbidden_methods(make_record_pair: MakeRecordPair, mode: str) -> None:
    """What a TLS connection can't do says so, and puts nothing on the wire."""
    pair = make_record_pair("TLSv1.3", "server", mode)
    tls: Any = pair.tls
    address = pair.peer.sock.getsockname()
    calls: dict[str, tuple[Any, ...]] = {
        "accept": (),
        "bind": (address,),
        "connect": (address,),
        "connect_ex": (address,),
        "dup": (),
        "listen": (),
        "recvfrom": (10,),
        "recvfrom_into": (bytearray(10),),
        "sendmsg_afalg": ([b"plain"],),
        "sendto": (b"plain", address),
    }
    pair.peer.send(RecordType.APPLICATION_DATA, b"data")
    for name, arguments in calls.items():
        with pytest.raises(NotImplementedError):
            getattr(tls, name)(*arguments)
    assert tls.recv(100) == b"data"
    tls.sendall(b"end")
    # Whatever else were on the wire would not open.
    assert pair.peer.receive_other_than_tickets() == (RecordType.APPLICATION_DATA, b"end")


def test_what_socket_tells(make_pair: MakePair, mode: str) -> None:
    pair = make_pair("TLSv1.3", "server", mode)
    tls = pair.tls
    assert isinstance(tls, socket.socket)
    assert tls.fileno() >= 0
    assert tls.getpeername() == pair.peer.getsockname()
    assert tls.getsockname() == pair.peer.getpeername()
    assert (tls.family, tls.type) == (socket.AF_INET, socket.SOCK_STREAM)
    assert not tls.get_inheritable()
    assert tls.gettimeout() == 30
    tls.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    assert tls.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
    with tls as same:
        assert same is tls
    assert tls.fileno() == -1
    assert "closed" in repr(tls)


@both_libraries
def test_what_tls_tells(
    make_pair: MakePair, identity: Identity, version: str, side: str, mode: str
) -> None:
    pair = make_pair(version, side, mode)
    assert pair.tls.version() == version == pair.peer.version()
    assert pair.tls.cipher() == pair.peer.cipher()
    assert pair.tls.selected_alpn_protocol() is None
    assert not pair.tls.session_reused
    if side == "server":
        assert pair.tls.getpeercert() is None
        assert pair.tls.getpeercert(binary_form=True) is None
    else:
        certificate = pair.tls.getpeercert()
        pem = identity.chain.read_bytes()
        assert certificate == x509.load_pem_x509_certificate(pem)
        first = pem.decode().partition("-----END CERTIFICATE-----\n")
        der = ssl.PEM_cert_to_DER_cert(first[0] + first[1])
        assert pair.tls.getpeercert(binary_form=True) == der


def test_certificate_that_nobody_verified(
    make_record_pair: MakeRecordPair, identity: Identity, version: str
) -> None:
    """It isn't given as if it had been; its bytes are there for who wants to look."""
    client = client_context(identity, version)
    client.set_verify(SSL.VERIFY_NONE)
    contexts = server_context(identity, version), client
    pair = make_record_pair(version, "client", "userspace", contexts)
    assert pair.tls.getpeercert() is None
    assert pair.tls.getpeercert(binary_form=True) is not None


def test_alpn(make_record_pair: MakeRecordPair, identity: Identity, side: str, mode: str) -> None:
    server, client = server_context(identity), client_context(identity)
    server.set_alpn_select_callback(lambda _connection, offered: offered[-1])
    client.set_alpn_protos([b"h2", b"http/1.1"])
    pair = make_record_pair("TLSv1.3", side, mode, (server, client))
    assert pair.tls.selected_alpn_protocol() == "http/1.1"


def test_makefile(make_pair: MakePair, version: str, mode: str) -> None:
    """A file works as for any socket, and the socket stays open until its files are closed."""
    pair = make_pair(version, "server", mode)
    with pair.tls.makefile("rwb") as file:
        pair.tls.close()
        assert pair.tls.fileno() >= 0
        pair.peer.sendall(b"one\ntwo\n")
        assert file.readline() == b"one\n"
        assert file.readline() == b"two\n"
        file.write(b"answer\n" * 10000)
        file.flush()
        assert receive(pair.peer, 70000) == b"answer\n" * 10000
    assert pair.tls.fileno() == -1
    assert pair.peer.recv(1) == b""


def test_makefile_text_and_timeout(make_pair: MakePair, mode: str) -> None:
    pair = make_pair("TLSv1.3", "server", mode)
    pair.tls.settimeout(0.1)
    with pair.tls.makefile("r", encoding="utf-8") as lines, pytest.raises(TimeoutError):
        lines.readline()
    pair.tls.settimeout(10)
    pair.peer.sendall("zwölf\n".encode())
    with pair.tls.makefile("r", encoding="utf-8") as lines:
        assert lines.readline() == "zwölf\n"


def test_receive_timeout(make_pair: MakePair, version: str, mode: str) -> None:
    pair = make_pair(version, "server", mode)
    pair.tls.settimeout(0.05)
    for _ in range(2):
        with pytest.raises(ktls.StalledError) as caught:
            pair.tls.recv(1)
        assert isinstance(caught.value, TimeoutError)
        assert caught.value.errno == errno.ETIMEDOUT
    assert pair.tls.gettimeout() == 0.05
    pair.peer.sendall(b"x")
    pair.tls.settimeout(10)
    assert pair.tls.recv(1) == b"x"


@pytest.mark.parametrize("timeout", [0, 0.1], ids=["non-blocking", "timeout"])
@pytest.mark.parametrize("call", ["send", "sendall"])
def test_slow_reader_loses_nothing(
    make_pair: MakePair, in_thread: InThread, mode: str, call: str, timeout: float
) -> None:
    """The errors tell how much went out; going on from there, everything arrives exactly once."""
    pair = make_pair("TLSv1.3", "server", mode)
    narrow(pair)
    pair.tls.settimeout(timeout)
    data = os.urandom(3 << 19)
    error: type[ktls.StalledError | ktls.WouldBlockError]
    error = ktls.StalledError if timeout else ktls.WouldBlockError
    sent, counts = 0, list[tuple[int, int]]()
    reader: Future[Any] | None = None
    while sent < len(data):
        try:
            if call == "send":
                sent += pair.tls.send(memoryview(data)[sent:])
            else:
                pair.tls.sendall(memoryview(data)[sent:])
                sent = len(data)
        except error as caught:
            counts.append((caught.sent, getattr(caught, "characters_written", caught.sent)))
            sent += caught.sent
            reader = reader or in_thread(receive, pair.peer, len(data))
            with selectors.DefaultSelector() as selector:
                selector.register(pair.tls, selectors.EVENT_WRITE)
                assert selector.select(10)
    assert reader is not None
    assert reader.result(30) == data
    assert all(count == characters_written for count, characters_written in counts)
    assert call == "sendall" or not any(count for count, _ in counts)


def test_would_block_is_an_ordinary_blocking_io_error() -> None:
    """``io`` reads characters_written."""
    error = ktls.WouldBlockError("send", 5)
    assert (error.errno, error.sent, error.characters_written) == (errno.EAGAIN, 5, 5)
    assert error.filename is None


def test_non_blocking_receive(make_pair: MakePair, version: str, mode: str) -> None:
    """A selector wakes the reader; pending() tells what it can't see."""
    pair = make_pair(version, "server", mode)
    pair.tls.setblocking(False)
    assert pair.tls.gettimeout() == 0
    with pytest.raises(BlockingIOError) as caught:
        pair.tls.recv(1)
    assert caught.value.errno == errno.EAGAIN
    pair.peer.sendall(bytes(100000))
    received = 0
    with selectors.DefaultSelector() as selector:
        selector.register(pair.tls, selectors.EVENT_READ)
        while received < 100000:
            assert pair.tls.pending() or selector.select(10)
            with suppress(ktls.WouldBlockError):
                received += len(pair.tls.recv(1000))
    assert pair.tls.pending() == 0
    with pytest.raises(ktls.WouldBlockError):
        pair.tls.recv(1)


def test_large_reads_leave_nothing_pending(make_pair: MakePair, mode: str) -> None:
    """A reader of 16 KiB may trust its selector alone."""
    pair = make_pair("TLSv1.3", "server", mode)
    pair.peer.sendall(bytes(60000))
    received = 0
    while received < 60000:
        received += len(pair.tls.recv(ktls.MAX_PAYLOAD))
        assert pair.tls.pending() == 0


@both_libraries
def test_pending(make_pair: MakePair, mode: str) -> None:
    pair = make_pair("TLSv1.3", "server", mode)
    assert pair.tls.pending() == 0
    pair.peer.sendall(b"12345")
    assert pair.tls.recv(2) == b"12"
    assert pair.tls.pending() == (0 if in_kernel(pair.tls)[1] else 3)
    assert pair.tls.recv(9) == b"345"


def test_records(make_record_pair: MakeRecordPair, version: str, mode: str) -> None:
    """send_record and recv_record, and what only the kernel can."""
    pair = make_record_pair(version, "server", mode)
    tls, peer = pair.tls, pair.peer
    assert tls.send_record(RecordType.APPLICATION_DATA, b"data") == 4
    assert peer.receive_other_than_tickets() == (RecordType.APPLICATION_DATA, b"data")
    if in_kernel(tls)[0]:
        assert tls.send_record(RecordType.ALERT, b"\x01\x5a") == 2
        assert peer.receive_other_than_tickets() == (RecordType.ALERT, b"\x01\x5a")
        assert tls.send_record(RecordType.HEARTBEAT, bytes(16384)) == 16384
        assert peer.receive_other_than_tickets() == (RecordType.HEARTBEAT, bytes(16384))
        with pytest.raises(OSError, match=os.strerror(errno.EMSGSIZE)):
            tls.send_record(RecordType.APPLICATION_DATA, bytes(16385))
        with pytest.raises(ValueError, match="0 to 255"):
            tls.send_record(256, b"")
    else:
        with pytest.raises(ktls.NotInKernelError):
            tls.send_record(RecordType.ALERT, b"\x01\x5a")
    peer.send(RecordType.APPLICATION_DATA, b"0123456789")
    assert tls.recv_record(4) == (RecordType.APPLICATION_DATA, b"0123")
    assert tls.recv_record() == (RecordType.APPLICATION_DATA, b"456789")
    peer.send(RecordType.ALERT, b"\x01\x00")
    for _ in range(2):
        assert tls.recv_record() == (RecordType.ALERT, b"\x01\x00")


@both_libraries
def test_both_directions_at_once(
    make_record_pair: MakeRecordPair, in_thread: InThread, version: str, mode: str
) -> None:
    """One thread sends, one receives, both on the same socket: neither disturbs the other."""
    pair = make_record_pair(version, "server", mode)
    data = os.urandom(1 << 20)

    def send_records() -> None:
        for at in range(0, len(data), 8192):
            pair.peer.send(RecordType.APPLICATION_DATA, data[-1 - at : -1 - at - 8192 : -1])

    # The ssl module's sockets aren't safe for two threads; these records are.
    sending, peer_sending = in_thread(pair.tls.sendall, data), in_thread(send_records)
    receiving = in_thread(receive, pair.tls, len(data))
    assert pair.peer.receive_data(len(data)) == data
    assert receiving.result(30) == data[::-1]
    sending.result(5)
    peer_sending.result(5)


@pytest.mark.parametrize("timeout", [0.2, 0], ids=["timeout", "non-blocking"])
def test_shutdown_does_not_disturb_a_receiver(
    make_pair: MakePair, in_thread: InThread, mode: str, timeout: float
) -> None:
    """While one thread waits to get close_notify out, the other's recv() keeps its own timeout."""
    pair = make_pair("TLSv1.3", "server", mode, close_timeout=0.6)
    narrow(pair)
    pair.tls.setblocking(False)
    data = os.urandom(1 << 20)
    sent = fill(pair.tls, data)
    pair.tls.settimeout(timeout)

    def shut_down() -> None:
        with suppress(ktls.StalledError):
            pair.tls.shutdown(socket.SHUT_WR)

    closing = in_thread(shut_down)
    rescue = threading.Timer(5, lambda: pair.peer.sendall(b"rescue"))
    rescue.start()
    try:
        error: type[OSError] = ktls.StalledError if timeout else ktls.WouldBlockError
        while not closing.done():
            with pytest.raises(error):
                pair.tls.recv(1)
    finally:
        rescue.cancel()
        rescue.join()
        closing.result(10)
        pair.tls.close_timeout = 20
        ending = in_thread(pair.tls.close)
        arrived = receive(pair.peer, 1 << 20)
        ending.result(20)
    assert data.startswith(arrived)
    assert len(arrived) >= sent


@pytest.mark.parametrize("how", ["unused", "alert", "garbage", "flood", "reset"])
@both_libraries
def test_no_reference_cycles(make_record_pair: MakeRecordPair, mode: str, how: str) -> None:
    """A socket that nobody holds goes at once, whatever happened to it: errors don't hold it."""
    pair = make_record_pair("TLSv1.3", "server", mode)
    gc.collect()
    gc.disable()
    try:
        if how == "alert":
            pair.peer.send(RecordType.ALERT, b"\x02\x28")
        elif how == "garbage":
            pair.peer.sock.sendall(bytes([RecordType.APPLICATION_DATA, 3, 3, 0, 64]) + bytes(64))
        elif how == "flood":
            for _ in range(200):
                pair.peer.send(RecordType.ALERT, bytes([1, ktls.Alert.USER_CANCELED]))
        elif how == "reset":
            pair.peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            pair.peer.sock.close()
        if how != "unused":
            with suppress(ktls.KTLSError):
                pair.tls.recv(100)
        pair.tls.close()
        alive = weakref.ref(pair.tls)
        del pair.tls
        assert alive() is None
    finally:
        gc.enable()


def test_before_the_handshake(identity: Identity) -> None:
    """Everything says that the handshake comes first; nothing goes out."""
    accepted, connecting = tcp_pair()
    with connecting:
        tls = ktls.wrap(
            accepted, server_context(identity), server_side=True, do_handshake_on_connect=False
        )
        with tls:
            for call in (
                lambda: tls.send(b"x"),
                lambda: tls.sendall(b"x"),
                lambda: tls.sendmsg([b"x"]),
                lambda: tls.recv(1),
                lambda: tls.send_record(23, b"x"),
                tls.unwrap,
                lambda: tls.send(b"x"),
            ):
                with pytest.raises(ktls.HandshakeNotDoneError):
                    call()
            assert tls.pending() == 0
            assert tls.cipher() is None
            assert tls.getpeercert() is None
            assert tls.get_session() is None
        connecting.settimeout(5)
        assert connecting.recv(100) == b""


def test_after_close(make_pair: MakePair, mode: str) -> None:
    pair = make_pair("TLSv1.3", "server", mode)
    pair.tls.close()
    pair.tls.close()
    assert pair.tls.fileno() == -1
    with pytest.raises(OSError, match=r"."):
        pair.tls.send(b"x")
    with pytest.raises(OSError, match=r"."):
        pair.tls.recv(1)
