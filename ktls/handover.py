"""The hand-over: each direction goes to the kernel, or stays with OpenSSL and says why."""

from __future__ import annotations

import socket
import threading
from dataclasses import dataclass

from . import _ktls, offload
from .control import DetachedControl, EngineControl
from .detaching import ConnectionState
from .engine import Engine
from .errors import HandOverError, KeyMaterialError, OffloadError
from .handshake import Handshake
from .receiving import KernelReceiver, Receiver
from .sending import KernelSender, Sender
from .types import MAX_PAYLOAD, CryptoInfo, Mode, Offload, Version
from .userspace import EngineReceiver, EngineSender


@dataclass(frozen=True)
class Options:
    """How a connection is to be run.

    Attributes:
        record_limit: How many records one key may protect in sending, if not the cipher's limit.
        max_send_fragment: Most plaintext bytes in a record sent.
        expect_no_pad: The kernel may expect TLS 1.3 records without padding.
        zerocopy: A network card may read files while it sends them.
    """

    record_limit: int | None = None
    max_send_fragment: int = MAX_PAYLOAD
    expect_no_pad: bool = False
    zerocopy: bool = False


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
    handshake: Handshake,
    tx: Offload,
    rx: Offload,
    options: Options,
) -> Directions:
    """Proves the keys of a finished handshake and gives them to the kernel, RX before TX.

    Args:
        sock: All of the handshake's bytes are written to it, and none after them read.
        engine: Did the handshake.
        handshake: Is done.
        tx: Mode SOFTWARE if sending is to go to the kernel, else why it can't.
        rx: The same for receiving.
        options: How to run the connection.

    Returns:
        Both directions, ready for use. Refusals are in it: none is raised.
    """
    engine, lock = handshake.engine, threading.Lock()
    if Mode.SOFTWARE not in (tx.mode, rx.mode):
        handshake.forget()
        return _in_userspace(sock, engine, lock, options, tx, rx, None)
    try:
        result = handshake.hand_over()
    except HandOverError as error:
        state = Offload(Mode.USERSPACE, error.reason, str(error))
        tx, rx = (state if each.mode is Mode.SOFTWARE else each for each in (tx, rx))
        return _in_userspace(sock, engine, lock, options, tx, rx, error)
    max_fragment = min(result.max_fragment, options.max_send_fragment)
    control = EngineControl(engine, lock, result)
    rx, rx_failure = _install_rx(sock, result.rx, rx, options)
    tx, tx_failure = _install_tx(sock, result.tx, tx, options, max_fragment)
    # TX may be the kernel's now: nothing that can fail may come before the caller knows it.
    sender: Sender
    if tx.mode is Mode.SOFTWARE:
        sender = KernelSender(
            sock,
            control,
            result.tx_chain,
            used=result.tx.rec_seq,
            record_limit=options.record_limit,
            max_fragment=max_fragment,
        )
    else:
        sender = EngineSender(sock, engine, lock, max_fragment)
    receiver: Receiver
    if rx.mode is Mode.SOFTWARE:
        receiver = KernelReceiver(sock, control, sender, result.rx_chain)
    else:
        receiver = EngineReceiver(sock, engine, lock, sender)
    return Directions(sender, receiver, tx, rx, tx_failure or rx_failure)


def take_on(sock: socket.socket, state: ConnectionState) -> Directions:
    """Goes on with a connection of another process, its keys in the kernel.

    Raises:
        SocketError: Not a connected TCP socket.
        KeyMaterialError: The kernel has no keys for it, or those of another version or cipher.
    """
    offload.check_socket(sock)
    for direction, chain in ((_ktls.TX, state.tx_chain), (_ktls.RX, state.rx_chain)):
        if offload.installed(sock, direction) != (chain.version, chain.cipher):
            raise KeyMaterialError("the descriptor isn't that of the connection in this state")
    control = DetachedControl(server_side=state.server_side)
    sender = KernelSender(
        sock,
        control,
        state.tx_chain,
        used=state.records_sent,
        record_limit=state.record_limit,
        max_fragment=state.max_fragment,
        position=state.stream_end,
    )
    parts = state.handshake_part, state.record_part
    receiver = KernelReceiver(sock, control, sender, state.rx_chain, parts)
    return Directions(sender, receiver, offload.IN_KERNEL, offload.IN_KERNEL, None)


def _in_userspace(
    sock: socket.socket,
    engine: Engine,
    lock: threading.Lock,
    options: Options,
    tx: Offload,
    rx: Offload,
    failure: HandOverError | None,
) -> Directions:
    sender = EngineSender(sock, engine, lock, options.max_send_fragment)
    receiver = EngineReceiver(sock, engine, lock, sender)
    return Directions(sender, receiver, tx, rx, failure)


def _install_rx(
    sock: socket.socket, info: CryptoInfo, state: Offload, options: Options
) -> tuple[Offload, OffloadError | None]:
    if state.mode is Mode.SOFTWARE:
        try:
            offload.install(sock, _ktls.RX, info)
        except OffloadError as error:
            return offload.refused(error), error
        if options.expect_no_pad and info.version is Version.TLS_1_3:
            offload.expect_no_pad(sock)
    return state, None


def _install_tx(
    sock: socket.socket, info: CryptoInfo, state: Offload, options: Options, max_fragment: int
) -> tuple[Offload, OffloadError | None]:
    if state.mode is Mode.SOFTWARE:
        if options.zerocopy:
            offload.advise(sock, _ktls.TX_ZEROCOPY_RO)
        try:
            offload.limit_fragments(sock, max_fragment)
            offload.install(sock, _ktls.TX, info)
        except OffloadError as error:
            return offload.refused(error), error
    return state, None
