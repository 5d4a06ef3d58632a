"""Small messages, one record or system call each, and joined by a cork."""

from __future__ import annotations

from .measure import MICROSECONDS, Bench, Contender

BENCH = Bench(
    name="small",
    title="Small messages, by their size",
    ours="Socket.sendall",
    contenders=(
        Contender("C reference, send", "reference", "send"),
        Contender("Socket.sendall", "ktls", "send"),
        Contender("SSLSocket.sendall", "stdlib", "send"),
        Contender("SSLSocket.sendall, OpenSSL's kTLS", "stdlib-ktls", "send"),
        Contender("pyOpenSSL sendall", "pyopenssl", "send"),
        Contender("C reference, MSG_MORE", "reference", "corked"),
        Contender("Socket.sendall in a cork", "ktls", "corked"),
        Contender("SSLSocket.sendall of joined messages", "stdlib", "corked"),
        Contender("pyOpenSSL sendall of joined messages", "pyopenssl", "corked"),
    ),
    sizes=(1, 64, 256, 1024, 4096, 16384),
    unit=MICROSECONDS,
)
