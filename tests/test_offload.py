"""`enable` and its refusals: each is one typed error, and the socket goes on as it was.

"As it was" is shown by plain bytes both ways afterwards. What needs no kernel TLS runs everywhere;
what it means that there is none runs where there is none, and with a fake elsewhere.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import ktls
from ktls import _ktls, diag, offload
from ktls.errors import (
    AlgorithmUnavailableError,
    AlreadyEnabledError,
    KernelUnavailableError,
    KeyMaterialError,
    KTLSError,
    OffloadError,
    SocketError,
)
from ktls.records import HEADER_SIZE, RecordCipher
from ktls.types import Cipher, Mode, Reason, RecordType, TrafficKeys, Version

from .conftest import KERNEL_TLS, Identity, MakePair, server_context, tcp_pair
from .test_records import SUITES, info_for

Pair = tuple[socket.socket, socket.socket]
suites = pytest.mark.parametrize(("version", "cipher"), SUITES)


def keys_for(
    version: Version = Version.TLS_1_3, cipher: Cipher = Cipher.AES_GCM_128
) -> TrafficKeys:
    """Keys of which the peer's are `mirrored`."""
    tx = info_for(version, cipher, rec_seq=3)
    return TrafficKeys(tx, replace(tx, key=tx.key[::-1], rec_seq=9))


def mirrored(keys: TrafficKeys) -> TrafficKeys:
    """The other end's."""
    return TrafficKeys(keys.rx, keys.tx)


@pytest.fixture
def tcp() -> Iterator[Pair]:
    """A connected pair."""
    left, right = tcp_pair()
    for sock in (left, right):
        sock.settimeout(30)
    with left, right:
        yield left, right


def plain(left: socket.socket, right: socket.socket) -> None:
    """Bytes go through both ways unchanged."""
    for one, other in ((left, right), (right, left)):
        one.sendall(b"plain bytes")
        assert other.recv(100) == b"plain bytes"


def test_no_kernel_tls(tcp: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """One typed error, whose text says what to do; by a fake where the kernel could."""
    if KERNEL_TLS:

        def no_module(_fd: int) -> None:
            raise FileNotFoundError(errno.ENOENT, "setsockopt(TCP_ULP): No such file or directory")

        monkeypatch.setattr(_ktls, "attach", no_module)
    with pytest.raises(KernelUnavailableError, match="modprobe tls") as caught:
        ktls.enable(tcp[0], keys_for())
    assert caught.value.errno == errno.ENOENT
    assert caught.value.reason is Reason.NO_KERNEL_TLS
    assert not isinstance(caught.value, FileNotFoundError)
    plain(*tcp)


def test_asks_a_kernel_without_tls_now_and_then(
    make_pair: MakePair, tcp: Pair, identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for each connection: root's question makes it look for the module, by a process."""
    asked: list[int] = []

    def no_module(descriptor: int) -> None:
        asked.append(descriptor)
        raise FileNotFoundError(errno.ENOENT, "setsockopt(TCP_ULP): No such file or directory")

    def reason() -> tuple[Reason | None, str]:
        tls = make_pair("TLSv1.3", "server", "kernel", require=False).tls
        return tls.tx.reason, tls.tx.detail

    monkeypatch.setattr(_ktls, "attach", no_module)
    first = reason()
    assert first[0] is Reason.NO_KERNEL_TLS
    assert reason() == first
    assert len(asked) == 1
    with pytest.raises(ktls.KernelUnavailableError):
        ktls.wrap(tcp[0], server_context(identity, "TLSv1.3"), server_side=True, require=True)
    assert len(asked) == 2
    monkeypatch.setattr(offload, "_ASK_AGAIN", 0.0)
    offload._absent.clear()
    reason()
    reason()
    assert len(asked) == 4
    monkeypatch.setattr(offload, "_ASK_AGAIN", 100.0)
    reason()
    monkeypatch.setattr(_ktls, "attach", lambda _fd: None)
    with pytest.raises(ktls.KernelUnavailableError):
        offload.try_attach(tcp[0])
    assert offload.attach(tcp[0])
    assert offload.try_attach(tcp[0])


@pytest.mark.parametrize("number", [*offload._ATTACH, errno.EPERM, errno.EIO])
def test_attach_errors(tcp: Pair, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Every errno of TCP_ULP, the unknown ones too; that it is attached already is none."""

    def fail(_fd: int) -> None:
        raise OSError(number, f"setsockopt(TCP_ULP): {os.strerror(number)}")

    monkeypatch.setattr(_ktls, "attach", fail)
    if number == errno.EEXIST:
        offload.attach(tcp[0])
        return
    with pytest.raises(OffloadError) as caught:
        ktls.enable(tcp[0], keys_for())
    kind, reason = offload._ATTACH.get(number, (OffloadError, Reason.KERNEL_REFUSED))
    assert type(caught.value) is kind
    assert (caught.value.errno, caught.value.reason) == (number, reason)
    assert "TCP_ULP" in str(caught.value)
    state = offload.refused(caught.value)
    assert (state.mode, state.reason) == (Mode.USERSPACE, reason)
    assert "TCP_ULP" in state.detail


@pytest.mark.parametrize("number", [*offload._INSTALL, errno.ENOMEM])
@pytest.mark.parametrize("direction", ["TX", "RX"])
def test_install_errors(
    tcp: Pair, monkeypatch: pytest.MonkeyPatch, number: int, direction: str
) -> None:
    """Every errno of TLS_TX and TLS_RX; RX comes first, and a refusal there leaves TX alone."""
    asked: list[int] = []

    def install(_fd: int, which: int, **_keys: Any) -> None:  # noqa: ANN401
        asked.append(which)
        if which == getattr(_ktls, direction):
            raise OSError(number, f"setsockopt(TLS_{direction}): {os.strerror(number)}")

    monkeypatch.setattr(_ktls, "attach", lambda _fd: None)
    monkeypatch.setattr(_ktls, "install", install)
    with pytest.raises(OffloadError, match=f"TLS_{direction}") as caught:
        ktls.enable(tcp[0], keys_for())
    kind, reason = offload._INSTALL.get(number, (OffloadError, Reason.KERNEL_REFUSED))
    assert type(caught.value) is kind
    assert caught.value.reason is reason
    assert asked == ([_ktls.RX, _ktls.TX] if direction == "TX" else [_ktls.RX])


# -- sockets that can't ---------------------------------------------------------------------------


def test_unix_socket() -> None:
    left, right = socket.socketpair()
    with left, right:
        with pytest.raises(SocketError, match="AF_UNIX"):
            ktls.enable(left, keys_for())
        plain(left, right)


def test_udp() -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as left,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as right,
    ):
        for one in (left, right):
            one.bind(("127.0.0.1", 0))
        left.connect(right.getsockname())
        right.connect(left.getsockname())
        with pytest.raises(SocketError, match="SOCK_DGRAM"):
            ktls.enable(left, keys_for())
        plain(left, right)


def test_not_a_stream() -> None:
    """Their protocol has TCP's number. Not every user gets both, nor has every kernel netlink's."""
    tried = 0
    for family in (socket.AF_INET, socket.AF_NETLINK):
        try:
            sock = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_TCP)
        except OSError:
            continue
        with sock, pytest.raises(SocketError, match="SOCK_RAW") as caught:
            ktls.enable(sock, keys_for())
        assert caught.value.errno == errno.EPROTOTYPE
        tried += 1
    assert tried


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_not_connected(family: socket.AddressFamily) -> None:
    """It can still be connected afterwards."""
    host = "127.0.0.1" if family is socket.AF_INET else "::1"
    with (
        socket.create_server((host, 0), family=family) as listener,
        socket.socket(family) as sock,
    ):
        with pytest.raises(SocketError, match="not connected") as caught:
            ktls.enable(sock, keys_for())
        assert caught.value.errno == errno.ENOTCONN
        sock.connect(listener.getsockname())
        accepted, _ = listener.accept()
        with accepted:
            plain(sock, accepted)


def test_listening() -> None:
    """It goes on listening."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with pytest.raises(SocketError, match="not connected"):
            ktls.enable(listener, keys_for())
        with socket.create_connection(listener.getsockname()) as sock:
            accepted, _ = listener.accept()
            with accepted:
                plain(sock, accepted)


def test_closed(tcp: Pair) -> None:
    for close in ("close", "detach"):
        left, right = tcp_pair()
        with right:
            descriptor = left.fileno()
            getattr(left, close)()
            with pytest.raises(SocketError, match="closed") as caught:
                ktls.enable(left, keys_for())
            assert caught.value.errno == errno.EBADF
            if close == "detach":
                os.close(descriptor)
    plain(*tcp)


def test_stale() -> None:
    """Its descriptor was closed behind its back."""
    sock = socket.socket()
    os.close(sock.fileno())
    with pytest.raises(SocketError):
        ktls.enable(sock, keys_for())
    sock.detach()


def test_no_socket(tmp_path: Path) -> None:
    """Its descriptor is something else by now."""
    with (tmp_path / "file").open("wb") as file, socket.socket() as sock:
        os.dup2(file.fileno(), sock.fileno())
        with pytest.raises(SocketError):
            ktls.enable(sock, keys_for())


def test_reset(tcp: Pair) -> None:
    """The peer is gone already: no name any more."""
    tcp[1].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    tcp[1].close()
    with pytest.raises(KTLSError) as caught:
        ktls.enable(tcp[0], keys_for())
    assert isinstance(caught.value, OSError)


@pytest.mark.kernel
def test_peer_closed_before(tcp: Pair) -> None:
    """A FIN makes the ULP impossible (kernel-facts, trap 7); what was sent can be read plain."""
    tcp[1].sendall(b"and goodbye")
    tcp[1].shutdown(socket.SHUT_WR)
    assert tcp[0].recv(100, socket.MSG_PEEK | socket.MSG_WAITALL) == b"and goodbye"
    with pytest.raises(OffloadError) as caught:
        ktls.enable(tcp[0], keys_for())
    assert caught.value.reason is Reason.NOT_ESTABLISHED
    assert caught.value.errno == errno.ENOTCONN
    assert tcp[0].recv(100) == b"and goodbye"
    tcp[0].sendall(b"the other way still goes")
    assert tcp[1].recv(100) == b"the other way still goes"


@pytest.mark.kernel
def test_peer_closed_after_attaching(tcp: Pair) -> None:
    """With the ULP attached first, keys can come after the FIN."""
    keys = keys_for()
    offload.attach(tcp[0])
    tcp[1].sendall(RecordCipher(keys.rx).seal(RecordType.APPLICATION_DATA, b"last words"))
    tcp[1].shutdown(socket.SHUT_WR)
    ktls.enable(tcp[0], keys)
    assert tcp[0].recvmsg(100, 64)[0] == b"last words"
    assert tcp[0].recvmsg(100, 64)[0] == b""


@pytest.mark.kernel
def test_multipath_tcp() -> None:
    """IPPROTO_MPTCP looks like TCP until the ULP is asked for."""
    try:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
    except OSError as error:
        assert error.errno in (errno.EPROTONOSUPPORT, errno.EINVAL)  # noqa: PT017
        return
    with listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262) as sock:
            sock.connect(listener.getsockname())
            accepted, _ = listener.accept()
            with accepted:
                with pytest.raises(OffloadError) as caught:
                    ktls.enable(sock, keys_for())
                assert caught.value.reason is Reason.NOT_TCP
                plain(sock, accepted)


# -- keys that can't ------------------------------------------------------------------------------


@pytest.mark.parametrize("cipher", Cipher)
def test_wrong_sizes(cipher: Cipher) -> None:
    """Never get as far as a socket."""
    good = info_for(cipher.versions[0], cipher)
    for name in ("key", "iv", "salt"):
        for wrong in (getattr(good, name) + b"x", b"short"):
            with pytest.raises(KeyMaterialError):
                replace(good, **{name: wrong})  # type: ignore[arg-type]


def test_unknown_cipher(tcp: Pair) -> None:
    good = info_for(Version.TLS_1_3, Cipher.AES_GCM_128)
    with pytest.raises(KeyMaterialError, match="no such"):
        replace(good, cipher=99)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown cipher 99"):
        _ktls.install(
            tcp[0].fileno(),
            _ktls.TX,
            version=0x304,
            cipher=99,
            key=b"",
            iv=b"",
            salt=b"",
            rec_seq=b"",
        )
    plain(*tcp)


@pytest.mark.kernel
@pytest.mark.parametrize("cipher", [Cipher.SM4_GCM, Cipher.ARIA_GCM_128])
def test_algorithm_absent(tcp: Pair, cipher: Cipher) -> None:
    """The lab's kernels have no SM4 and no ARIA: said by name, and plain TCP goes on."""
    info = info_for(cipher.versions[0], cipher)
    with pytest.raises(AlgorithmUnavailableError) as caught:
        ktls.enable(tcp[0], TrafficKeys(info, info))
    assert caught.value.reason in (Reason.NO_ALGORITHM, Reason.CIPHER_NOT_IN_KERNEL)
    plain(*tcp)
    ktls.enable(tcp[0], keys_for())  # a failed set can be repeated with another


# -- what works -----------------------------------------------------------------------------------


@pytest.mark.kernel
@suites
def test_both_directions(tcp: Pair, version: Version, cipher: Cipher) -> None:
    """Kernel to kernel, and each record as our own AEAD makes it."""
    keys = keys_for(version, cipher)
    ktls.enable(tcp[0], keys)
    sealed = RecordCipher(keys.tx).seal(RecordType.APPLICATION_DATA, b"exactly this")
    tcp[0].sendall(b"exactly this")
    assert tcp[1].recv(len(sealed) + 1) == sealed
    tcp[1].sendall(RecordCipher(keys.rx).seal(RecordType.APPLICATION_DATA, b"and back"))
    assert tcp[0].recvmsg(100, 64)[0] == b"and back"
    left, right = tcp_pair()
    with left, right:
        ktls.enable(left, keys)
        ktls.enable(right, mirrored(keys))
        left.sendall(b"x" * 50000)
        assert right.recv(50000, socket.MSG_WAITALL) == b"x" * 50000


@pytest.mark.kernel
@pytest.mark.parametrize("version", Version)
def test_one_direction(version: Version) -> None:
    """The other one goes on as plain TCP, and can follow later."""
    keys = keys_for(version)
    for only in ("tx", "rx"):
        left, right = tcp_pair()
        with left, right:
            ktls.enable(left, keys, tx=only == "tx", rx=only == "rx")
            assert bool(offload.installed(left, _ktls.TX)) == (only == "tx")
            assert bool(offload.installed(left, _ktls.RX)) == (only == "rx")
            one, other = (left, right) if only == "rx" else (right, left)
            one.sendall(b"plain")
            assert other.recv(100) == b"plain"
            ktls.enable(left, keys, tx=only == "rx", rx=only == "tx")
            ktls.enable(right, mirrored(keys))
            left.sendall(b"now both")
            assert right.recv(100) == b"now both"
            right.sendall(b"ways")
            assert left.recv(100) == b"ways"


@pytest.mark.kernel
def test_neither_direction(tcp: Pair) -> None:
    ktls.enable(tcp[0], keys_for(), tx=False, rx=False)
    plain(*tcp)


@pytest.mark.kernel
def test_attach_twice(tcp: Pair) -> None:
    """Fine, before and without keys."""
    offload.attach(tcp[0])
    offload.attach(tcp[0])
    plain(*tcp)
    ktls.enable(tcp[0], keys_for())


@pytest.mark.kernel
@suites
@pytest.mark.parametrize("again", ["same", "other", "one direction"])
def test_keys_twice(tcp: Pair, version: Version, cipher: Cipher, again: str) -> None:
    """Refused on every kernel, those that can rekey too: no sequence, no nonce begins anew."""
    keys = keys_for(version, cipher)
    ktls.enable(tcp[0], keys)
    tcp[0].sendall(b"one record")
    before = [_ktls.query(tcp[0].fileno(), direction) for direction in (_ktls.TX, _ktls.RX)]
    assert int.from_bytes(before[0][3], "big") == keys.tx.rec_seq + 1
    other = keys_for(version, cipher)
    if again == "other":
        other = mirrored(keys)
    with pytest.raises(AlreadyEnabledError) as caught:
        ktls.enable(tcp[0], other, rx=again != "one direction")
    assert caught.value.reason is Reason.OTHER_ULP
    after = [_ktls.query(tcp[0].fileno(), direction) for direction in (_ktls.TX, _ktls.RX)]
    assert after == before
    tcp[0].sendall(b"and one more")
    shadow = RecordCipher(keys.tx)
    for text in (b"one record", b"and one more"):
        record = shadow.seal(RecordType.APPLICATION_DATA, text)
        assert tcp[1].recv(len(record), socket.MSG_WAITALL) == record


@pytest.mark.kernel
def test_differing_second_direction(tcp: Pair) -> None:
    """The kernel wants both alike: refused, and what was there stays."""
    keys = keys_for()
    ktls.enable(tcp[0], keys, rx=False)
    other = keys_for(Version.TLS_1_2)
    with pytest.raises(OffloadError):
        ktls.enable(tcp[0], other, tx=False)
    tcp[0].sendall(b"still")
    record = RecordCipher(keys.tx).seal(RecordType.APPLICATION_DATA, b"still")
    assert tcp[1].recv(100) == record


@pytest.mark.kernel
@pytest.mark.parametrize("cipher", [Cipher.AES_GCM_128, Cipher.AES_CCM_128])
def test_explicit_nonce_on_the_wire(tcp: Pair, cipher: Cipher) -> None:
    """TLS 1.2: the kernel's first explicit nonce is the iv, and it wraps as ours does."""
    info = info_for(Version.TLS_1_2, cipher, iv=b"\xff" * 8)
    ktls.enable(tcp[0], TrafficKeys(info, info))
    shadow = RecordCipher(info)
    for nonce in (b"\xff" * 8, bytes(8)):
        tcp[0].sendall(b"n")
        record = tcp[1].recv(100)
        assert record[HEADER_SIZE:][:8] == nonce
        assert record == shadow.seal(RecordType.APPLICATION_DATA, b"n")


@pytest.mark.kernel
def test_data_queued_before(tcp: Pair) -> None:
    """Records that came before the keys are decrypted, a part of one too."""
    keys = keys_for()
    peer = RecordCipher(keys.rx)
    stream = b"".join(peer.seal(RecordType.APPLICATION_DATA, text) for text in (b"one", b"two"))
    tcp[1].sendall(stream[:30])
    ktls.enable(tcp[0], keys)
    tcp[1].sendall(stream[30:])
    received = b""
    while len(received) < 6:
        received += tcp[0].recvmsg(100, 64)[0]
    assert received == b"onetwo"


@pytest.mark.kernel
def test_timeout_is_kept() -> None:
    for timeout in (None, 0.0, 5.0):
        left, right = tcp_pair()
        with left, right:
            left.settimeout(timeout)
            ktls.enable(left, keys_for())
            assert left.gettimeout() == timeout


def test_refused_says_what_and_why() -> None:
    error = OffloadError(
        errno.EINVAL, "setsockopt(TLS_TX): Invalid; and why", Reason.KERNEL_REFUSED
    )
    state = offload.refused(error)
    assert (state.detail, state.reason) == ("setsockopt(TLS_TX): Invalid", Reason.KERNEL_REFUSED)


# -- can_rekey ------------------------------------------------------------------------------------


@pytest.fixture
def _untried() -> Iterator[None]:
    """What is known of this kernel is forgotten, before and afterwards."""
    offload.can_rekey.cache_clear()
    yield
    offload.can_rekey.cache_clear()


@pytest.mark.usefixtures("_untried")
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS])
def test_can_rekey_is_not_known_without_a_descriptor(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Nothing was learnt about the kernel: the next call tries again."""
    fail_to_connect(monkeypatch, number)
    for _ in range(2):
        with pytest.raises(OSError, match=os.strerror(number)) as caught:
            offload.can_rekey()
        assert caught.value.errno == number
    monkeypatch.undo()
    assert offload.can_rekey() == ("TlsTxRekeyOk" in ktls.stats())


@pytest.mark.usefixtures("_untried")
@pytest.mark.parametrize("number", [errno.ENETUNREACH, errno.EADDRNOTAVAIL])
@pytest.mark.parametrize("counted", [False, True], ids=["old", "new"])
def test_can_rekey_without_loopback(
    monkeypatch: pytest.MonkeyPatch, number: int, counted: bool
) -> None:
    """In a network of its own without ``lo``, the kernel's counters tell."""
    fail_to_connect(monkeypatch, number)
    stats = {"TlsCurrTxSw": 1} | ({"TlsTxRekeyOk": 0} if counted else {})
    monkeypatch.setattr(diag, "stats", lambda: stats)
    assert offload.can_rekey() is counted


def fail_to_connect(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """No socket is to be had."""

    def fail(*_args: object, **_keywords: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(socket, "create_server", fail)
