"""A WSGI server on threads (wsgiref), whose files go by sendfile through kernel TLS.

usage: python wsgi_server.py PORT CHAIN.pem KEY.pem FILE     PORT 0: a free one
"""

import os
import ssl
import sys
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref import simple_server

import ktls

port, chain, key, path = sys.argv[1:]
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(chain, key)


class Handler(simple_server.ServerHandler):
    """wsgiref's own hook for files that the application wrapped (PEP 3333)."""

    def sendfile(self) -> bool:
        self.send_headers()
        self.request_handler.connection.sendfile(self.result.filelike)  # type: ignore
        return True


class Server(ThreadingMixIn, simple_server.WSGIServer):
    """Does each connection's TLS in that connection's own thread."""

    def finish_request(self, request: Any, client_address: Any) -> None:
        with ktls.wrap(request, context, server_side=True) as tls:
            super().finish_request(tls, client_address)


def app(environ: Any, start_response: Any) -> Any:
    """Sends the file."""
    start_response("200 OK", [("Content-Length", str(os.path.getsize(path)))])
    return environ["wsgi.file_wrapper"](open(path, "rb"))


simple_server.ServerHandler = Handler  # type: ignore
with simple_server.make_server("127.0.0.1", int(port), app, Server) as server:
    server.base_environ["HTTPS"] = "on"
    print(f"https://localhost:{server.server_port}/", flush=True)
    server.serve_forever()
