"""What the kernel tells of a connection and of them all, to whoever asks."""

from __future__ import annotations

import dataclasses
import errno
import os
import pickle
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import ktls
from ktls import Mode, RecordType, diag, offload
from ktls.diag import ConnectionInfo
from ktls.types import MAX_PAYLOAD

from .conftest import MODES, VERSIONS, MakePair, MakeRecordPair, in_kernel
from .test_offload import keys_for, mirrored
from .test_types import assert_hidden

DATA = RecordType.APPLICATION_DATA
PLAIN = ConnectionInfo(
    version=None,
    cipher=None,
    tx=Mode.USERSPACE,
    rx=Mode.USERSPACE,
    exact=False,
    tx_rec_seq=None,
    rx_rec_seq=None,
    max_send_fragment=MAX_PAYLOAD,
    expect_no_pad=False,
    zerocopy=False,
)


def is_net_admin() -> bool:
    """Whether this process may ask inet_diag for everything, on any kernel (CAP_NET_ADMIN, 12)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    effective = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> 12 & 1)


@pytest.fixture(params=["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a TCP connection, over IPv4, IPv6, and one in the clothes of the other."""
    family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
    mapped = request.param.startswith("::ffff")
    host = "::" if mapped else request.param
    with socket.create_server((host, 0), family=family, dualstack_ipv6=mapped) as listener:
        left = socket.socket(family)
        left.connect((request.param, listener.getsockname()[1]))
        right, _ = listener.accept()
    with left, right:
        yield left, right


def same_but_exact(one: ConnectionInfo, other: ConnectionInfo) -> bool:
    """Whether both say the same, whoever may know it."""
    return dataclasses.replace(one, exact=other.exact) == other


# -- one connection ------------------------------------------------------------------------------


def test_plain_socket(ends: tuple[socket.socket, socket.socket]) -> None:
    for sock in ends:
        assert same_but_exact(ktls.info(sock), PLAIN)


def test_no_tls_ever() -> None:
    """Nor in what isn't a TCP connection at all."""
    left, right = socket.socketpair()
    with left, right, socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        for sock in (left, tcp, udp):
            assert ktls.info(sock) == PLAIN


def test_closed(ends: tuple[socket.socket, socket.socket], make_pair: MakePair) -> None:
    ends[0].close()
    with pytest.raises(OSError, match="closed") as caught:
        ktls.info(ends[0])
    assert caught.value.errno == errno.EBADF
    tls = make_pair("TLSv1.3", mode="userspace").tls
    tls.close()
    with pytest.raises(OSError, match="closed"):
        tls.info()


@pytest.mark.kernel
def test_exactly_this_socket(ends: tuple[socket.socket, socket.socket]) -> None:
    """Each end has its own state, whatever the addresses look like."""
    left, right = ends
    keys = keys_for()
    ktls.enable(left, keys, rx=False)
    assert ktls.info(left) == dataclasses.replace(
        PLAIN,
        version=keys.tx.version,
        cipher=keys.tx.cipher,
        tx=Mode.SOFTWARE,
        exact=ktls.info(left).exact,
        tx_rec_seq=keys.tx.rec_seq,
    )
    assert same_but_exact(ktls.info(right), PLAIN)
    ktls.enable(right, mirrored(keys))
    assert (ktls.info(left).tx, ktls.info(left).rx) == (Mode.SOFTWARE, Mode.USERSPACE)
    assert (ktls.info(right).tx, ktls.info(right).rx) == (Mode.SOFTWARE, Mode.SOFTWARE)
    for sock in ends:
        assert ktls.info(sock).exact or not is_net_admin()


def test_every_mode(make_record_pair: MakeRecordPair, version: str, side: str, mode: str) -> None:
    """Modes, version and cipher as the connection has them; each record counts, and only those."""
    pair = make_record_pair(version, side, mode)
    tls, peer = pair.tls, pair.peer
    tx, rx = in_kernel(tls)
    before = tls.info()
    assert (before.tx, before.rx) == (tls.tx.mode, tls.rx.mode)
    assert (before.tx_rec_seq is None, before.rx_rec_seq is None) == (not tx, not rx)
    if tx or rx:
        assert (str(before.version), before.cipher) == (version, peer.keys.tx.cipher)
        assert before.exact or not is_net_admin()
    else:
        assert before == PLAIN
    assert (before.max_send_fragment, before.expect_no_pad, before.zerocopy) == (
        MAX_PAYLOAD,
        False,
        False,
    )
    assert before == ktls.info(tls)
    for _ in range(3):
        tls.sendall(b"one record")
    tls.sendall(bytes(2 * MAX_PAYLOAD + 1))  # three
    for size in (1, 100, 0, MAX_PAYLOAD):
        peer.send(DATA, bytes(size))
    assert len(peer.receive_data(30 + 2 * MAX_PAYLOAD + 1)) == 30 + 2 * MAX_PAYLOAD + 1
    assert len(tls.recv(101 + MAX_PAYLOAD, socket.MSG_WAITALL)) == 101 + MAX_PAYLOAD
    after = tls.info()
    expected = dataclasses.replace(
        before,
        tx_rec_seq=peer.rx.rec_seq if tx else None,
        rx_rec_seq=peer.tx.rec_seq if rx else None,
    )
    assert after == expected
    if before.tx_rec_seq is not None:
        assert after.tx_rec_seq == before.tx_rec_seq + 6
    if before.rx_rec_seq is not None:
        assert after.rx_rec_seq == before.rx_rec_seq + 4


@pytest.mark.kernel
def test_key_updates(make_record_pair: MakeRecordPair, side: str) -> None:
    """The next key counts from 0, each direction by itself; what can't be done counts nothing."""
    pair = make_record_pair("TLSv1.3", side)
    pair.tls.sendall(b"x")
    pair.peer.send(DATA, b"x")
    assert pair.tls.recv(1) == b"x"
    before = pair.tls.info()
    if not offload.can_rekey():
        with pytest.raises(ktls.RekeyUnsupportedError):
            pair.tls.update_keys()
        assert pair.tls.info() == before
        return
    pair.tls.update_keys()
    assert pair.tls.info() == dataclasses.replace(before, tx_rec_seq=0)
    pair.peer.update_keys(requested=False)
    pair.peer.send(DATA, b"y")
    assert pair.tls.recv(1) == b"y"
    pair.tls.sendall(b"y")
    assert pair.tls.info() == dataclasses.replace(before, tx_rec_seq=1, rx_rec_seq=1)


def test_no_key_in_it(make_record_pair: MakeRecordPair, version: str, mode: str) -> None:
    pair = make_record_pair(version, mode=mode)
    info = pair.tls.info()
    keys = pair.peer.keys
    secrets = [each for one in (keys.tx, keys.rx) for each in (one.key, one.salt + one.iv)]
    assert_hidden(f"{info!r} {info} {dataclasses.astuple(info)}", secrets)
    assert not any(isinstance(value, bytes) for value in dataclasses.astuple(info))


ASK_AS_NOBODY = """
import os, pickle, socket, sys
import ktls
ktls.stats()  # has everything imported, for nobody may not read where Python is
socks = [socket.socket(fileno=int(number)) for number in sys.argv[1:]]
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
sys.stdout.buffer.write(pickle.dumps(([ktls.info(sock) for sock in socks], ktls.stats())))
"""


@pytest.mark.kernel
def test_unprivileged(make_record_pair: MakeRecordPair) -> None:
    """Who has the descriptor may ask; what inet_diag doesn't tell him, getsockopt does."""
    pairs = [make_record_pair(version, mode=mode) for version in VERSIONS for mode in MODES]
    descriptors = [pair.tls.fileno() for pair in pairs]
    done = subprocess.run(
        [sys.executable, "-c", ASK_AS_NOBODY, *map(str, descriptors)],
        pass_fds=descriptors,
        cwd=Path(__file__).resolve().parent.parent,
        stdout=subprocess.PIPE,
        check=True,
        timeout=30,
    )
    told, counters = pickle.loads(done.stdout)  # noqa: S301
    for pair, info in zip(pairs, told, strict=True):
        assert same_but_exact(info, pair.tls.info())
        assert (info.tx, info.rx) == (pair.tls.tx.mode, pair.tls.rx.mode)
    assert counters == ktls.stats()


# -- answers of all kinds ------------------------------------------------------------------------


def attribute(kind: int, *content: bytes) -> bytes:
    """A netlink attribute; with many contents, a nest of them."""
    data = b"".join(content)
    return (struct.pack("=HH", 4 + len(data), kind) + data).ljust(4 + len(data) + 3 & ~3, b"\0")


def message(kind: int, *attributes: bytes) -> bytes:
    """An answer to an inet_diag request."""
    data = bytes(72) + b"".join(attributes)
    return struct.pack("=IHHII", 16 + len(data), kind, 0, 0, 1) + data


def u16(number: int) -> bytes:
    """As attributes have it."""
    return struct.pack("=H", number)


def ulp_info(tx: bytes, rx: bytes) -> bytes:
    """What ``tls_get_info`` says, and more that nobody asked for."""
    tls = [attribute(1, u16(0x304)), attribute(2, u16(51)), attribute(3, tx), attribute(4, rx)]
    return attribute(19, attribute(1, b"tls\0"), attribute(0x8002, *tls, attribute(99)))


ANSWER = message(20, attribute(8, b"\0"), ulp_info(u16(2), u16(1)), attribute(15, bytes(4)))


def ask(monkeypatch: pytest.MonkeyPatch, answer: bytes) -> ConnectionInfo:
    """What is told of a plain socket if that is inet_diag's answer."""
    with monkeypatch.context() as patch, socket.socket() as sock:
        patch.setattr(diag, "_ask", lambda _sock: answer)
        return ktls.info(sock)


@pytest.mark.parametrize("tx", range(1, 5))
@pytest.mark.parametrize("rx", range(1, 5))
def test_every_configuration(monkeypatch: pytest.MonkeyPatch, tx: int, rx: int) -> None:
    """TLS_CONF_BASE, SW, HW and HW_RECORD."""
    modes = [Mode.USERSPACE, Mode.SOFTWARE, Mode.DEVICE, Mode.DEVICE]
    told = ask(monkeypatch, message(20, ulp_info(u16(tx), u16(rx))))
    assert (told.tx, told.rx, told.exact) == (modes[tx - 1], modes[rx - 1], True)


def test_answer_cut_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than the kernel said is no answer, however much of it makes sense."""
    assert ask(monkeypatch, ANSWER) == dataclasses.replace(PLAIN, tx=Mode.SOFTWARE, exact=True)
    for size in range(len(ANSWER)):
        assert ask(monkeypatch, ANSWER[:size]) == PLAIN
        shorter = struct.pack("=I", size) + ANSWER[4:size]
        assert ask(monkeypatch, shorter).tx in (Mode.USERSPACE, Mode.SOFTWARE)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(message(2), id="error"),
        pytest.param(message(20), id="nothing"),
        pytest.param(message(20, attribute(19, attribute(1, b"mptcp\0"))), id="another-ulp"),
        pytest.param(message(20, attribute(19, attribute(2))), id="empty-nest"),
        pytest.param(message(20, ulp_info(u16(0), u16(1))), id="configuration-0"),
        pytest.param(message(20, ulp_info(u16(2), u16(5))), id="configuration-5"),
        pytest.param(message(20, ulp_info(b"\2", u16(1))), id="one-byte"),
        pytest.param(message(20, ulp_info(u16(2), bytes(4))), id="four-bytes"),
        pytest.param(message(20, struct.pack("=HH", 0, 19)), id="size-0"),
        pytest.param(message(20, struct.pack("=HH", 3, 19)), id="size-3"),
        pytest.param(message(20, struct.pack("=HH", 5, 19)), id="size-beyond-the-end"),
    ],
)
def test_senseless_answer(monkeypatch: pytest.MonkeyPatch, answer: bytes) -> None:
    assert ask(monkeypatch, answer) == PLAIN


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(at=st.integers(0, len(ANSWER) - 1), noise=st.binary(max_size=64))
@example(at=0, noise=b"")
def test_garbage(monkeypatch: pytest.MonkeyPatch, at: int, noise: bytes) -> None:
    """Nothing that comes back breaks anything, or lasts for ever."""
    told = ask(monkeypatch, ANSWER[:at] + noise + ANSWER[at + len(noise) :])
    assert told == dataclasses.replace(PLAIN, tx=told.tx, rx=told.rx, exact=told.exact)
    assert told.exact or told == PLAIN


@pytest.mark.kernel
def test_kernel_answer_cut_anywhere(
    monkeypatch: pytest.MonkeyPatch, ends: tuple[socket.socket, socket.socket]
) -> None:
    """The same with this kernel's own: what getsockopt says is left."""
    ktls.enable(ends[0], keys_for(), rx=False)
    told = ktls.info(ends[0])
    answer = diag._ask(ends[0])
    for size in range(len(answer)):
        monkeypatch.setattr(diag, "_ask", lambda _sock, size=size: answer[:size])
        assert ktls.info(ends[0]) == dataclasses.replace(told, exact=False)


def test_no_netlink(
    monkeypatch: pytest.MonkeyPatch, ends: tuple[socket.socket, socket.socket]
) -> None:
    """Containers may forbid it."""

    def forbidden(_sock: socket.socket) -> bytes:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(diag, "_ask", forbidden)
    assert ktls.info(ends[0]) == PLAIN


# -- all of them ---------------------------------------------------------------------------------


def test_stats_are_parsed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "tls_stat"
    monkeypatch.setattr(diag, "_STAT", path)
    assert ktls.stats() == {}
    path.write_text("TlsCurrTxSw                     \t0\nTlsTxSw \t18446744073709551615\n")
    assert ktls.stats() == {"TlsCurrTxSw": 0, "TlsTxSw": 2**64 - 1}
    path.write_text("")
    assert ktls.stats() == {}


def test_stats_count(make_pair: MakePair, version: str, mode: str) -> None:
    """Each direction in the kernel counts once, and is subtracted again at its end."""
    before = ktls.stats()
    pair = make_pair(version, "server", mode)
    tx, rx = in_kernel(pair.tls)
    during = ktls.stats()
    expected = {"TlsTxSw": tx, "TlsRxSw": rx, "TlsCurrTxSw": tx, "TlsCurrRxSw": rx}
    if tx or rx:
        assert {name: during[name] - before[name] for name in expected} == expected
    else:
        assert during == before
    pair.peer.close()
    pair.tls.close()
    after = ktls.stats()
    assert {name: after[name] - during[name] for name in after if "Curr" in name} == {
        name: -expected.get(name, 0) for name in after if "Curr" in name
    }
