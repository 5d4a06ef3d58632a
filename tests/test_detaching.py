"""Connections that go on in another process: data without any key, KeyUpdates with the secret."""

from __future__ import annotations

import dataclasses
import errno
import gc
import hashlib
import multiprocessing
import os
import pickle
import re
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any

import pytest

import ktls
from ktls import RecordType, Socket, offload
from ktls.types import Alert, AlertLevel, HandshakeType

from .conftest import MODES, InThread, MakePair, MakeRecordPair
from .record_peer import RecordPeer

DATA = RecordType.APPLICATION_DATA
CLOSE_NOTIFY = (RecordType.ALERT, bytes([AlertLevel.WARNING, Alert.CLOSE_NOTIFY]))
SIZE = 2 << 20

pytestmark = pytest.mark.kernel


def moved(tls: Socket, **arguments: Any) -> Socket:  # noqa: ANN401
    """The same connection, as another process would make it: from a descriptor and bytes."""
    state = pickle.dumps(tls.detach_state(**arguments))
    descriptor = os.dup(tls.fileno())
    tls.close()
    return Socket.from_state(descriptor, pickle.loads(state))  # noqa: S301 - our own


@pytest.fixture
def move() -> Any:  # noqa: ANN401 - a generator of a function
    """`moved`, and what it made is closed at the end."""
    made: list[Socket] = []

    def make(tls: Socket, **arguments: Any) -> Socket:  # noqa: ANN401
        made.append(moved(tls, **arguments))
        return made[-1]

    yield make
    for tls in made:
        try:
            tls.close()
        except ktls.KTLSError:
            continue


Move = Callable[..., Socket]


def test_data_and_close(
    make_record_pair: MakeRecordPair, move: Move, version: str, side: str
) -> None:
    """Both directions go on where they stopped, also with data under way; both ends close."""
    pair = make_record_pair(version, side)
    pair.tls.sendall(b"before")
    pair.peer.send(DATA, b"read here, read there")
    assert pair.tls.recv(9) == b"read here"
    there = move(pair.tls)
    assert there.recv(100) == b", read there"
    there.sendall(b" and after")
    assert pair.peer.receive_data(16) == b"before and after"
    pair.peer.send(*CLOSE_NOTIFY)
    assert there.recv(1) == b""
    there.close()
    assert pair.peer.receive_other_than_tickets() == CLOSE_NOTIFY
    assert pair.peer.receive() is None


def test_what_it_tells(make_pair: MakePair, move: Move, version: str, side: str) -> None:
    """All that the handshake agreed on is known there, but for the session."""
    pair = make_pair(version, side)
    tls = pair.tls
    before = (tls.version(), tls.cipher(), tls.getpeercert(True), tls.selected_alpn_protocol())
    there = move(tls)
    after = (
        there.version(),
        there.cipher(),
        there.getpeercert(True),
        there.selected_alpn_protocol(),
    )
    assert after == before
    assert there.get_session() is None
    assert not there.session_reused
    assert there.tx.mode is there.rx.mode is ktls.Mode.SOFTWARE
    assert there.info().version is not None
    assert there.gettimeout() is None


def test_descriptor_blocks_again(make_pair: MakePair, tmp_path: Path) -> None:
    """After a sendfile: whoever gets the descriptor may rely on it. Else it is left as it is."""
    pair = make_pair("TLSv1.3")
    pair.tls.settimeout(None)
    (tmp_path / "file").write_bytes(b"content")
    with (tmp_path / "file").open("rb") as file:
        assert pair.tls.sendfile(file) == 7
    assert not os.get_blocking(pair.tls.fileno())
    pair.tls.detach_state()
    assert os.get_blocking(pair.tls.fileno())
    os.close(pair.tls.detach())
    assert pair.tls.detach() == -1
    another = make_pair("TLSv1.3").tls
    another.settimeout(None)
    os.set_blocking(another.fileno(), False)  # as in a process that goes on with it
    descriptor = another.detach()
    assert not os.get_blocking(descriptor)
    os.close(descriptor)


def test_alert_and_close_without_notify(
    make_record_pair: MakeRecordPair, move: Move, version: str
) -> None:
    """Control records work there: an alert received, an alert sent for a bad record."""
    pair = make_record_pair(version)
    there = move(pair.tls)
    pair.peer.send(99, b"what?")
    with pytest.raises(ktls.RecordError) as caught:
        there.recv(1)
    assert caught.value.alert is Alert.UNEXPECTED_MESSAGE
    there.close()
    answer = pair.peer.receive_other_than_tickets()
    assert answer == (RecordType.ALERT, bytes([AlertLevel.FATAL, Alert.UNEXPECTED_MESSAGE]))
    pair = make_record_pair(version)
    there = move(pair.tls)
    pair.peer.send(RecordType.ALERT, bytes([AlertLevel.FATAL, Alert.INTERNAL_ERROR]))
    with pytest.raises(ktls.AlertReceived):
        there.recv(1)


def test_tickets_are_dropped(make_record_pair: MakeRecordPair, move: Move) -> None:
    """Nobody there could use them; one that had come in part doesn't disturb either."""
    pair = make_record_pair("TLSv1.3", "client")
    first, second = pair.peer.tickets
    pair.peer.send(RecordType.HANDSHAKE, first[:50])
    pair.tls.setblocking(False)
    with pytest.raises(ktls.WouldBlockError):
        pair.tls.recv(1)
    there = move(pair.tls)
    pair.peer.send(RecordType.HANDSHAKE, first[50:] + second)
    pair.peer.send(DATA, b"data")
    there.settimeout(5)
    assert there.recv(100) == b"data"


def test_corked_data_goes_first(make_record_pair: MakeRecordPair, move: Move) -> None:
    pair = make_record_pair("TLSv1.3")
    pair.tls.sendall(b"open ", socket.MSG_MORE)
    there = move(pair.tls)
    there.sendall(b"closed")
    assert pair.peer.receive_data(11) == b"open closed"


def test_half_closed(make_record_pair: MakeRecordPair, move: Move, version: str) -> None:
    """What was over stays over."""
    pair = make_record_pair(version)
    pair.tls.shutdown(socket.SHUT_WR)
    pair.peer.send(DATA, b"still")
    there = move(pair.tls)
    assert there.recv(100) == b"still"
    with pytest.raises(ktls.ClosedForWritingError):
        there.send(b"x")
    pair.peer.send(*CLOSE_NOTIFY)
    assert there.recv(1) == b""
    again = move(there)
    assert again.recv(1) == b""


@pytest.mark.parametrize("requested", [False, True], ids=["not-requested", "requested"])
def test_key_update_with_the_secret(
    make_record_pair: MakeRecordPair, move: Move, side: str, requested: bool
) -> None:
    """Followed, answered and made there, over several generations."""
    pair = make_record_pair("TLSv1.3", side)
    there = move(pair.tls, key_updates=True)
    there.settimeout(5)
    if not offload.can_rekey():
        pair.peer.update_keys(requested=requested)
        with pytest.raises(ktls.RekeyUnsupportedError, match=r"6\.14"):
            there.recv(1)
        return
    for number in range(3):
        pair.peer.update_keys(requested=requested)
        pair.peer.send(DATA, b"%d" % number)
        assert there.recv(100) == b"%d" % number
        if requested:
            answer = pair.peer.receive_other_than_tickets()
            assert answer == (RecordType.HANDSHAKE, bytes([24, 0, 0, 1, 0]))
            pair.peer.follow_key_update()
        there.update_keys()
        there.sendall(b"own")
        answer = pair.peer.receive_other_than_tickets()
        assert answer == (RecordType.HANDSHAKE, bytes([24, 0, 0, 1, 0]))
        pair.peer.follow_key_update()
        assert pair.peer.receive_data(3) == b"own"
        there = move(there, key_updates=True)
        there.settimeout(5)


def test_key_update_without_the_secret(make_record_pair: MakeRecordPair, move: Move) -> None:
    """A typed error that says what is missing, and an alert for the peer."""
    pair = make_record_pair("TLSv1.3")
    there = move(pair.tls)
    with pytest.raises(ktls.RekeyUnsupportedError, match="key_updates=True"):
        there.update_keys()
    there.sendall(b"as before")
    assert pair.peer.receive_data(9) == b"as before"
    pair.peer.update_keys(requested=True)
    for _ in range(2):
        with pytest.raises(ktls.RekeyUnsupportedError):
            there.recv(1)
    answer = pair.peer.receive_other_than_tickets()
    assert answer == (RecordType.ALERT, bytes([AlertLevel.FATAL, Alert.INTERNAL_ERROR]))


def test_limit_of_a_key_goes_along(
    make_record_pair: MakeRecordPair, move: Move, in_thread: InThread, version: str
) -> None:
    """Records that were sent before count; without the secret the limit ends the connection."""
    pair = make_record_pair(version, record_limit=50)
    pair.tls.sendall(bytes(20 << 14))
    there = move(pair.tls)
    received = in_thread(_count_records, pair.peer)
    with pytest.raises(ktls.KeyLimitError, match="connect again"):
        there.sendall(bytes(60 << 14))
    there.close()
    assert received.result(20) <= 50


def _count_records(peer: RecordPeer) -> int:
    count = 0
    while peer.receive() is not None:
        count += 1
    return count


def test_refused(make_record_pair: MakeRecordPair, version: str) -> None:
    """In userspace, before the handshake is done, twice, after an error, with a wrong state."""
    for name in MODES.keys() - {"kernel"}:
        pair = make_record_pair(version, "server", name)
        with pytest.raises(ktls.NotInKernelError, match="OpenSSL"):
            pair.tls.detach_state()
        pair.tls.sendall(b"goes on")
        assert pair.peer.receive_data(7) == b"goes on"
    pair = make_record_pair(version)
    state = pair.tls.detach_state()
    calls: list[Callable[[], object]] = [
        pair.tls.detach_state,
        lambda: pair.tls.send(b"x"),
        lambda: pair.tls.recv(1),
        pair.tls.unwrap,
        pair.tls.update_keys,
    ]
    for call in calls:
        with pytest.raises(ktls.DetachedError):
            call()
    other = make_record_pair("TLSv1.2" if version == "TLSv1.3" else "TLSv1.3")
    with pytest.raises(ktls.KeyMaterialError):
        Socket.from_state(other.tls.fileno(), state)
    other.tls.sendall(b"untouched")
    assert other.peer.receive_data(9) == b"untouched"
    with offload.loopback_pair() as (left, _right), pytest.raises(ktls.KeyMaterialError):
        Socket.from_state(left.fileno(), state)
    broken = make_record_pair(version)
    broken.peer.send(RecordType.ALERT, bytes([AlertLevel.FATAL, Alert.INTERNAL_ERROR]))
    with pytest.raises(ktls.AlertReceived):
        broken.tls.recv(1)
    with pytest.raises(ktls.AlertReceived):
        broken.tls.detach_state()


@pytest.mark.parametrize("how", [socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR])
def test_shutdown_of_what_went_elsewhere(
    make_record_pair: MakeRecordPair, version: str, how: int
) -> None:
    """Refused: a FIN without close_notify would be the end of what goes on there."""
    pair = make_record_pair(version)
    state = pair.tls.detach_state()
    with Socket.from_state(os.dup(pair.tls.fileno()), state) as there:
        with pytest.raises(ktls.DetachedError):
            pair.tls.shutdown(how)
        pair.tls.close()
        there.sendall(b"goes on")
        assert pair.peer.receive_data(7) == b"goes on"
        pair.peer.send(DATA, b"both ways")
        assert there.recv(100) == b"both ways"


def test_what_is_no_connection(make_record_pair: MakeRecordPair, tmp_path: Path) -> None:
    """SocketError, and the descriptor is still the caller's."""
    state = make_record_pair("TLSv1.3").tls.detach_state()
    for wrong in (-1, 1 << 20):
        with pytest.raises(ktls.SocketError, match="not a socket") as caught:
            Socket.from_state(wrong, state)
        assert caught.value.errno == errno.EBADF
    with (tmp_path / "file").open("wb") as file:
        with pytest.raises(ktls.SocketError) as caught:
            Socket.from_state(file.fileno(), state)
        assert caught.value.errno == errno.ENOTSOCK
        file.write(b"still open")
    left, right = socket.socketpair()
    with left, right:
        with pytest.raises(ktls.SocketError):
            Socket.from_state(left.fileno(), state)
        left.sendall(b"still open")
        assert right.recv(100) == b"still open"


def test_state_shows_no_secret(make_record_pair: MakeRecordPair) -> None:
    """Neither without the secrets, where there is none, nor with them."""
    pair = make_record_pair("TLSv1.3")
    secrets = list(pair.peer._secrets.values())
    state = pair.tls.detach_state()
    assert not state.can_update_keys
    assert not any(secret in pickle.dumps(state) for secret in secrets)
    pair = make_record_pair("TLSv1.3")
    secrets = list(pair.peer._secrets.values())
    state = pair.tls.detach_state(key_updates=True)
    assert state.can_update_keys
    assert sum(secret in pickle.dumps(state) for secret in secrets) == 2
    shown = repr(state) + str(state)
    for secret in secrets:
        assert repr(secret)[2:-1] not in shown
        assert secret.hex() not in shown
    assert not dataclasses.replace(state, tx_chain=state.tx_chain.without_secret()).can_update_keys


# The other process: takes the connection, sends the rest of the file, answers, closes.
OTHER = """
import pickle, socket, sys
import ktls
channel = socket.socket(fileno=int(sys.argv[1]))
message, (descriptor,), *_ = socket.recv_fds(channel, 1 << 16, 1)
tls = ktls.Socket.from_state(descriptor, pickle.loads(message))
with open(sys.argv[2], "rb") as file:
    tls.sendfile(file, int(sys.argv[3]))
answer = tls.recv(100)
channel.sendall(answer)
channel.recv(1)  # the other side looks at this process's memory
tls.close()
"""


@pytest.mark.parametrize("key_updates", [False, True], ids=["no-secret", "secret"])
def test_another_process_finishes_a_file(
    make_record_pair: MakeRecordPair,
    in_thread: InThread,
    tmp_path: Path,
    version: str,
    key_updates: bool,
) -> None:
    """By SCM_RIGHTS. The peer notices nothing; no key is in the other process's memory."""
    pair = make_record_pair(version)
    path, content = tmp_path / "file", os.urandom(SIZE)
    path.write_bytes(content)
    keys = [pair.peer.keys.tx.key, pair.peer.keys.rx.key]
    secrets = [s for label, s in pair.peer._secrets.items() if label.endswith("TRAFFIC_SECRET_0")]
    ours, theirs = socket.socketpair()
    receiving = in_thread(pair.peer.receive_data, SIZE)
    with ours, path.open("rb") as file:
        sent = pair.tls.sendfile(file, 0, SIZE // 2)
        words = [sys.executable, "-c", OTHER, str(theirs.fileno()), str(path), str(sent)]
        with subprocess.Popen(words, pass_fds=[theirs.fileno()]) as other:
            theirs.close()
            state = pair.tls.detach_state(key_updates=key_updates)
            socket.send_fds(ours, [pickle.dumps(state)], [pair.tls.fileno()])
            pair.tls.close()
            received = receiving.result(30)
            assert hashlib.sha256(received).digest() == hashlib.sha256(content).digest()
            pair.peer.send(DATA, b"thank you")
            assert ours.recv(100) == b"thank you"
            memory = memory_of(other.pid)
            ours.sendall(b"x")
            assert other.wait(10) == 0
    assert pair.peer.receive_other_than_tickets() == CLOSE_NOTIFY
    assert pair.peer.receive() is None
    assert b"from_state" in memory  # it has been looked at
    for key in keys:
        assert key not in memory
    for secret in secrets:
        assert (secret in memory) == (key_updates and version == "TLSv1.3")


def memory_of(process: int) -> bytes:
    """All of a process's writable memory."""
    found = []
    maps = Path(f"/proc/{process}/maps").read_text(encoding="ascii")
    with Path(f"/proc/{process}/mem").open("rb", buffering=0) as memory:
        for start, end in re.findall(r"^(\w+)-(\w+) rw.*", maps, re.MULTILINE):
            memory.seek(int(start, 16))
            try:
                found.append(memory.read(int(end, 16) - int(start, 16)))
            except OSError:  # [vvar] and the like
                continue
    return b"".join(found)


def _echo(channel: Connection) -> None:
    with Socket.from_state(recv_handle(channel), channel.recv()) as tls:
        tls.sendall(tls.recv(100))


@pytest.fixture(scope="session")
def _spawning() -> None:
    """What multiprocessing starts once, and keeps."""
    resource_tracker.ensure_running()


@pytest.mark.usefixtures("_spawning")
def test_spawned_process(make_record_pair: MakeRecordPair, version: str) -> None:
    """By multiprocessing: it passes the descriptor on, and pickles the state."""
    pair = make_record_pair(version)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with ours, theirs:
        pair.peer.sock.settimeout(50)  # an interpreter starts, and imports
        state = pair.tls.detach_state()
        process = context.Process(target=_echo, args=(theirs,))
        process.start()
        assert process.pid is not None
        send_handle(ours, pair.tls.fileno(), process.pid)
        ours.send(state)
        pair.tls.close()
        pair.peer.send(DATA, b"echo")
        assert pair.peer.receive_data(4) == b"echo"
        assert pair.peer.receive() == CLOSE_NOTIFY
        process.join(20)
        assert process.exitcode == 0
        process.close()


def test_forked_process(make_record_pair: MakeRecordPair, version: str) -> None:
    """The child goes on, the parent closes its descriptor; no close_notify comes of that."""
    pair = make_record_pair(version)
    state = pair.tls.detach_state()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with Socket.from_state(os.dup(pair.tls.fileno()), state) as tls:
                tls.sendall(tls.recv(100))
            status = 0
        finally:
            os._exit(status)
    pair.tls.close()
    pair.peer.send(DATA, b"echo")
    assert pair.peer.receive_data(4) == b"echo"
    assert pair.peer.receive() == CLOSE_NOTIFY
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# -- release() -------------------------------------------------------------------------------------


def test_release(make_record_pair: MakeRecordPair, version: str, side: str) -> None:
    """OpenSSL is gone; data under way, alerts and both ends' close_notify go on."""
    pair = make_record_pair(version, side)
    known = (pair.tls.cipher(), pair.tls.version(), pair.tls.tx, pair.tls.rx)
    kept = weakref.ref(pair.tls.ssl_object)
    pair.tls.sendall(b"before")
    pair.peer.send(DATA, b"read before, read after")
    assert pair.tls.recv(11) == b"read before"
    pair.tls.release()
    gc.collect()
    assert kept() is None
    assert pair.tls.ssl_object is None
    assert pair.tls.get_session() is None
    assert (pair.tls.cipher(), pair.tls.version(), pair.tls.tx, pair.tls.rx) == known
    assert pair.tls.recv(100) == b", read after"
    pair.tls.sendall(b" and after")
    assert pair.peer.receive_data(16) == b"before and after"
    pair.tls.release()  # once more does no harm
    pair.peer.send(*CLOSE_NOTIFY)
    assert pair.tls.recv(1) == b""
    pair.tls.close()
    assert pair.peer.receive_other_than_tickets() == CLOSE_NOTIFY


def test_release_after_the_end_of_sending(make_record_pair: MakeRecordPair) -> None:
    """What can't be sent any more still can't; what comes still does."""
    pair = make_record_pair("TLSv1.3", "server")
    pair.tls.send_alert(Alert.CLOSE_NOTIFY)
    pair.tls.release()
    for send in (pair.tls.send, pair.tls.sendall):
        with pytest.raises(ktls.ClosedForWritingError):
            send(b"data")
    pair.peer.send(DATA, b"data")
    assert pair.tls.recv(10) == b"data"


def test_release_in_the_middle_of_a_ticket(make_record_pair: MakeRecordPair) -> None:
    """Its rest is nothing new."""
    pair = make_record_pair("TLSv1.3", "client")
    ticket = bytes([HandshakeType.NEW_SESSION_TICKET, 0, 0, 100]) + bytes(100)
    pair.peer.send(RecordType.HANDSHAKE, ticket[:50])
    pair.tls.settimeout(0.3)
    with pytest.raises(ktls.StalledError):
        pair.tls.recv(1)
    pair.tls.settimeout(20)
    pair.tls.release()
    pair.peer.send(RecordType.HANDSHAKE, ticket[50:])
    pair.peer.send(DATA, b"data")
    assert pair.tls.recv(100) == b"data"


def test_release_and_key_updates(make_pair: MakePair) -> None:
    """Both ends go on to change their keys, where the kernel can."""
    if not offload.can_rekey():
        return  # what happens there, others have
    pair = make_pair("TLSv1.3", "server")
    pair.tls.release()
    for step in range(3):
        pair.tls.update_keys(request_peer=True)
        pair.tls.sendall(b"%d" % step)
        assert pair.peer.recv(1) == b"%d" % step
        pair.peer.sendall(b"%d" % step)
        assert pair.tls.recv(10) == b"%d" % step


@pytest.mark.parametrize("mode", [name for name in MODES if name != "kernel"])
def test_release_needs_both_directions(make_pair: MakePair, mode: str) -> None:
    """Nothing is released where OpenSSL has the records, and the connection goes on."""
    pair = make_pair("TLSv1.3", "server", mode)
    with pytest.raises(ktls.NotInKernelError):
        pair.tls.release()
    assert pair.tls.ssl_object is not None
    pair.tls.sendall(b"goes on")
    assert pair.peer.recv(7) == b"goes on"
