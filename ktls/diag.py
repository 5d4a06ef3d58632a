"""What the kernel tells of a connection (inet_diag, getsockopt) and of them all (tls_stat)."""

from __future__ import annotations

import errno
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from . import _ktls
from .types import MAX_PAYLOAD, Cipher, Mode, Version

_STAT = Path("/proc/net/tls_stat")

# <linux/netlink.h>, <linux/sock_diag.h>, <linux/inet_diag.h>
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_ULP_INFO = 19  # INET_DIAG_ULP_INFO
_WITH_INFO = 1 << 2 - 1  # INET_DIAG_INFO: without it no ULP info comes either
_ULP_INFO_TLS = 2  # INET_ULP_INFO_TLS
_SO_COOKIE = 57
_NLMSGHDR = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBBI")  # inet_diag_req_v2 up to its inet_diag_sockid
_ENDS = struct.Struct(">HH16s16s")  # of inet_diag_sockid, in network order
_MESSAGE_SIZE = 72  # of inet_diag_msg, after which attributes begin
_ATTRIBUTE = struct.Struct("=HH")
_CONF = struct.Struct("=H")
_NESTED = 0x3FFF  # attribute type without its flags
_ALL_STATES = 0xFFFFFFFF

# <linux/tls.h>: TLS_INFO_*, TLS_CONF_*
_TXCONF, _RXCONF = 3, 4
_MODES = {1: Mode.USERSPACE, 2: Mode.SOFTWARE, 3: Mode.DEVICE, 4: Mode.DEVICE}


@dataclass(frozen=True)
class ConnectionInfo:
    """What the kernel tells of one connection.

    Attributes:
        version: The TLS version; None if no direction is in the kernel.
        cipher: The kernel's cipher; None likewise.
        tx: Where sent records are made.
        rx: Where received records are opened.
        exact: Whether `tx` and `rx` are inet_diag's word. Without it (before Linux 7.2 it needs
            CAP_NET_ADMIN) a direction in the kernel is given as SOFTWARE, and may be DEVICE.
        tx_rec_seq: Sequence number of the next record sent; None if not in the kernel.
        rx_rec_seq: The same of the next record received.
        max_send_fragment: Most plaintext bytes in a record sent.
        expect_no_pad: Whether received records are expected without padding.
        zerocopy: Whether a network card may read a file's pages while it sends them.
    """

    version: Version | None
    cipher: Cipher | None
    tx: Mode
    rx: Mode
    exact: bool
    tx_rec_seq: int | None
    rx_rec_seq: int | None
    max_send_fragment: int
    expect_no_pad: bool
    zerocopy: bool


def info(sock: socket.socket) -> ConnectionInfo:
    """Asks the kernel about a TCP socket, whoever gave it its keys.

    Args:
        sock: Connected.

    Returns:
        What it says. Keys are read with it (getsockopt gives no less) and wiped at once.

    Raises:
        OSError: It is closed.
    """
    if sock.fileno() < 0:
        raise OSError(errno.EBADF, "the socket is closed")
    queries = [_query(sock, direction) for direction in (_ktls.TX, _ktls.RX)]
    tx_rec_seq, rx_rec_seq = (None if each is None else each[2] for each in queries)
    known = (Mode.USERSPACE if each is None else Mode.SOFTWARE for each in queries)
    modes = _inet_diag(sock)
    tx, rx = modes or known
    version, cipher, _ = queries[0] or queries[1] or (None, None, 0)
    return ConnectionInfo(
        version=version,
        cipher=cipher,
        tx=tx,
        rx=rx,
        exact=modes is not None,
        tx_rec_seq=tx_rec_seq,
        rx_rec_seq=rx_rec_seq,
        max_send_fragment=_option(sock, _ktls.TX_MAX_PAYLOAD_LEN, MAX_PAYLOAD),
        expect_no_pad=bool(_option(sock, _ktls.RX_EXPECT_NO_PAD, 0)),
        zerocopy=bool(_option(sock, _ktls.TX_ZEROCOPY_RO, 0)),
    )


def stats() -> dict[str, int]:
    """The counters of kernel TLS in this network namespace (``/proc/net/tls_stat``).

    Returns:
        Counters by the kernel's names, such as ``TlsTxSw`` (connections that ever sent from the
        kernel), ``TlsCurrTxSw`` (that do now) or ``TlsDecryptError``; empty while the kernel has
        no TLS, or hasn't loaded it.
    """
    try:
        lines = _STAT.read_text(encoding="ascii").split("\n")
    except FileNotFoundError:
        return {}
    return {name: int(value) for name, value in (line.split() for line in lines if line)}


def _query(sock: socket.socket, direction: int) -> tuple[Version, Cipher, int] | None:
    """Version, cipher and next sequence number of a direction; None if it isn't in the kernel."""
    try:
        version, cipher, _iv, rec_seq = _ktls.query(sock.fileno(), direction)
    except OSError:
        return None
    return Version(version), Cipher(cipher), int.from_bytes(rec_seq, "big")


def _option(sock: socket.socket, option: int, default: int) -> int:
    try:
        return _ktls.get_option(sock.fileno(), option)
    except OSError:  # no such option, not in this version, or no keys
        return default


def _inet_diag(sock: socket.socket) -> tuple[Mode, Mode] | None:
    """TX and RX as inet_diag has them, None if it doesn't tell (``tls_get_info``)."""
    # OSError: not allowed, or no netlink; the others: no such answer, or one that makes no sense.
    with suppress(OSError, KeyError, ValueError, struct.error):
        ulp = dict(_attributes(dict(_attributes(_payload(_ask(sock))))[_ULP_INFO]))
        tls = dict(_attributes(ulp[_ULP_INFO_TLS]))
        (tx,), (rx,) = (_CONF.unpack(tls[conf]) for conf in (_TXCONF, _RXCONF))
        return _MODES[tx], _MODES[rx]
    return None


def _ask(sock: socket.socket) -> bytes:
    """One inet_diag request for exactly this socket, found by its ends and its cookie."""
    (host, port, *_), (peer, peer_port, *_) = sock.getsockname(), sock.getpeername()
    addresses = (
        socket.inet_pton(sock.family, each.partition("%")[0]).ljust(16, b"\0")
        for each in (host, peer)
    )
    interface = sock.getsockname()[3] if sock.family == socket.AF_INET6 else 0
    cookie = int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8), sys.byteorder)
    request = (
        _REQUEST.pack(sock.family, socket.IPPROTO_TCP, _WITH_INFO, 0, _ALL_STATES)
        + _ENDS.pack(port, peer_port, *addresses)
        + struct.pack("=III", interface, cookie & 0xFFFFFFFF, cookie >> 32)
    )
    header = _NLMSGHDR.pack(
        _NLMSGHDR.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 0, 0
    )
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
        netlink.bind((0, 0))
        netlink.send(header + request)
        return netlink.recv(1 << 14)


def _payload(answer: bytes) -> bytes:
    """What follows the headers of an answer; ValueError if it is another, or isn't all there."""
    size, kind, *_ = _NLMSGHDR.unpack_from(answer)
    if kind != _SOCK_DIAG_BY_FAMILY or size > len(answer):  # NLMSG_ERROR: not in this namespace
        raise ValueError
    return answer[_NLMSGHDR.size + _MESSAGE_SIZE : size]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The attributes of a netlink message, or of a nest; ValueError if one isn't all there."""
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        size, kind = _ATTRIBUTE.unpack_from(data, at)
        if not _ATTRIBUTE.size <= size <= len(data) - at:
            raise ValueError
        yield kind & _NESTED, data[at + _ATTRIBUTE.size : at + size]
        at += size + 3 & ~3
