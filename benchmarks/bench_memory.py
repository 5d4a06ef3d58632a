"""What a server's process keeps in memory for each connection that is idle."""

from __future__ import annotations

import re
import socket
from contextlib import ExitStack
from pathlib import Path

from .contenders import Server, running, workplace
from .measure import Bench, Contender, Settings, Unit
from .results import Row

_WARM_UP, _MOST = 100, 100  # connections; the first ones make the heap grow, which is then reused


class Memory(Bench):
    """Figures that are no times: how much the process grows by connections that it keeps."""

    def run(self, settings: Settings) -> list[Row]:
        """See `Bench.run`; each pass has its own connections, which add up."""
        chosen, count = self.chosen(settings), min(settings.most, _MOST)
        names = dict.fromkeys(one.server for one in chosen)
        with workplace(()) as directory, running(names, directory) as servers, ExitStack() as stack:
            figures: dict[Contender, list[float]] = {one: [] for one in chosen}
            for one in chosen:
                _connect(servers[one.server], one.operation, _WARM_UP, stack)
            for _ in range(settings.runs):
                for one in chosen:
                    server = servers[one.server]
                    before = _anonymous_kib(server)
                    _connect(server, one.operation, count, stack)
                    figures[one].append((_anonymous_kib(server) - before) / count)
        return [
            Row(self.name, one.label, count, self.unit.name, figures[one], False) for one in chosen
        ]


def _connect(server: Server, operation: str, count: int, stack: ExitStack) -> None:
    for _ in range(count):
        link = server.connect(operation)
        stack.enter_context(link.sock)
        link.request(server.request(operation, 1, 0))
        link.sock.recv(1, socket.MSG_PEEK)  # the server has put it away


def _anonymous_kib(server: Server) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text(encoding="ascii")
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1])


BENCH = Memory(
    name="memory",
    title="Memory of a server's process for an idle connection, by the connections of a pass",
    ours="ktls.wrap",
    contenders=(
        Contender("ktls.wrap", "ktls", "idle"),
        Contender("ktls.wrap, then release()", "ktls-released", "released"),
        Contender("ktls.wrap, no direction in the kernel", "ktls-userspace", "idle"),
        Contender("SSLContext.wrap_socket", "stdlib", "idle"),
        Contender("pyOpenSSL on the socket", "pyopenssl", "idle"),
    ),
    sizes=(),
    unit=Unit("KiB", lambda kib, _size: kib, more_is_better=False),
)
