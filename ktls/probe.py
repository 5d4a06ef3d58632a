"""What this kernel can do, found by doing it on loopback connections.

Version numbers tell nothing (distributions backport, modules may be missing, containers may not
load them), and neither /proc nor /sys lists what TLS can do. So each combination gets a connected
pair, keys for both ends, and has to carry a record.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from . import _ktls, offload
from .errors import OffloadError
from .types import Cipher, CryptoInfo, Mode, Offload, Reason, Version


@dataclass(frozen=True)
class Capability:
    """What became of one combination.

    Attributes:
        version: The TLS version.
        cipher: The cipher.
        tx: Whether the kernel sends with it, and if not, why.
        rx: Whether the kernel receives with it, and if not, why.
    """

    version: Version
    cipher: Cipher
    tx: Offload
    rx: Offload


@dataclass(frozen=True)
class Probe:
    """What `probe` found.

    Attributes:
        ulp: Whether this process can attach the TLS ULP at all, and if not, why.
        capabilities: Every version and cipher that any kernel has.
        rekey: Whether keys can be replaced, as a TLS 1.3 KeyUpdate wants (Linux 6.14).
    """

    ulp: Offload
    capabilities: tuple[Capability, ...]
    rekey: bool

    @property
    def available(self) -> bool:
        """Whether at least one combination sends from the kernel."""
        return any(each.tx.mode is Mode.SOFTWARE for each in self.capabilities)

    def find(self, version: Version, cipher: Cipher) -> Capability | None:
        """The result for one combination; None if no kernel has it."""
        wanted = (version, cipher)
        return next((c for c in self.capabilities if (c.version, c.cipher) == wanted), None)


def probe() -> Probe:
    """Tries every version and cipher, in both directions, on loopback connections.

    It takes some milliseconds, and loads kernel modules if this process may.

    Returns:
        The result.

    Raises:
        OSError: No loopback TCP connection can be made here.
    """
    with offload.loopback_pair() as ends:
        ulp = _attach(*ends)
    capabilities = tuple(_try(version, cipher) for cipher in Cipher for version in cipher.versions)
    return Probe(ulp, capabilities, offload.can_rekey())


def _try(version: Version, cipher: Cipher) -> Capability:
    info = CryptoInfo(
        version,
        cipher,
        key=os.urandom(cipher.key_size),
        iv=os.urandom(cipher.iv_size),
        salt=os.urandom(cipher.salt_size),
        rec_seq=0,
    )
    with offload.loopback_pair() as (sender, receiver):
        attached = _attach(sender, receiver)
        if attached.reason is not None:
            return Capability(version, cipher, attached, attached)
        tx = _install(sender, _ktls.TX, info)
        rx = _install(receiver, _ktls.RX, info)
        if tx.reason is None and rx.reason is None and not _carries(sender, receiver):
            tx = rx = Offload(Mode.USERSPACE, Reason.KERNEL_REFUSED, "a record did not arrive")
    return Capability(version, cipher, tx, rx)


def _attach(*ends: socket.socket) -> Offload:
    try:
        for sock in ends:
            offload.attach(sock)
    except OffloadError as error:
        return offload.refused(error)
    return offload.IN_KERNEL


def _install(sock: socket.socket, direction: int, info: CryptoInfo) -> Offload:
    try:
        offload.install(sock, direction, info)
    except OffloadError as error:
        return offload.refused(error)
    return offload.IN_KERNEL


def _carries(sender: socket.socket, receiver: socket.socket) -> bool:
    """Whether a record sent at one end comes out at the other."""
    receiver.settimeout(5)
    message = b"ktls"
    try:
        sender.sendall(message)
        return receiver.recv(len(message)) == message
    except OSError:
        return False
