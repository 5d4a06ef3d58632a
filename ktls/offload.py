"""Handing a socket's keys to the kernel, and what its refusals mean.

The order matters (see ``ktls.h``): the ULP, then RX, then TX. A failure before TX leaves sending as
it was; after TX succeeded nothing that can fail runs before the caller knows.
"""

from __future__ import annotations

import copy
import errno
import functools
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from . import _ktls, diag
from .errors import (
    AlgorithmUnavailableError,
    AlreadyEnabledError,
    KernelUnavailableError,
    OffloadError,
    RekeyUnsupportedError,
    SocketError,
)
from .records import RecordCipher
from .types import (
    MAX_PAYLOAD,
    Cipher,
    CryptoInfo,
    KeyUpdateRequest,
    Mode,
    Offload,
    Reason,
    RecordType,
    TrafficKeys,
    Version,
)

_log = logging.getLogger("ktls")

IN_KERNEL = Offload(Mode.SOFTWARE)
NOT_WANTED = Offload(Mode.USERSPACE, Reason.NOT_WANTED)

_ASK_AGAIN = 10.0  # seconds
_absent: deque[tuple[float, KernelUnavailableError]] = deque(maxlen=1)  # until when, and its error

_TCP = (socket.IPPROTO_TCP, socket.IPPROTO_MPTCP)

_ATTACH = {
    errno.ENOENT: (KernelUnavailableError, Reason.NO_KERNEL_TLS),
    errno.ENOPROTOOPT: (OffloadError, Reason.NOT_TCP),
    errno.EOPNOTSUPP: (OffloadError, Reason.NOT_TCP),
    errno.ENOTCONN: (OffloadError, Reason.NOT_ESTABLISHED),
    errno.EEXIST: (AlreadyEnabledError, Reason.OTHER_ULP),
}
_INSTALL = {
    errno.ENOENT: (AlgorithmUnavailableError, Reason.NO_ALGORITHM),
    errno.EINVAL: (AlgorithmUnavailableError, Reason.CIPHER_NOT_IN_KERNEL),
    errno.EBUSY: (AlreadyEnabledError, Reason.OTHER_ULP),
    errno.ENOPROTOOPT: (AlreadyEnabledError, Reason.OTHER_ULP),
}
_Meanings = dict[int, tuple[type[OffloadError], Reason]]


def _translated(error: OSError, meanings: _Meanings) -> OffloadError:
    """A system call's bare error as one that says what to do."""
    number = error.errno or errno.EIO
    kind, reason = meanings.get(number, (OffloadError, Reason.KERNEL_REFUSED))
    return kind(number, f"{error.strerror}; {reason.value}", reason)


@contextmanager
def loopback_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP connection to try things on: its two ends."""
    try:
        listener = socket.create_server(("127.0.0.1", 0))
    except OSError:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    with listener, socket.socket(listener.family, socket.SOCK_STREAM) as connecting:
        connecting.connect(listener.getsockname())
        accepted, _ = listener.accept()
        with accepted:
            yield connecting, accepted


def check_socket(sock: socket.socket) -> None:
    """Refuses what can't carry TLS in the kernel, before anything is changed.

    Raises:
        SocketError: Closed, not TCP, or not connected.
    """
    if sock.fileno() < 0:
        raise SocketError(errno.EBADF, "the socket is closed: pass a connected TCP socket")
    try:
        # The protocol alone isn't enough: 6 is also a raw socket's, and netlink's for IPsec.
        is_tcp = (
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL) in _TCP
            and sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_STREAM
        )
        if is_tcp:
            sock.getpeername()
    except OSError as error:
        # A peer that reset the connection has no name any more either.
        raise SocketError(
            error.errno, "the socket is not connected: connect() it, or accept() one"
        ) from None
    if not is_tcp:
        kind = f"{sock.family.name} {sock.type.name}"
        raise SocketError(errno.EPROTOTYPE, f"not a TCP socket but {kind}: kernel TLS needs TCP")


def attach(sock: socket.socket) -> bool:
    """Attaches the TLS ULP, which passes everything through until there are keys.

    One that is there already is left to `install` to judge: it may well be this one.

    Returns:
        Whether there was none before.

    Raises:
        OffloadError: The kernel refused.
    """
    try:
        _ktls.attach(sock.fileno())
    except FileExistsError:
        return False
    except OSError as error:
        raise _translated(error, _ATTACH) from None
    _absent.clear()
    return True


def try_attach(sock: socket.socket) -> bool:
    """The same for one connection of many, which can do without.

    A kernel that had no TLS is asked again after `_ASK_AGAIN` seconds: where root asks, it looks
    for the module each time, by a process that the caller waits for (``request_module``).
    """
    for until, error in tuple(_absent):
        if time.monotonic() < until:
            raise copy.copy(error)
    try:
        return attach(sock)
    except KernelUnavailableError as error:
        _absent.append((time.monotonic() + _ASK_AGAIN, copy.copy(error)))
        raise


def install(sock: socket.socket, direction: int, info: CryptoInfo) -> None:
    """Gives the kernel one direction's keys.

    Args:
        sock: With the ULP attached.
        direction: ``_ktls.TX`` or ``_ktls.RX``.
        info: That direction's keys. It must have none yet: a kernel that can rekey would take
            these, and start the sequence anew.

    Raises:
        OffloadError: The kernel refused; the direction is as it was.
    """
    try:
        _install(sock, direction, info)
    except OSError as error:
        raise _translated(error, _INSTALL) from None


def _install(sock: socket.socket, direction: int, info: CryptoInfo) -> None:
    _ktls.install(sock.fileno(), direction, **_fields(info))


def _fields(info: CryptoInfo) -> dict[str, Any]:
    """The keys as the extension's functions take them."""
    return {
        "version": info.version,
        "cipher": info.cipher,
        "key": info.key,
        "iv": info.iv,
        "salt": info.salt,
        "rec_seq": info.rec_seq.to_bytes(_ktls.REC_SEQ_SIZE, "big"),
    }


def key_update(
    sock: socket.socket, info: CryptoInfo, request: KeyUpdateRequest
) -> Callable[[int], int]:
    """Prepares the system calls of a KeyUpdate of our own: its record, and the keys after it.

    Args:
        sock: With TLS 1.3 keys for sending.
        info: The next generation's.
        request: Whether the peer is to do the same.

    Returns:
        A function of flags, for sendmsg. It raises the OSError of the record, which then wasn't
        sent; it returns the errno of the keys, or 0.
    """
    return functools.partial(_ktls.update_key, sock.fileno(), request=request, **_fields(info))


def limit_fragments(sock: socket.socket, size: int) -> None:
    """Makes the kernel's records hold at most so many bytes; to be done before TX gets its keys.

    Raises:
        OffloadError: This kernel makes full records only.
    """
    if size >= MAX_PAYLOAD:
        return
    try:
        _ktls.set_option(sock.fileno(), _ktls.TX_MAX_PAYLOAD_LEN, size)
    except OSError as error:
        text = f"records of at most {size} bytes; {Reason.FRAGMENT_LIMIT.value}"
        raise OffloadError(error.errno or errno.EIO, text, Reason.FRAGMENT_LIMIT) from None


def advise(sock: socket.socket, option: int) -> None:
    """Switches on an option that changes nothing but speed, if the kernel has it."""
    try:
        _ktls.set_option(sock.fileno(), option, 1)
    except OSError as error:
        _log.info("option %d is not to be had here: %s", option, error)


def expect_no_pad(sock: socket.socket) -> None:
    """Tells the kernel that records come without padding, if it gets those right that have some."""
    if survives_padding():
        advise(sock, _ktls.RX_EXPECT_NO_PAD)
    else:
        _log.info("expect_no_pad is not to be had here, or padding would be taken for data")


@functools.cache
def survives_padding() -> bool:
    """Whether this kernel, expecting no padding, reads a padded record and one more right.

    Tried once on a loopback connection. Linux 6.1 decrypts the padded record into the reader's
    buffer, then once more behind that (``tls_decrypt_sw``), and puts what follows there too.
    """
    info = _trial_keys()
    cipher = RecordCipher(info)
    # "Type 0" after content and type is one zero of padding. In one send: one recv sees both.
    padded = cipher.seal(0, b"pad" + bytes([RecordType.APPLICATION_DATA]))
    stream = padded + cipher.seal(RecordType.APPLICATION_DATA, b"ded")
    with suppress(OSError), loopback_pair() as (sender, receiver):
        attach(receiver)
        _install(receiver, _ktls.RX, info)
        _ktls.set_option(receiver.fileno(), _ktls.RX_EXPECT_NO_PAD, 1)
        sender.sendall(stream)
        receiver.settimeout(5)
        return receiver.recv(len(stream)) == b"padded"
    return False


def rekey(sock: socket.socket, direction: int, info: CryptoInfo) -> None:
    """Replaces one direction's keys after a KeyUpdate.

    Args:
        sock: With TLS 1.3 keys for that direction.
        direction: ``_ktls.TX`` or ``_ktls.RX``.
        info: The next generation's keys.

    Raises:
        RekeyUnsupportedError: This kernel can't. In this and the next case the direction is as it
            was, and useless: the peer has changed its keys, or was told that we have.
        OffloadError: The kernel refused for any other reason.
    """
    try:
        _install(sock, direction, info)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise RekeyUnsupportedError from None
        raise not_replaced(error.errno or errno.EIO) from None


def not_replaced(number: int) -> OffloadError:
    """The error for keys that the kernel didn't take after a KeyUpdate."""
    text = f"the next keys: {os.strerror(number)}; {Reason.KERNEL_REFUSED.value}"
    return OffloadError(number, text, Reason.KERNEL_REFUSED)


@functools.cache
def can_rekey() -> bool:
    """Whether this kernel can replace keys (Linux 6.14), tried once on a loopback connection.

    Raises:
        OSError: That couldn't be tried, for want of a descriptor for instance. The next call will.
    """
    info = _trial_keys()
    try:
        with loopback_pair() as (sock, _peer):
            attach(sock)
            _install(sock, _ktls.TX, info)
            rekey(sock, _ktls.TX, replace(info, key=b"\1" * 16))
    except (OffloadError, RekeyUnsupportedError):
        return False
    except OSError as error:
        if error.errno in (errno.ENETUNREACH, errno.EADDRNOTAVAIL):
            # A network without loopback. The counter came with what it counts.
            return "TlsTxRekeyOk" in diag.stats()
        raise
    return True


def _trial_keys() -> CryptoInfo:
    return CryptoInfo(
        Version.TLS_1_3, Cipher.AES_GCM_128, key=bytes(16), iv=bytes(8), salt=bytes(4), rec_seq=0
    )


def installed(sock: socket.socket, direction: int) -> tuple[int, int] | None:
    """Version and cipher of the keys that the kernel has for that direction, if any."""
    return _ktls.installed(sock.fileno(), direction)


def has_any_keys(sock: socket.socket) -> bool:
    """Whether the kernel has keys for any direction of the socket."""
    return any(installed(sock, direction) for direction in (_ktls.TX, _ktls.RX))


def enable(sock: socket.socket, keys: TrafficKeys, tx: bool = True, rx: bool = True) -> None:
    """Puts a connected socket's records into the kernel.

    From then on everything written to the socket is encrypted, by ``os.sendfile`` too, and reads
    give plaintext. Reads must go through ``recvmsg`` with room for ancillary data: a plain read
    fails with EIO on the first alert or ticket. `ktls.wrap` gives a socket that does all this, and
    the closing.

    The socket must not be read or written meanwhile, nor the TLS library's connection used
    afterwards. A socket that has the ULP already is taken as it is. Anyone who has the descriptor
    can read the keys back (``getsockopt``).

    Args:
        sock: A connected TCP socket, its TLS handshake done and flushed.
        keys: From `ktls.extract_keys`, or of one's own.
        tx: Whether to put sending into the kernel.
        rx: Whether to put receiving into the kernel.

    Raises:
        SocketError: Not a connected TCP socket.
        KernelUnavailableError: No kernel TLS here; the text says what to do.
        AlgorithmUnavailableError: No such cipher, version or direction in this kernel.
        AlreadyEnabledError: There are keys, or another ULP.
        OffloadError: Any other refusal. In every case sending is as it was before; when RX was
            installed and TX refused, so is everything but receiving.
    """
    check_socket(sock)
    attach(sock)
    if rx:
        _check_no_keys(sock, _ktls.RX)
        install(sock, _ktls.RX, keys.rx)
    if tx:
        _check_no_keys(sock, _ktls.TX)
        limit_fragments(sock, keys.max_fragment)
        install(sock, _ktls.TX, keys.tx)
    # Nothing that can fail may come here.


def _check_no_keys(sock: socket.socket, direction: int) -> None:
    if installed(sock, direction):
        name = "TLS_RX" if direction == _ktls.RX else "TLS_TX"
        text = f"setsockopt({name}): keys are installed already; {Reason.OTHER_ULP.value}"
        raise AlreadyEnabledError(errno.EBUSY, text, Reason.OTHER_ULP)


def refused(error: OffloadError) -> Offload:
    """What a direction's state is after the kernel refused it."""
    text = f"{error.strerror}".partition(";")[0]
    return Offload(Mode.USERSPACE, error.reason, text or os.strerror(error.errno or 0))
