"""Socket in all four modes against the ``ssl`` module."""

from __future__ import annotations

from collections.abc import Callable

from .conftest import Pair


def test_data_both_ways(
    make_pair: Callable[..., Pair], version: str, side: str, mode: str
) -> None:
    pair = make_pair(version, side, mode)
    pair.peer.sendall(b"ping")
    assert pair.tls.recv(100) == b"ping"
    pair.tls.sendall(b"pong" * 10000)
    received = b""
    while len(received) < 40000:
        received += pair.peer.recv(65536)
    assert received == b"pong" * 10000
    pair.tls.close()
    assert pair.peer.recv(1) == b""
