"""A file to a peer that discards it: from plain TCP and the C reference to nginx."""

from __future__ import annotations

from .measure import Bench, Contender

BENCH = Bench(
    name="sendfile",
    title="Sending a file, by its size",
    ours="Socket.sendfile",
    contenders=(
        Contender("TCP sendfile, no TLS", "reference", "plain"),
        Contender("C reference", "reference", "sendfile"),
        Contender("C reference, fstat and lseek too", "reference", "contract"),
        Contender("Socket.sendfile", "ktls", "sendfile"),
        Contender("Socket.sendfile, unbuffered file", "ktls", "unbuffered"),
        Contender("Socket.sendfile, size unknown", "ktls", "contract"),
        Contender("Socket.sendall", "ktls", "send"),
        Contender("SSLSocket.sendfile", "stdlib", "sendfile"),
        Contender("SSLSocket.sendall", "stdlib", "send"),
        Contender("SSLSocket.sendall, OpenSSL's kTLS", "stdlib-ktls", "send"),
        Contender("pyOpenSSL sendall", "pyopenssl", "send"),
        Contender("nginx, OpenSSL's kTLS", "nginx-ktls", "sendfile"),
        Contender("nginx", "nginx", "sendfile"),
    ),
    sizes=tuple(1 << power for power in (12, 14, 16, 18, 20, 23, 26, 28, 30)),
)
