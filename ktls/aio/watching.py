"""When a connection is readable.

Linux 6.1 says that a kernel TLS socket is readable as long as a part of a record is there: a
level-triggered loop would spin until the rest comes, so after reads in vain the loop watches an
edge-triggered epoll instead.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable

_VAIN_READS = 2


class ReadWatch:
    """Calls back while a socket is readable, on a loop; quietly where a record is incomplete.

    Attributes:
        in_vain: How often in a row nothing could be received although it was readable.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, descriptor: int, callback: Callable[[], object]
    ) -> None:
        """Is not watching yet."""
        self._loop = loop
        self._descriptor = descriptor
        self._callback = callback
        self._edges: select.epoll | None = None
        self.in_vain = 0
        self._active = False

    def start(self) -> None:
        """Watches."""
        if not self._active:
            self._active = True
            self._loop.add_reader(self._descriptor, self._callback)

    def stop(self) -> None:
        """Doesn't watch any more, until `start`."""
        if self._active:
            self._active = False
            self._drop_edges()
            self._loop.remove_reader(self._descriptor)

    def read_in_vain(self) -> None:
        """The socket was readable, and yet nothing could be received."""
        self.in_vain += 1
        if self.in_vain >= _VAIN_READS and self._active and self._edges is None:
            try:
                edges = select.epoll(1)
            except OSError:
                return  # no descriptor is left: rather in vain than not at all
            try:
                edges.register(
                    self._descriptor, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
                )
            except OSError:
                edges.close()
                return
            self._edges = edges
            self._loop.remove_reader(self._descriptor)
            self._loop.add_reader(self._edges.fileno(), self._edge)

    def read_something(self) -> None:
        """Something was received."""
        self.in_vain = 0
        if self._edges is not None:
            self._drop_edges()
            self._loop.add_reader(self._descriptor, self._callback)

    def _edge(self) -> None:
        if self._edges is not None and self._edges.poll(0):
            self._callback()

    def forget(self) -> None:
        """The end: the owner is let go of, so that no cycle is left for the garbage collector."""
        self.stop()
        del self._callback

    def _drop_edges(self) -> None:
        self.in_vain = 0
        if self._edges is not None:
            self._loop.remove_reader(self._edges.fileno())
            self._edges.close()
            self._edges = None
