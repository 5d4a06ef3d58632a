"""HTTPS on the standard library's http.server, with files sent by sendfile through kernel TLS.

usage: python https_server.py PORT CHAIN.pem KEY.pem     PORT 0: a free one
"""

import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from OpenSSL import SSL

import ktls

port, chain, key = sys.argv[1:]
context = SSL.Context(SSL.TLS_SERVER_METHOD)
context.use_certificate_chain_file(chain)
context.use_privatekey_file(key)


class Handler(SimpleHTTPRequestHandler):
    """Sends files by sendfile, and logs how the connection is encrypted."""

    def copyfile(self, source: Any, outputfile: Any) -> None:
        self.connection.sendfile(source)
        tls: Any = self.connection
        self.log_message("%s %s, TX %s, RX %s", tls.version(), tls.cipher()[0], tls.tx, tls.rx)


class Server(ThreadingHTTPServer):
    """Does each connection's TLS in that connection's own thread."""

    def finish_request(self, request: Any, client_address: Any) -> None:
        with ktls.wrap(request, context, server_side=True) as tls:
            super().finish_request(tls, client_address)


with Server(("127.0.0.1", int(port)), Handler) as server:
    print(f"https://localhost:{server.server_port}/", flush=True)
    server.serve_forever()
