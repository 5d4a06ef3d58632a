"""uvicorn over kernel TLS. An ASGI application that sends this directory's files.

usage: python uvicorn_server.py PORT CHAIN.pem KEY.pem     PORT 0: a free one
"""

import os
import sys
from typing import Any

import uvicorn


async def app(scope: Any, _receive: Any, send: Any) -> None:
    """Sends a file; ASGI wants it in pieces, so they pass through this process."""
    with open(os.path.basename(scope["path"]), "rb") as file:
        length = str(os.fstat(file.fileno()).st_size).encode()
        headers = [(b"content-length", length)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while piece := file.read(1 << 18):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body"})


if __name__ == "__main__":
    port, chain, key = sys.argv[1:]
    loop = "ktls.aio:EventLoop"
    uvicorn.run(app, port=int(port), ssl_certfile=chain, ssl_keyfile=key, loop=loop)
