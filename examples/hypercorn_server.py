"""hypercorn over kernel TLS, HTTP/2 included. The ASGI application of uvicorn_server.py.

usage: python hypercorn_server.py PORT CHAIN.pem KEY.pem     PORT 0: a free one
"""

import sys

from hypercorn.asyncio import serve
from hypercorn.config import Config
from uvicorn_server import app

import ktls.aio

port, chain, key = sys.argv[1:]
config = Config()
config.bind = [f"127.0.0.1:{port}"]
config.certfile, config.keyfile = chain, key

loop = ktls.aio.EventLoop()
loop.run_until_complete(serve(app, config))
loop.close()
