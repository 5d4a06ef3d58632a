"""uvicorn over kernel TLS: a Starlette application whose FileResponse is sendfile(2).

usage: python uvicorn_server.py PORT CHAIN.pem KEY.pem     PORT 0: a free one
"""

import asyncio
import os
import sys
from contextlib import suppress
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

app: Any = Starlette(routes=[Mount("/", StaticFiles(directory="."))])  # this directory's files


async def with_pathsend(scope: Any, receive: Any, send: Any) -> None:
    """The hook: ASGI's pathsend, which uvicorn hasn't got, on a connection's transport."""

    async def send_path(event: Any) -> None:
        if event["type"] != "http.response.pathsend":
            await send(event)
            return
        connection = send.__self__
        with open(event["path"], "rb") as file:
            size = range(os.fstat(file.fileno()).st_size)  # all that h11 asks for is the length
            connection.conn.send_with_data_passthrough(h11.Data(data=size))  # type: ignore[arg-type]
            sent, loop = 0, asyncio.get_running_loop()
            with suppress(ConnectionError):  # the client went away: uvicorn knows, too
                if size:
                    sent = await loop.sendfile(connection.transport, file, 0, len(size))
        if sent < len(size):  # cut short meanwhile: what comes next would be taken for the rest
            connection.transport.abort()
        await send({"type": "http.response.body"})

    if scope["type"] == "http":
        scope["extensions"] = {**scope.get("extensions", {}), "http.response.pathsend": {}}
    await app(scope, receive, send_path)


if __name__ == "__main__":
    port, chain, key = sys.argv[1:]
    files: Any = {"ssl_certfile": chain, "ssl_keyfile": key}
    uvicorn.run(with_pathsend, port=int(port), http="h11", loop="ktls.aio:EventLoop", **files)
