"""The hand-over: each direction goes to the kernel, or stays with OpenSSL and says why."""

from __future__ import annotations

import errno
import socket
import threading
from dataclasses import dataclass

from . import _ktls, offload
from .engine import Engine
from .errors import HandOverError, OffloadError
from .handshake import Handshake
from .receiving import EngineReceiver, KernelReceiver, Receiver
from .sending import EngineSender, KernelSender, Sender
from .types import MAX_PAYLOAD, CryptoInfo, Mode, Offload, Reason


@dataclass(frozen=True)
class Directions:
    """What became of a connection.

    Attributes:
        sender: Does the sending.
        receiver: Does the receiving.
        tx: Where that sending happens, and why.
        rx: Where that receiving happens, and why.
        failure: Why a direction that was to go to the kernel didn't.
    """

    sender: Sender
    receiver: Receiver
    tx: Offload
    rx: Offload
    failure: HandOverError | OffloadError | None


def hand_over(
    sock: socket.socket,
    engine: Engine,
    handshake: Handshake,
    tx: Offload,
    rx: Offload,
    record_limit: int | None = None,
) -> Directions:
    """Proves the keys of a finished handshake and gives them to the kernel, RX before TX.

    Args:
        sock: All of the handshake's bytes are written to it, and none after them read.
        engine: Did the handshake.
        handshake: Is done.
        tx: Mode SOFTWARE if sending is to go to the kernel, else why it can't.
        rx: The same for receiving.
        record_limit: How many records one key may protect in sending, if not the cipher's limit.

    Returns:
        Both directions, ready for use. Refusals are in it: none is raised.
    """
    lock = threading.Lock()
    if Mode.SOFTWARE not in (tx.mode, rx.mode):
        handshake.forget()
        return _in_userspace(sock, engine, lock, tx, rx, None)
    try:
        result = handshake.hand_over()
    except HandOverError as error:
        state = Offload(Mode.USERSPACE, error.reason, str(error))
        tx, rx = (state if each.mode is Mode.SOFTWARE else each for each in (tx, rx))
        return _in_userspace(sock, engine, lock, tx, rx, error)
    rx, rx_failure = _install(sock, _ktls.RX, result.rx.info, rx)
    tx_failure = _fragment_failure(result.max_fragment) if tx.mode is Mode.SOFTWARE else None
    if tx_failure is None:
        tx, tx_failure = _install(sock, _ktls.TX, result.tx.info, tx)
    else:
        tx = offload.refused(tx_failure)
    # TX may be the kernel's now: nothing that can fail may come before the caller knows it.
    sender: Sender = EngineSender(sock, engine, lock)
    if tx.mode is Mode.SOFTWARE:
        sender = KernelSender(sock, engine, lock, result.tx, record_limit)
    receiver: Receiver = EngineReceiver(sock, engine, lock, sender)
    if rx.mode is Mode.SOFTWARE:
        receiver = KernelReceiver(sock, engine, lock, sender, result.rx)
    return Directions(sender, receiver, tx, rx, rx_failure or tx_failure)


def _in_userspace(
    sock: socket.socket,
    engine: Engine,
    lock: threading.Lock,
    tx: Offload,
    rx: Offload,
    failure: HandOverError | None,
) -> Directions:
    sender = EngineSender(sock, engine, lock)
    receiver = EngineReceiver(sock, engine, lock, sender)
    return Directions(sender, receiver, tx, rx, failure)


def _install(
    sock: socket.socket, direction: int, info: CryptoInfo, state: Offload
) -> tuple[Offload, OffloadError | None]:
    if state.mode is Mode.SOFTWARE:
        try:
            offload.install(sock, direction, info)
        except OffloadError as error:
            return offload.refused(error), error
    return state, None


def _fragment_failure(max_fragment: int) -> OffloadError | None:
    """The kernel would make records of 16384 bytes, which this peer refuses."""
    if max_fragment >= MAX_PAYLOAD:
        return None
    text = f"records of at most {max_fragment} bytes; {Reason.FRAGMENT_LIMIT.value}"
    return OffloadError(errno.EMSGSIZE, text, Reason.FRAGMENT_LIMIT)
