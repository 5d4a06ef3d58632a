"""An asyncio server under test: `python -m benchmarks.aio_server CONTENDER LISTENING_FD DIRECTORY`.

A connection makes requests one after another, each ``OPERATION COUNT SIZE`` in 64 bytes, whose
COUNT is 1: ``file`` is answered by the loop's ``sendfile``, ``data`` by the transport's ``write``.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import socket
import ssl
import sys
from pathlib import Path
from typing import cast

import ktls.aio

from .peer import READY, REQUEST_SIZE
from .server import OP_ENABLE_KTLS, in_memory

Loop = asyncio.AbstractEventLoop


def loop_of(contender: str) -> Loop:
    """Makes the contender's loop; only its own module has to be there."""
    if contender == "aio-ktls":
        return ktls.aio.EventLoop()
    if contender == "aio-stdlib":
        return asyncio.new_event_loop()
    made: Loop
    if contender == "aio-uvloop":
        made = importlib.import_module("uvloop").new_event_loop()
    else:
        made = importlib.import_module("aiofastnet").loop_factory()()
    return made


class Answering(asyncio.Protocol):
    """One connection."""

    def __init__(self, directory: Path) -> None:
        """Its files are there."""
        self._directory = directory
        self._request = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Says that the handshake is over."""
        self._transport = cast("asyncio.Transport", transport)  # not all loops' are subclasses
        self._transport.write(READY)

    def data_received(self, data: bytes) -> None:
        """Answers a request once all of it is there; the next one comes only after the answer."""
        self._request += data
        if len(self._request) < REQUEST_SIZE:
            return
        operation, _, size = self._request.decode().split()
        self._request = b""
        name = self._directory / size
        if operation == "data":
            self._transport.write(in_memory(str(name), int(size)))
        else:
            self._sending = asyncio.ensure_future(self._send(name, int(size)))

    async def _send(self, name: Path, size: int) -> None:
        with name.open("rb") as file:
            try:
                await asyncio.get_running_loop().sendfile(self._transport, file, 0, size)
            except NotImplementedError:  # over TLS uvloop has none: what aiohttp does then
                while part := file.read(1 << 18):
                    self._transport.write(part)


async def serve(contender: str, listener: socket.socket, directory: Path) -> None:
    """Accepts until it is killed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "chain.pem", directory / "key.pem")
    if contender.endswith("-fastnet-ktls"):
        context.options |= OP_ENABLE_KTLS
    server = await asyncio.get_running_loop().create_server(
        lambda: Answering(directory), sock=listener, ssl=context, backlog=256
    )
    await server.serve_forever()


def main(contender: str, listening: str, directory: str) -> None:
    """Runs the contender's loop."""
    logging.disable()  # whoever looks whether this listens makes no handshake
    if not hasattr(ssl, "OP_ENABLE_KTLS"):  # before Python 3.12; aiofastnet asks for it by name
        vars(ssl)["OP_ENABLE_KTLS"] = OP_ENABLE_KTLS
    loop = loop_of(contender)
    listener = socket.socket(fileno=int(listening))
    loop.run_until_complete(serve(contender, listener, Path(directory)))


if __name__ == "__main__":
    main(*sys.argv[1:])
