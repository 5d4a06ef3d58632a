"""Two threads that send at once against one: whether a lock or the GIL is in the way."""

from __future__ import annotations

from .measure import Bench, Contender, Load, Settings


def _load(threads: int, settings: Settings) -> Load:
    return Load(threads, 4, max(1 << 14, settings.batch))


BENCH = Bench(
    name="threads",
    title="Files sent at once by threads of one process, all together; by their number",
    ours="Socket.sendfile",
    contenders=(
        Contender("C reference", "reference", "sendfile"),
        Contender("Socket.sendfile", "ktls", "sendfile"),
        Contender("Socket.sendall", "ktls", "send"),
        Contender("SSLSocket.sendall", "stdlib", "send"),
    ),
    sizes=(1, 2),
    load=_load,
)
