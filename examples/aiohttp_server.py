"""aiohttp over kernel TLS: its FileResponse sends by sendfile(2). This directory's files.

usage: python aiohttp_server.py PORT CHAIN.pem KEY.pem     PORT 0: a free one
"""

import ssl
import sys
from pathlib import Path

from aiohttp import web

import ktls.aio

port, chain, key = sys.argv[1:]
context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
context.load_cert_chain(chain, key)


async def get(request: web.Request) -> web.FileResponse:
    """Sends a file."""
    return web.FileResponse(Path(Path(request.path).name))


app = web.Application()
app.add_routes([web.get("/{name}", get)])
loop = ktls.aio.EventLoop()
web.run_app(app, host="127.0.0.1", port=int(port), ssl_context=context, loop=loop)
