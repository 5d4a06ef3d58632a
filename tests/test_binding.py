"""``_ktls``: arguments, errors that name their system call, and the GIL."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ktls import Cipher, CryptoInfo, Version, _ktls, offload
from ktls.records import RecordCipher

from .conftest import Interrupted, InThread, tcp_pair

GCM_128 = 51
OPTIONS = (_ktls.TX_ZEROCOPY_RO, _ktls.RX_EXPECT_NO_PAD, _ktls.TX_MAX_PAYLOAD_LEN)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connected TCP pair."""
    left, right = tcp_pair()
    with left, right:
        left.settimeout(None)
        right.settimeout(10)
        yield left, right


def keys(**changed: Any) -> dict[str, Any]:  # noqa: ANN401
    """Arguments of install() for AES-128-GCM in TLS 1.2."""
    good: dict[str, Any] = {
        "version": _ktls.VERSION_1_2,
        "cipher": GCM_128,
        "key": bytes(range(16)),
        "iv": bytes(8),
        "salt": bytes(4),
        "rec_seq": bytes(8),
    }
    return good | changed


def test_cipher_table() -> None:
    """id, name, sizes of key, iv, salt and tag, and whether TLS 1.2 and 1.3 have it."""
    table = {row[0]: row[1:] for row in _ktls.cipher_table()}
    assert table[51] == ("AES_GCM_128", 16, 8, 4, 16, True, True)
    assert table[52] == ("AES_GCM_256", 32, 8, 4, 16, True, True)
    assert table[54] == ("CHACHA20_POLY1305", 32, 12, 0, 16, True, True)
    assert sorted(table) == list(range(51, 59))


def test_constants() -> None:
    """Those of <linux/tls.h>, which Linux never changes."""
    assert (_ktls.TX, _ktls.RX) == (1, 2)
    assert (_ktls.TX_ZEROCOPY_RO, _ktls.RX_EXPECT_NO_PAD, _ktls.TX_MAX_PAYLOAD_LEN) == (3, 4, 5)
    assert (_ktls.VERSION_1_2, _ktls.VERSION_1_3) == (0x0303, 0x0304)
    assert (_ktls.REC_SEQ_SIZE, _ktls.MAX_PAYLOAD) == (8, 1 << 14)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (_ktls.attach, "setsockopt(TCP_ULP)"),
        (lambda fd: _ktls.install(fd, _ktls.TX, **keys()), "setsockopt(TLS_TX)"),
        (lambda fd: _ktls.install(fd, _ktls.RX, **keys()), "setsockopt(TLS_RX)"),
        (lambda fd: _ktls.query(fd, _ktls.TX), "getsockopt(TLS_TX)"),
        (lambda fd: _ktls.query(fd, _ktls.RX), "getsockopt(TLS_RX)"),
        (lambda fd: _ktls.set_option(fd, _ktls.TX_MAX_PAYLOAD_LEN, 512), "setsockopt(SOL_TLS)"),
        (lambda fd: _ktls.get_option(fd, _ktls.TX_ZEROCOPY_RO), "getsockopt(SOL_TLS)"),
        (lambda fd: _ktls.send_record(fd, 23, b"x"), "sendmsg"),
        (lambda fd: _ktls.update_key(fd, 0, request=0, **keys()), "sendmsg"),
        (_ktls.flush, "sendmsg"),
        (_ktls.push, "getsockopt(SO_SNDBUF)"),
        (lambda fd: _ktls.recv_record_into(fd, bytearray(1)), "recvmsg"),
    ],
)
def test_errors_name_the_call(call: Callable[[int], object], name: str) -> None:
    """An OSError's text begins with the system call that failed."""
    for descriptor, number in ((-1, errno.EBADF), (1 << 20, errno.EBADF)):
        with pytest.raises(OSError, match=os.strerror(number)) as caught:
            call(descriptor)
        assert caught.value.errno == number
        assert caught.value.strerror == f"{name}: {os.strerror(number)}"
    with open(__file__, "rb") as file, pytest.raises(OSError, match=r".") as caught:
        call(file.fileno())
    assert caught.value.errno == errno.ENOTSOCK


def test_errors_have_their_class(pair: tuple[socket.socket, socket.socket]) -> None:
    """The subclass of OSError that fits the errno."""
    left, right = pair
    left.setblocking(False)
    with pytest.raises(BlockingIOError):
        _ktls.recv_record_into(left.fileno(), bytearray(1))
    right.close()
    _ktls.send_record(left.fileno(), 23, b"x")  # answered by a reset
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        _ktls.send_record(left.fileno(), 23, b"x")


def test_errors_while_another_is_handled(pair: tuple[socket.socket, socket.socket]) -> None:
    """The same, with the other one as its context."""
    pair[0].setblocking(False)
    try:
        raise ZeroDivisionError
    except ZeroDivisionError as first:
        with pytest.raises(BlockingIOError) as caught:
            _ktls.recv_record_into(pair[0].fileno(), bytearray(1))
        assert caught.value.errno == errno.EAGAIN
        assert caught.value.__context__ is first  # noqa: PT017


def test_socket_without_the_ulp(pair: tuple[socket.socket, socket.socket]) -> None:
    left, _ = pair
    with pytest.raises(OSError, match="setsockopt") as caught:
        _ktls.install(left.fileno(), _ktls.TX, **keys())
    assert caught.value.errno == errno.ENOPROTOOPT
    with pytest.raises(OSError, match="getsockopt") as caught:
        _ktls.query(left.fileno(), _ktls.TX)
    assert caught.value.errno in (errno.EOPNOTSUPP, errno.ENOPROTOOPT)
    for option in OPTIONS:
        with pytest.raises(OSError, match=r"setsockopt\(SOL_TLS\)") as caught:
            _ktls.set_option(left.fileno(), option, 1)
        assert caught.value.errno == errno.ENOPROTOOPT
        with pytest.raises(OSError, match=r"getsockopt\(SOL_TLS\)") as caught:
            _ktls.get_option(left.fileno(), option)
        assert caught.value.errno in (errno.EOPNOTSUPP, errno.ENOPROTOOPT)


def test_wrong_value() -> None:
    """What the option can't hold never gets as far as the kernel."""
    for value in (1 << 16, (1 << 16) + 512, (1 << 32) - 1):
        with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
            _ktls.set_option(-1, _ktls.TX_MAX_PAYLOAD_LEN, value)
    for value in (-1, 1 << 32):
        with pytest.raises(TypeError):
            _ktls.set_option(-1, _ktls.TX_ZEROCOPY_RO, value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"key": bytes(15)}, "key must be 16 bytes, not 15"),
        ({"key": bytes(32)}, "key must be 16 bytes, not 32"),
        ({"iv": b""}, "iv must be 8 bytes, not 0"),
        ({"salt": bytes(5)}, "salt must be 4 bytes, not 5"),
        ({"rec_seq": bytes(7)}, "rec_seq must be 8 bytes, not 7"),
        ({"cipher": 99}, "unknown cipher 99"),
    ],
)
def test_wrong_keys(changed: dict[str, Any], message: str) -> None:
    """Wrong sizes don't reach the kernel; no message has any of the key in it."""
    for call in (partial(_ktls.install, -1, _ktls.TX), partial(_ktls.update_key, -1, 0, request=0)):
        with pytest.raises(ValueError, match=message) as caught:
            call(**keys(**changed))
        assert str(caught.value) == message


@pytest.mark.parametrize(
    "changed", [{"version": 0x0301}, {"version": 0x10303}, {"cipher": 57, "version": 0x0304}]
)
def test_wrong_version(changed: dict[str, Any]) -> None:
    with pytest.raises((OSError, TypeError), match=f"{os.strerror(errno.EINVAL)}|incompatible"):
        _ktls.install(-1, _ktls.TX, **keys(**changed))


@pytest.mark.parametrize("direction", [0, 3, -1])
def test_wrong_direction(direction: int) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        _ktls.install(-1, direction, **keys())
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        _ktls.query(-1, direction)


def test_wrong_types(pair: tuple[socket.socket, socket.socket], tmp_path: Path) -> None:
    """TypeError, before any system call."""
    fd = pair[0].fileno()
    wrong: Any = "text"
    for call in (
        lambda: _ktls.attach(wrong),
        lambda: _ktls.attach(1 << 40),
        lambda: _ktls.install(fd, _ktls.TX, **keys(key="0123456789abcdef")),
        lambda: _ktls.install(fd, _ktls.TX, **keys(key=None)),
        lambda: _ktls.set_option(fd, _ktls.TX_ZEROCOPY_RO, wrong),
        lambda: _ktls.get_option(fd, wrong),
        lambda: _ktls.send_record(fd, 23, wrong),
        lambda: _ktls.recv_record_into(fd, wrong),
        lambda: lane(fd).send_part(fd, fd, wrong, 1),
        lambda: lane(fd).send_part(fd, fd, 0, wrong),
    ):
        with pytest.raises(TypeError):
            call()
    with pytest.raises(BufferError):
        _ktls.recv_record_into(fd, b"read-only")
    with pytest.raises(BufferError):
        _ktls.recv_record_into(fd, memoryview(bytearray(8))[::2])
    for record_type in (-1, 256):
        with pytest.raises(ValueError, match="0 to 255"):
            _ktls.send_record(fd, record_type, b"")


def test_record_too_long(pair: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EMSGSIZE)):
        _ktls.send_record(pair[0].fileno(), 23, bytes(_ktls.MAX_PAYLOAD + 1))


def test_plain_tcp(pair: tuple[socket.socket, socket.socket]) -> None:
    """Without keys bytes have no type, and the end neither."""
    left, right = pair
    right.sendall(b"plain")
    buffer = bytearray(10)
    assert _ktls.recv_record_into(left.fileno(), buffer) == (5, _ktls.RECORD_NONE, False)
    assert buffer == b"plain" + bytes(5)
    right.close()
    assert _ktls.recv_record_into(left.fileno(), buffer) == (0, _ktls.RECORD_NONE, False)


def test_buffers_are_released(pair: tuple[socket.socket, socket.socket]) -> None:
    """A bytearray can be resized after the call, also after a failed one."""
    left, right = pair
    buffer = bytearray(8)
    right.sendall(b"x")
    _ktls.recv_record_into(left.fileno(), buffer)
    buffer.append(0)
    with pytest.raises(OSError, match="recvmsg"):
        _ktls.recv_record_into(-1, buffer)
    buffer.append(0)
    with pytest.raises(OSError, match="sendmsg"):
        _ktls.send_record(-1, 23, buffer)
    buffer.append(0)
    with pytest.raises(ValueError, match="record type"):
        _ktls.send_record(-1, 999, buffer)
    buffer.append(0)


def lane(fd: int) -> _ktls.Lane:
    """Of a key that may protect as much as it likes."""
    return _ktls.Lane(fd, 1 << 14, 0, 1 << 40)


def test_send_part_counts_beside_its_error(
    pair: tuple[socket.socket, socket.socket], tmp_path: Path
) -> None:
    """(offset, errno): an error doesn't hide what was sent."""
    left, _ = pair
    fd, sending = left.fileno(), lane(left.fileno())
    path = tmp_path / "file"
    path.write_bytes(bytes(16 << 20))
    left.setblocking(False)
    with path.open("rb") as file:
        sent, number = sending.send_part(fd, file.fileno(), 0, 1 << 62)
        while number == errno.EINTR:  # short; perhaps it is full
            sent, number = sending.send_part(fd, file.fileno(), sent, 1 << 62)
        assert 0 < sent < 16 << 20
        assert number == errno.EAGAIN
        assert sending.send_part(fd, -1, 5, 1) == (5, errno.EBADF)
        assert sending.sent == sent
        assert (sent >> 14) + 1 <= sending.used <= (sent >> 14) + 9
        for offset, count in ((-1, 1), (0, -1)):
            with pytest.raises(ValueError, match="negative"):
                sending.send_part(fd, file.fileno(), offset, count)
        with pytest.raises(OverflowError):
            sending.send_part(fd, file.fileno(), 1 << 63, 1)


def test_send_part_before_a_handler_raises(
    pair: tuple[socket.socket, socket.socket],
    in_thread: InThread,
    interrupting: Callable[[], None],
    tmp_path: Path,
) -> None:
    """A short call ends it: the count is told by the time that Python handles the signal."""
    left, right = pair
    path = tmp_path / "file"
    path.write_bytes(bytes(64 << 20))

    def interrupt() -> None:
        assert right.recv(1)
        interrupting()

    outcomes: list[tuple[int, int]] = []
    with path.open("rb") as file:
        stopping = in_thread(interrupt)
        send = partial(lane(left.fileno()).send_part, left.fileno(), file.fileno(), 0)
        with pytest.raises(Interrupted):
            outcomes.extend(map(send, (64 << 20,)))
        stopping.result(5)
    ((sent, number),) = outcomes
    assert 0 < sent < 64 << 20
    assert number == errno.EINTR


def test_gil_is_released(
    pair: tuple[socket.socket, socket.socket], in_thread: Callable[..., Future[Any]]
) -> None:
    """Another Python thread runs while a blocking receive waits for what that thread sends."""
    left, right = pair
    started = threading.Event()

    def receive() -> tuple[int, int, bool]:
        started.set()
        return _ktls.recv_record_into(left.fileno(), bytearray(10))

    receiving = in_thread(receive)
    assert started.wait(5)
    count = sum(range(100000))  # some bytecode, so that the other thread is surely waiting
    right.sendall(b"x" if count else b"")
    assert receiving.result(10) == (1, _ktls.RECORD_NONE, False)


RECEIVES_AT_EXIT = """
import socket, sys, threading
from ktls import _ktls

class Last:  # what Python throws away at the very end
    def __init__(self, pair):
        self.pair, self.never = pair, threading.Event()

    def __del__(self):
        self.pair[1].send(b"x")
        self.never.wait(0.3)

sys.last = Last(pair := socket.socketpair())
begun = threading.Event()

def receive():
    begun.set()
    _ktls.recv_record_into(pair[0].fileno(), bytearray(1))

threading.Thread(target=receive, daemon=True).start()
begun.wait()
"""


def test_daemon_thread_at_exit() -> None:
    """A system call that ends while Python exits doesn't abort the process."""
    done = subprocess.run(
        [sys.executable, "-c", RECEIVES_AT_EXIT], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_gil_is_released_by_send(
    pair: tuple[socket.socket, socket.socket],
    in_thread: Callable[..., Future[Any]],
    tmp_path: Path,
) -> None:
    """A blocking sendfile waits for a reader in this very process."""
    left, right = pair
    path = tmp_path / "file"
    path.write_bytes(bytes(16 << 20))
    # In plain TCP the flush of kernel TLS has nothing to do: count is the file's size.
    with path.open("rb") as file:
        send_part = lane(left.fileno()).send_part
        sending = in_thread(send_part, left.fileno(), file.fileno(), 0, 16 << 20)
        received = 0
        while received < 16 << 20:
            received += len(right.recv(1 << 20))
        assert sending.result(10) == (16 << 20, 0)


@pytest.mark.parametrize("request_peer", [0, 1])
def test_update_key_without_the_ulp(
    pair: tuple[socket.socket, socket.socket], request_peer: int
) -> None:
    """The record is out, if a plain one, and the keys' errno is no exception any more."""
    left, right = pair
    answer = _ktls.update_key(
        left.fileno(), socket.MSG_DONTWAIT, request=request_peer, **keys(version=0x304)
    )
    assert answer == errno.ENOPROTOOPT
    assert right.recv(100) == bytes([24, 0, 0, 1, request_peer])


def test_update_key_would_block(pair: tuple[socket.socket, socket.socket]) -> None:
    """An exception: nothing has changed."""
    left, right = pair
    left.setblocking(False)
    sent = 0
    with suppress(BlockingIOError):
        while True:
            sent += left.send(bytes(1 << 20))
    with pytest.raises(BlockingIOError, match="sendmsg"):
        _ktls.update_key(left.fileno(), socket.MSG_DONTWAIT, request=0, **keys(version=0x304))
    left.shutdown(socket.SHUT_WR)
    while data := right.recv(1 << 20):
        sent -= len(data)
    assert sent == 0


@pytest.mark.kernel
def test_update_key(pair: tuple[socket.socket, socket.socket]) -> None:
    """The record is the old key's last, the sequence begins anew; EBUSY where it can't."""
    left, right = pair
    _ktls.attach(left.fileno())
    old = keys(version=_ktls.VERSION_1_3, rec_seq=(7).to_bytes(8, "big"))
    _ktls.install(left.fileno(), _ktls.TX, **old)
    answer = _ktls.update_key(
        left.fileno(), 0, request=1, **keys(version=_ktls.VERSION_1_3, key=bytes(16))
    )
    assert answer == (0 if offload.can_rekey() else errno.EBUSY)
    opener = RecordCipher(CryptoInfo(Version.TLS_1_3, Cipher.AES_GCM_128, **secrets(old)))
    assert opener.open(right.recv(1000)) == (22, bytes([24, 0, 0, 1, 1]))
    if answer:
        return
    assert _ktls.query(left.fileno(), _ktls.TX)[3] == bytes(8)
    left.sendall(b"new")
    new = secrets(old) | {"key": bytes(16), "rec_seq": 0}
    opener = RecordCipher(CryptoInfo(Version.TLS_1_3, Cipher.AES_GCM_128, **new))
    assert opener.open(right.recv(1000)) == (23, b"new")


def secrets(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same for `CryptoInfo`."""
    found = {name: arguments[name] for name in ("key", "iv", "salt")}
    return found | {"rec_seq": int.from_bytes(arguments["rec_seq"], "big")}


@pytest.mark.kernel
def test_install_and_query(pair: tuple[socket.socket, socket.socket]) -> None:
    """What the kernel tells back: version, cipher, iv and sequence; never the key."""
    left, right = pair
    _ktls.attach(left.fileno())
    with pytest.raises(FileExistsError):
        _ktls.attach(left.fileno())
    with pytest.raises(OSError, match=os.strerror(errno.EBUSY)):
        _ktls.query(left.fileno(), _ktls.TX)
    _ktls.install(left.fileno(), _ktls.TX, **keys(rec_seq=(5).to_bytes(8, "big"), iv=b"explicit"))
    answer = _ktls.query(left.fileno(), _ktls.TX)
    assert answer == (_ktls.VERSION_1_2, GCM_128, b"explicit", (5).to_bytes(8, "big"))
    with pytest.raises(OSError, match=os.strerror(errno.EBUSY)):
        _ktls.install(left.fileno(), _ktls.TX, **keys())
    assert _ktls.send_record(left.fileno(), 21, b"\1\0") == 2
    assert right.recv(5)[0] == 21
    assert _ktls.query(left.fileno(), _ktls.TX)[3] == (6).to_bytes(8, "big")
    _ktls.flush(left.fileno())
    assert _ktls.query(left.fileno(), _ktls.TX)[3] == (6).to_bytes(8, "big")


@pytest.mark.kernel
def test_options(pair: tuple[socket.socket, socket.socket]) -> None:
    """They read as they were set; what the kernel refuses changes nothing."""
    fd = pair[0].fileno()
    _ktls.attach(fd)
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        _ktls.set_option(fd, _ktls.RX_EXPECT_NO_PAD, 1)  # it wants keys first
    _ktls.install(fd, _ktls.RX, **keys(version=_ktls.VERSION_1_3))
    _ktls.install(fd, _ktls.TX, **keys(version=_ktls.VERSION_1_3))
    for option in (_ktls.TX_ZEROCOPY_RO, _ktls.RX_EXPECT_NO_PAD):
        for value in (1, 0):
            _ktls.set_option(fd, option, value)
            assert _ktls.get_option(fd, option) == value
        with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
            _ktls.set_option(fd, option, 2)
        assert _ktls.get_option(fd, option) == 0
    with pytest.raises(OSError, match=r"setsockopt\(SOL_TLS\)") as caught:
        _ktls.set_option(fd, 99, 1)
    assert caught.value.errno == errno.ENOPROTOOPT


@pytest.mark.kernel
def test_longest_payload(pair: tuple[socket.socket, socket.socket]) -> None:
    """TX_MAX_PAYLOAD_LEN, where the kernel has it: one answer to all there is to ask."""
    fd = pair[0].fileno()
    _ktls.attach(fd)
    try:
        assert _ktls.get_option(fd, _ktls.TX_MAX_PAYLOAD_LEN) == _ktls.MAX_PAYLOAD
    except OSError as error:
        assert error.errno == errno.ENOPROTOOPT  # noqa: PT017
        with pytest.raises(OSError, match=os.strerror(errno.ENOPROTOOPT)):
            _ktls.set_option(fd, _ktls.TX_MAX_PAYLOAD_LEN, 512)
        return
    for value in (64, 512, _ktls.MAX_PAYLOAD):
        _ktls.set_option(fd, _ktls.TX_MAX_PAYLOAD_LEN, value)
        assert _ktls.get_option(fd, _ktls.TX_MAX_PAYLOAD_LEN) == value
    for value in (0, 62, 63, _ktls.MAX_PAYLOAD + 1, (1 << 16) - 1):
        with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
            _ktls.set_option(fd, _ktls.TX_MAX_PAYLOAD_LEN, value)
    assert _ktls.get_option(fd, _ktls.TX_MAX_PAYLOAD_LEN) == _ktls.MAX_PAYLOAD
    _ktls.install(fd, _ktls.TX, **keys())
    pair[0].send(b"open", socket.MSG_MORE)
    with pytest.raises(OSError, match=os.strerror(errno.EBUSY)):
        _ktls.set_option(fd, _ktls.TX_MAX_PAYLOAD_LEN, 512)


@pytest.mark.kernel
def test_two_ends(pair: tuple[socket.socket, socket.socket]) -> None:
    """The same keys at both ends: records, their types and their ends."""
    left, right = (sock.fileno() for sock in pair)
    pair[1].settimeout(None)
    _ktls.attach(left)
    _ktls.attach(right)
    _ktls.install(right, _ktls.RX, **keys())
    _ktls.install(left, _ktls.TX, **keys())
    _ktls.send_record(left, 23, b"data", socket.MSG_DONTWAIT)
    _ktls.send_record(left, 22, b"control")
    buffer = bytearray(100)
    assert _ktls.recv_record_into(right, buffer) == (4, 23, True)
    assert _ktls.recv_record_into(right, memoryview(buffer)[:3]) == (3, 22, False)
    assert _ktls.recv_record_into(right, buffer) == (4, 22, True)
    assert buffer[:4] == b"trol"
    with pytest.raises(BlockingIOError):
        _ktls.recv_record_into(right, buffer, socket.MSG_DONTWAIT)


def test_intake_of_nothing() -> None:
    """What isn't plain data is kept, an error too."""
    with open(os.devnull) as file:
        intake = _ktls.Intake(file.fileno())
        assert intake.recv(10, 0) is None
    assert intake.kept == [errno.ENOTSOCK]
    assert intake.attention


def test_intake_with_flags(pair: tuple[socket.socket, socket.socket]) -> None:
    """What makes recvmsg count bytes that it didn't write isn't done in C; nothing is taken."""
    left, right = pair
    right.sendall(b"data")
    intake = _ktls.Intake(left.fileno())
    for flags in (socket.MSG_TRUNC, socket.MSG_PEEK | socket.MSG_DONTWAIT, 1 << 32):
        assert intake.recv(10, flags) is None
        assert intake.recv_into(bytearray(10), flags) is None
    assert not intake.kept
    for size in (10, 1 << 70):
        with pytest.raises(TypeError):
            intake.recv(size, "0")  # type: ignore[arg-type]
    assert left.recv(10) == b"data"
