"""What a connection costs a server: the handshake, what the hand-over adds, and its parts."""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack

from .contenders import Server
from .measure import MICROSECONDS, Bench, Contender, Load, Settings, check_sent, send
from .parts import PARTS
from .peer import RIGHT, Link, contents, discard

_MOST = 50


def _load(size: int, settings: Settings) -> Load:
    return Load(1, min(settings.most, _MOST), size)


def _work(server: Server, link: Link, operation: str, load: Load) -> float:
    """Connections one after another, which ask for nothing or stay open; or a part, as often."""
    if operation in PARTS:
        return send(server, link, operation, load)
    nothing = server.request("send", 0, load.size)
    discard(link, nothing)
    started = time.perf_counter()
    with ExitStack() as left_open:
        for _ in range(load.count):
            another = server.connect(operation)
            left_open.enter_context(another.sock)
            if operation == "idle":
                another.request(server.request(operation, 1, 0))
                another.sock.recv(1, socket.MSG_PEEK)  # its answer
            else:
                discard(another, nothing)
                another.sock.close()  # which the server waits for
    return time.perf_counter() - started


def _check(server: Server, link: Link, operation: str, load: Load) -> bool:
    """That a connection works, and that a part goes through."""
    if operation in PARTS:
        link.request(server.request(operation, 1, 0))
        return b"".join(contents(link)) == RIGHT
    return check_sent(server, link, "send", load)


BENCH = Bench(
    name="handshake",
    title="A connection on a server, TLS 1.3, and the parts of the hand-over",
    ours="ktls.wrap",
    contenders=(
        Contender("pyOpenSSL on the socket", "pyopenssl", "handshake"),
        Contender("ktls.wrap", "ktls", "handshake"),
        Contender("ktls.wrap, no direction in the kernel", "ktls-userspace", "handshake"),
        Contender("SSLContext.wrap_socket", "stdlib", "handshake"),
        Contender("pyOpenSSL on the socket, not closed", "pyopenssl", "idle"),
        Contender("ktls.wrap, not closed", "ktls", "idle"),
        Contender("part: secrets from OpenSSL", "ktls", "secrets"),
        Contender("part: key schedule", "ktls", "keys"),
        Contender("part: proof, with the key schedule", "ktls", "proof"),
        Contender("(a TCP connection alone)", "ktls", "pair"),
        Contender("part: the same with ULP, RX and TX installed", "ktls", "install"),
    ),
    sizes=(1 << 12,),
    unit=MICROSECONDS,
    load=_load,
    work=_work,
    check=_check,
)
