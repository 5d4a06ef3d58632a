"""What sending does besides data: KeyUpdates, the limit of a key, corks."""

from __future__ import annotations

import _thread
import errno
import hashlib
import io
import operator
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ktls
from ktls import Alert, CryptoInfo, Reason, RecordType, _ktls, offload, wait
from ktls.sending import KernelSender
from ktls.types import MAX_PAYLOAD, AlertLevel, HandshakeType, KeyUpdateRequest

from .conftest import (
    Identity,
    Interrupted,
    InThread,
    MakeRecordPair,
    Pair,
    fill,
    kernel_has,
    server_context,
    soon_full,
    tcp_pair,
)
from .record_peer import RecordPair, RecordPeer

LIMIT = 100
DATA = RecordType.APPLICATION_DATA


def key_update(requested: int) -> tuple[int, bytes]:
    """A KeyUpdate record, as `RecordPeer.receive` gives it."""
    return RecordType.HANDSHAKE, bytes([HandshakeType.KEY_UPDATE, 0, 0, 1, requested])


def receive_following(peer: RecordPeer, size: int) -> tuple[bytes, list[int]]:
    """Receives data through all KeyUpdates; with it, how many records each key protected."""
    data, records = bytearray(), [0]
    while len(data) < size:
        record = peer.receive()
        assert record is not None
        records[-1] += 1
        if record[0] == DATA:
            data += record[1]
        elif record == key_update(0):
            peer.follow_key_update()
            records.append(0)
        else:
            assert record[1][0] == HandshakeType.NEW_SESSION_TICKET
    return bytes(data), records


def receive_to_alert(peer: RecordPeer) -> tuple[int, bytes]:
    """Receives up to an alert; how many records there were with it, and what it says."""
    count = 0
    while True:
        record = peer.receive()
        assert record is not None
        count += 1
        if record[0] == RecordType.ALERT:
            return count, record[1]


@pytest.mark.kernel
@pytest.mark.parametrize("requested", [False, True], ids=["", "requested"])
def test_update_keys(make_record_pair: MakeRecordPair, side: str, requested: bool) -> None:
    """Data before is under the old key, data after under the new; the answer is followed."""
    pair = make_record_pair("TLSv1.3", side)
    if not offload.can_rekey():
        with pytest.raises(ktls.RekeyUnsupportedError, match=r"6\.14"):
            pair.tls.update_keys(requested)
        pair.tls.sendall(b"as before")
        assert pair.peer.receive_data(9) == b"as before"
        return
    pair.tls.sendall(b"open", socket.MSG_MORE)
    pair.tls.update_keys(requested)
    pair.tls.sendall(b"new")
    assert pair.peer.receive_data(4) == b"open"
    assert pair.peer.receive() == key_update(requested)
    pair.peer.follow_key_update()
    assert pair.peer.receive_data(3) == b"new"
    if requested:
        pair.peer.update_keys(requested=False)
    pair.peer.send(DATA, b"answer")
    assert pair.tls.recv(100) == b"answer"


@pytest.mark.kernel
def test_update_keys_of_tls12(make_record_pair: MakeRecordPair) -> None:
    pair = make_record_pair("TLSv1.2")
    with pytest.raises(ktls.NotInKernelError, match=r"TLS 1\.2"):
        pair.tls.update_keys()
    pair.tls.sendall(b"as before")
    assert pair.peer.receive_data(9) == b"as before"


def test_update_keys_in_userspace(make_record_pair: MakeRecordPair) -> None:
    pair = make_record_pair("TLSv1.3", "server", "userspace")
    with pytest.raises(ktls.NotInKernelError):
        pair.tls.update_keys()
    pair.tls.sendall(b"as before")
    assert pair.peer.receive_data(9) == b"as before"


@pytest.mark.kernel
@pytest.mark.parametrize("mode", ["kernel", "tx-only"])
@pytest.mark.parametrize("way", ["update_keys", "limit", "answer"])
def test_next_keys_are_refused(
    make_record_pair: MakeRecordPair, monkeypatch: pytest.MonkeyPatch, mode: str, way: str
) -> None:
    """The KeyUpdate is out and its keys are not in: nothing follows it, by an error that stays."""

    def update_key(descriptor: int, flags: int, *, request: int, **_keys: object) -> int:
        content = bytes([HandshakeType.KEY_UPDATE, 0, 0, 1, request])
        assert _ktls.send_record(descriptor, RecordType.HANDSHAKE, content, flags) == len(content)
        return errno.ENOMEM

    ways: dict[str, Callable[[ktls.Socket], object]] = {
        "update_keys": ktls.Socket.update_keys,
        "limit": send_for_ever,
        "answer": lambda tls: tls.recv(1),
    }
    pair = make_record_pair("TLSv1.3", "server", mode, record_limit=8)
    monkeypatch.setattr(offload, "can_rekey", lambda: True)
    monkeypatch.setattr(offload, "rekey", lambda *_: None)  # receiving isn't the matter here
    monkeypatch.setattr(_ktls, "update_key", update_key)
    if way == "answer":
        pair.peer.update_keys(requested=True)
    with pytest.raises(ktls.OffloadError) as caught:
        ways[way](pair.tls)
    assert (caught.value.errno, caught.value.reason) == (errno.ENOMEM, Reason.KERNEL_REFUSED)
    monkeypatch.undo()
    calls: list[Callable[[], object]] = [
        lambda: pair.tls.send(b"x"),
        lambda: pair.tls.sendall(b"x"),
        lambda: pair.tls.sendfile(io.BytesIO(b"x")),
        lambda: pair.tls.send_alert(Alert.INTERNAL_ERROR),
        pair.tls.update_keys,
    ]
    for call in calls:
        with pytest.raises(ktls.OffloadError) as again:
            call()
        assert str(again.value) == str(caught.value)
    with suppress(ktls.KTLSError):
        pair.tls.shutdown(socket.SHUT_WR)
    pair.tls.close()
    record: tuple[int, bytes] | None = (DATA, b"x")
    while record == (DATA, b"x"):
        record = pair.peer.receive_other_than_tickets()
    assert record == key_update(0)
    assert pair.peer.receive() is None


@pytest.mark.kernel
@pytest.mark.parametrize("mode", ["kernel", "tx-only"])
def test_no_descriptor_for_a_key_update(
    make_record_pair: MakeRecordPair, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Whether this kernel can rekey couldn't be tried: EMFILE, and the connection goes on."""
    pair = make_record_pair("TLSv1.3", "server", mode)

    def can_rekey() -> bool:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(offload, "can_rekey", can_rekey)
    with pytest.raises(OSError, match=os.strerror(errno.EMFILE)) as caught:
        pair.tls.update_keys()
    assert not isinstance(caught.value, ktls.KTLSError)
    monkeypatch.undo()
    pair.tls.sendall(b"goes on")
    assert pair.peer.receive_data(7) == b"goes on"


def full_and_owing(make_record_pair: MakeRecordPair, mode: str) -> tuple[RecordPair, int]:
    """A non-blocking connection that is full, and owes an answer; and how much it has sent."""
    pair = soon_full(make_record_pair, "TLSv1.3", "server", mode)
    sent = fill(pair.tls, bytes(1 << 20))
    pair.peer.update_keys(requested=True)
    assert wait.until(pair.tls, wait.READABLE, 5)
    with pytest.raises(ktls.WouldBlockError):
        pair.tls.recv(1)
    sender = pair.tls._sender
    assert isinstance(sender, KernelSender)
    assert len(sender._owed) == 1
    return pair, sent


@pytest.mark.kernel
@pytest.mark.parametrize("mode", ["kernel", "tx-only"])
def test_answer_that_did_not_fit_is_sent_by_a_receive(
    make_record_pair: MakeRecordPair, mode: str
) -> None:
    """A KeyUpdate's answer, owed for want of room, doesn't wait for a send of the caller's."""
    if not offload.can_rekey():
        return  # test_pitfall_4 has what happens there
    pair, sent = full_and_owing(make_record_pair, mode)
    assert pair.peer.receive_data(sent) == bytes(sent)
    pair.tls.settimeout(5)
    pair.peer.send(DATA, b"data")
    assert pair.tls.recv(10) == b"data"
    assert pair.peer.receive_other_than_tickets() == key_update(0)


@pytest.mark.kernel
def test_what_is_owed_waits_no_longer_than_the_data(make_record_pair: MakeRecordPair) -> None:
    """A full socket that owes an answer: MSG_DONTWAIT holds for that, too, and one timeout."""
    if not offload.can_rekey():
        return  # test_pitfall_4 has what happens there
    pair, sent = full_and_owing(make_record_pair, "kernel")
    pair.tls.settimeout(None)
    for send in (partial(pair.tls.send, b"data"), partial(pair.tls.sendmsg, [b"data"], ())):
        with pytest.raises(ktls.WouldBlockError):
            send(socket.MSG_DONTWAIT)
    pair.tls.settimeout(2)
    with Path(__file__).open("rb") as file:
        for call in (
            partial(pair.tls.send, b"data"),
            partial(pair.tls.sendfile, file),
            partial(pair.tls.send_record, DATA, b"data"),
        ):
            started = time.monotonic()
            with pytest.raises(ktls.StalledError):
                call()
            assert 2 <= time.monotonic() - started < 3.8  # twice would be four
    assert pair.peer.receive_data(sent) == bytes(sent)
    pair.tls.sendall(b"data")
    assert pair.peer.receive_other_than_tickets() == key_update(0)
    pair.peer.follow_key_update()
    assert pair.peer.receive_data(4) == b"data"


@pytest.mark.kernel
def test_who_waits_for_room_keeps_nobody_waiting(
    make_record_pair: MakeRecordPair, in_thread: InThread
) -> None:
    """A thread in a blocking send doesn't hold up another one's MSG_DONTWAIT."""
    pair = soon_full(make_record_pair, "TLSv1.3", "server", "kernel")
    sent = fill(pair.tls, bytes(1 << 20))
    pair.tls.settimeout(None)
    waiting = in_thread(pair.tls.sendall, b"waited")
    for _ in range(20):
        with pytest.raises(ktls.WouldBlockError):
            pair.tls.send(b"data", socket.MSG_DONTWAIT)
        time.sleep(0.01)
    assert not waiting.done()
    assert pair.peer.receive_data(sent) == bytes(sent)
    waiting.result(5)
    assert pair.peer.receive_data(6) == b"waited"


def send_for_ever(tls: ktls.Socket) -> None:
    """Sends byte after byte."""
    while True:
        tls.send(b"x")


@pytest.mark.kernel
@pytest.mark.parametrize("mode", ["kernel", "tx-only"])
@pytest.mark.parametrize("way", ["update_keys", "limit"])
def test_signal_during_a_key_update(
    make_record_pair: MakeRecordPair,
    monkeypatch: pytest.MonkeyPatch,
    interrupting: Callable[[], None],
    mode: str,
    way: str,
) -> None:
    """Its handler raises as soon as Python runs again: the new keys are those that count."""
    pair = make_record_pair("TLSv1.3", "server", mode, record_limit=8)
    if not offload.can_rekey():
        return  # test_update_keys has what happens there
    real = offload.key_update

    def key_update_and_signal(
        sock: socket.socket, info: CryptoInfo, request: KeyUpdateRequest
    ) -> Callable[[int], int]:
        """In C from the signal to the return: no handler can run between."""
        signals = iter(partial(_thread.interrupt_main, signal.SIGUSR1), 0)
        flags = map(operator.itemgetter(1), zip(signals, [socket.MSG_DONTWAIT], strict=False))
        return partial(next, map(real(sock, info, request), flags))

    monkeypatch.setattr(offload, "key_update", key_update_and_signal)
    pair.tls.sendall(b"old")
    update = pair.tls.update_keys if way == "update_keys" else partial(send_for_ever, pair.tls)
    with pytest.raises(Interrupted):
        update()
    monkeypatch.undo()
    for _ in range(20):
        pair.tls.sendall(b"new")
    data = b""
    while not data.endswith(b"new" * 20):
        more, records = receive_following(pair.peer, 1)
        data += more
        assert max(records) <= 8
    assert data.replace(b"x", b"") == b"old" + b"new" * 20


@pytest.mark.kernel
@pytest.mark.parametrize("fragment", [64, MAX_PAYLOAD])
@pytest.mark.parametrize("way", ["sendfile", "send", "sendmsg", "small sends", "cork"])
def test_pitfall_6_limit_of_a_key(
    make_record_pair: MakeRecordPair,
    in_thread: InThread,
    tmp_path: Path,
    way: str,
    fragment: int,
) -> None:
    """TLS 1.3 updates the key by itself, in the midst of one call; no key protects too much."""
    if fragment < MAX_PAYLOAD and not kernel_has(_ktls.TX_MAX_PAYLOAD_LEN):
        return  # test_pitfall_16 has what happens there
    pair = make_record_pair(
        "TLSv1.3", "server", "kernel", record_limit=LIMIT, max_send_fragment=fragment
    )
    content = os.urandom(350 if way == "small sends" else 320 * fragment)
    path = tmp_path / "file"
    path.write_bytes(content)
    if not offload.can_rekey():
        received = in_thread(receive_to_alert, pair.peer)
        with pytest.raises(ktls.RekeyUnsupportedError):
            pair.tls.sendall(bytes((LIMIT + 1) << 14))
        count, alert = received.result(30)
        assert count <= LIMIT
        assert alert == bytes([AlertLevel.FATAL, Alert.INTERNAL_ERROR])
        return
    received = in_thread(receive_following, pair.peer, len(content))
    if way == "sendfile":
        with path.open("rb") as file:
            assert pair.tls.sendfile(file) == len(content)
    elif way == "send":
        pair.tls.sendall(content)
    elif way == "sendmsg":
        view = memoryview(content)
        while view:
            view = view[pair.tls.sendmsg([view[:10], view[10:]]) :]
    elif way == "cork":
        with pair.tls.cork():
            for at in range(0, len(content), step := 3 * fragment // 2 + 1):
                pair.tls.sendall(content[at : at + step])
    else:
        for at in range(len(content)):
            pair.tls.send(content[at : at + 1])
    data, records = received.result(30)
    assert data == content
    assert max(records) <= LIMIT
    assert len(records) > 2


@pytest.mark.kernel
@pytest.mark.parametrize("corked", [False, True], ids=["", "corked"])
def test_limit_of_a_key_in_tls12(
    make_record_pair: MakeRecordPair, in_thread: InThread, corked: bool
) -> None:
    """There is no next key: a typed error that stays, and no record beyond the limit."""
    pair = make_record_pair("TLSv1.2", "server", "kernel", record_limit=LIMIT)
    received = in_thread(receive_to_alert, pair.peer)
    flags = socket.MSG_MORE if corked else 0
    pair.tls.send(b"x", flags)
    with pytest.raises(ktls.KeyLimitError, match="connect again") as first:
        pair.tls.sendall(bytes(5 << 20), flags)
    assert (LIMIT - 5) << 14 < first.value.sent < LIMIT << 14
    with pytest.raises(ktls.KeyLimitError) as again:
        pair.tls.send(b"x")
    assert again.value.sent == 0
    pair.tls.close()
    count, alert = received.result(30)
    assert LIMIT - 3 <= count < LIMIT  # the Finished is one, too
    assert alert == bytes([AlertLevel.FATAL, Alert.INTERNAL_ERROR])


@pytest.mark.kernel
def test_cork(make_record_pair: MakeRecordPair, version: str) -> None:
    """Within a cork sends share records; the outermost ends it, whatever happens inside."""
    pair = make_record_pair(version, "client")
    with pair.tls.cork():
        pair.tls.sendall(b"one ")
        with pair.tls.cork():
            pair.tls.sendall(b"two ")
        pair.tls.sendmsg([b"th", b"ree"])
    assert pair.peer.receive() == (DATA, b"one two three")
    with suppress(ZeroDivisionError), pair.tls.cork():
        pair.tls.sendall(b"not lost")
        raise ZeroDivisionError
    assert pair.peer.receive() == (DATA, b"not lost")
    with pair.tls.cork():
        pair.tls.sendall(b"before")
        pair.tls.send_alert(Alert.USER_CANCELED, AlertLevel.WARNING)
        pair.tls.sendall(b"after")
        pair.tls.sendfile(io.BytesIO(b" file"))
    received = [pair.peer.receive() for _ in range(3)]
    assert received == [(DATA, b"before"), (RecordType.ALERT, b"\x01\x5a"), (DATA, b"after file")]


def test_cork_keeps_the_body_s_error(make_record_pair: MakeRecordPair, mode: str) -> None:
    """An end within makes no error of the cork's own, nor does a flush that can't be."""
    pair = make_record_pair("TLSv1.3", "server", mode)
    pair.peer.send(99, b"what?")

    def fail_in_two_ways() -> None:
        with pair.tls.cork():
            pair.tls.sendall(b"sent")
            with suppress(ktls.RecordError):
                pair.tls.recv(1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_in_two_ways()
    assert pair.tls._corked == 0


@pytest.mark.parametrize("how", ["shutdown", "close"])
def test_end_within_a_cork(make_record_pair: MakeRecordPair, mode: str, how: str) -> None:
    """It sends out what is open: nothing is left for the cork to do."""
    pair = make_record_pair("TLSv1.3", "server", mode)
    with pair.tls.cork():
        pair.tls.sendall(b"corked")
        pair.tls.shutdown(socket.SHUT_WR) if how == "shutdown" else pair.tls.close()
    assert pair.peer.receive_data(6) == b"corked"
    assert pair.peer.receive() == (RecordType.ALERT, b"\1\0")


@pytest.mark.kernel
@pytest.mark.parametrize("mode", ["kernel", "tx-only"])
def test_cork_again_retries(
    make_record_pair: MakeRecordPair, monkeypatch: pytest.MonkeyPatch, version: str, mode: str
) -> None:
    """A flush that would block is made up for by the end of another cork."""
    pair = make_record_pair(version, "server", mode)
    pair.tls.setblocking(False)

    def full(_descriptor: int, _flags: int) -> None:
        raise BlockingIOError(errno.EAGAIN, "sendmsg")

    monkeypatch.setattr(_ktls, "flush", full)
    with pytest.raises(ktls.WouldBlockError), pair.tls.cork():
        pair.tls.sendall(b"held back")
    monkeypatch.undo()
    with pair.tls.cork():
        pass
    assert pair.peer.receive_other_than_tickets() == (DATA, b"held back")


def test_cork_in_userspace(make_record_pair: MakeRecordPair) -> None:
    pair = make_record_pair("TLSv1.3", "client", "userspace")
    with pair.tls.cork():
        pair.tls.sendall(b"one ")
        pair.tls.sendall(b"two")
    assert pair.peer.receive_data(7) == b"one two"


@pytest.mark.kernel
def test_pitfall_4_openssl_updates_its_keys(identity: Identity) -> None:
    """``openssl s_client``: command k updates its keys, K asks us to do the same."""
    accepted, connecting = tcp_pair()
    with accepted, socket.create_server(("127.0.0.1", 0)) as listener:
        connecting.close()
        port = listener.getsockname()[1]
        words = ["openssl", "s_client", "-tls1_3", "-connect", f"127.0.0.1:{port}"]
        with subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as client:
            sock, _ = listener.accept()
            sock.settimeout(20)
            tls = ktls.wrap(sock, server_context(identity), server_side=True, require=True)
            assert client.stdin is not None
            assert client.stdout is not None
            for command in (b"k\n", b"K\n", b"K\n"):
                client.stdin.write(command)
                client.stdin.flush()
                while b"KEYUPDATE" not in client.stdout.readline():
                    pass
                client.stdin.write(b"hello\n")
                client.stdin.flush()
                if not offload.can_rekey():
                    with pytest.raises(ktls.RekeyUnsupportedError):
                        tls.recv(100)
                    break
                assert tls.recv(100) == b"hello\n"
                tls.sendall(b"back\n")
                while b"back" not in client.stdout.readline():
                    pass
            tls.close()
            client.stdin.close()
            client.stdout.read()


@pytest.mark.kernel
@pytest.mark.torture
@pytest.mark.timeout(900)
def test_key_updates_within_one_sendfile(
    make_pair: Callable[..., Pair], in_thread: InThread, tmp_path: Path
) -> None:
    """100 MiB in one call, with a limit of 100 records, to a client that knows nothing of it."""
    if not offload.can_rekey():
        return  # test_pitfall_6 has what happens there
    pair = make_pair("TLSv1.3", "server", "kernel", record_limit=LIMIT)
    path, digest, left = tmp_path / "file", hashlib.sha256(), 100 << 20
    with path.open("wb") as file:
        for _ in range(100):
            block = os.urandom(1 << 20)
            digest.update(block)
            file.write(block)
    before = ktls.stats()["TlsTxRekeyOk"]

    def receive() -> bytes:
        received, size = hashlib.sha256(), 0
        while size < left:
            data = pair.peer.recv(1 << 16)
            received.update(data)
            size += len(data)
        return received.digest()

    received = in_thread(receive)
    with path.open("rb") as source:
        assert pair.tls.sendfile(source) == left
    assert received.result(600) == digest.digest()
    assert ktls.stats()["TlsTxRekeyOk"] - before >= (left >> 14) // LIMIT


@pytest.mark.kernel
def test_flags_of_send(make_record_pair: MakeRecordPair) -> None:
    """Those that there aren't are refused, as by ``socket.socket.send``."""
    tls = make_record_pair("TLSv1.3").tls
    with pytest.raises(OverflowError):
        tls.send(b"data", 1 << 32)
    with pytest.raises(TypeError):
        tls.send(b"data", "1")  # type: ignore[arg-type]
    with pytest.raises(OSError, match=os.strerror(errno.EOPNOTSUPP)):
        tls.send(b"data", socket.MSG_OOB)


@pytest.mark.kernel
def test_interrupted_while_it_looks(make_record_pair: MakeRecordPair) -> None:
    """The lane stays shut when a signal's handler raises just as nothing is thought to be owed."""
    sender = make_record_pair("TLSv1.3").tls._sender
    assert isinstance(sender, KernelSender)

    class Lane:
        shut = True

        @property
        def attention(self) -> bool:
            return self.shut

        @attention.setter
        def attention(self, shut: bool) -> None:
            self.shut = shut
            if not shut:
                raise Interrupted

    sender.lane = lane = Lane()  # type: ignore[assignment]
    with pytest.raises(Interrupted):
        sender.send(b"data", 0)
    assert lane.attention


@pytest.mark.kernel
@pytest.mark.parametrize("call", ["send", "sendall", "sendfile"])
def test_owed_after_the_lane_and_refused(
    make_record_pair: MakeRecordPair, monkeypatch: pytest.MonkeyPatch, call: str, tmp_path: Path
) -> None:
    """A KeyUpdate that came to be owed during a send, and can't be made, ends the connection."""
    pair = make_record_pair("TLSv1.3")
    tls, sender = pair.tls, pair.tls._sender
    assert isinstance(sender, KernelSender)
    update = bytes([HandshakeType.KEY_UPDATE, 0, 0, 1, 0])
    sender._owed.append((RecordType.HANDSHAKE, update))
    lane = SimpleNamespace(
        sendfile=lambda owner, *what: owner._after_file(*what, 4, 0, None),
        send=lambda *_: 4,
        attention=True,
        fd=0,
    )
    monkeypatch.setattr(tls, "_lane", lane)
    monkeypatch.setattr(offload, "can_rekey", lambda: False)
    (tmp_path / "file").write_bytes(b"data")
    with (tmp_path / "file").open("rb") as file:
        data = file if call == "sendfile" else b"data"
        with pytest.raises(ktls.RekeyUnsupportedError) as caught:
            getattr(tls, call)(data)
    assert caught.value.sent == 4
    monkeypatch.setattr(tls, "_lane", sender.lane)
    with pytest.raises(ktls.RekeyUnsupportedError):
        tls.send(b"more")
    assert receive_to_alert(pair.peer)[1][0] == AlertLevel.FATAL


@pytest.mark.usefixtures("interrupting")
@pytest.mark.parametrize("whose", ["sender's", "connection's"])
def test_interrupted_as_it_takes_the_lock(
    make_record_pair: MakeRecordPair, mode: str, whose: str
) -> None:
    """A handler that raises when an end of sending has just got the lock: it isn't kept."""
    tls = make_record_pair("TLSv1.3", "server", mode).tls
    sender: Any = tls._sender
    lock: Any = tls._closing
    call = partial(tls._finish_sending, 10)
    if whose == "sender's":
        lock = sender._sending if isinstance(sender, KernelSender) else sender._pushing
        call = partial(sender.finish, 10, close_notify=True)
    interrupt = partial(signal.pthread_kill, threading.get_ident(), signal.SIGUSR1)
    # In C, so that nothing runs between the two.
    hand_over: Callable[[], object] = partial(
        list, map(partial.__call__, (partial(lock.release), interrupt))
    )
    lock.acquire()
    waiting = threading.Timer(0.1, hand_over)
    waiting.start()
    with pytest.raises(Interrupted):
        call()
    waiting.join()
    assert lock.acquire(timeout=0)
    lock.release()


@pytest.mark.kernel
def test_interrupted_as_it_counts_the_end(
    make_record_pair: MakeRecordPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same after close_notify: the next close() needn't wait for a lock that nobody has."""
    pair = make_record_pair("TLSv1.3", close_timeout=30)
    sender = pair.tls._sender
    assert isinstance(sender, KernelSender)

    def end(_written: int) -> int:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(sender._tally, "end", end)
        with pytest.raises(Interrupted):
            pair.tls.close()
    assert sender._sending.acquire(blocking=False)
    sender._sending.release()
