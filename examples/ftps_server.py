"""pyftpdlib's FTPS server with its data connections in the kernel; files go by sendfile.

usage: python ftps_server.py PORT CHAIN.pem KEY.pem DIRECTORY     PORT 0: a free one
"""

import sys
from typing import Any

from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import DTPHandler, TLS_DTPHandler, TLS_FTPHandler
from pyftpdlib.servers import FTPServer

import ktls


class Data(TLS_DTPHandler):  # type: ignore[misc]
    """The steps of TLS_DTPHandler that know pyOpenSSL, on a `ktls.Socket`."""

    socket: Any
    _ssl_closing: bool

    def secure_connection(self, ssl_context: Any) -> None:
        self._ssl_requested = self._ssl_accepting = True
        self.socket = ktls.wrap(
            self.socket, ssl_context, server_side=True, do_handshake_on_connect=False
        )

    def _do_ssl_handshake(self) -> None:
        try:
            self.socket.do_handshake()
        except ktls.WouldBlockError:
            self._ssl_want_write = self.socket.handshake_wants_write
            self._ssl_want_read = not self._ssl_want_write
        except ktls.HandshakeError:
            self.handle_failed_ssl_handshake()
        else:
            self._ssl_accepting, self._ssl_established = False, True
            self.log(f"TX {self.socket.tx}")

    def initiate_send(self) -> None:
        if not self._ssl_accepting:
            super().initiate_send()

    def initiate_sendfile(self) -> None:
        if not self._ssl_requested:
            super().initiate_sendfile()
        elif not self._ssl_accepting and not self._ssl_closing:
            try:
                sent = self.socket.sendfile(self.file_obj, self._offset, self.ac_out_buffer_size)
            except ktls.WouldBlockError as error:
                sent = error.sent
            except ConnectionError:
                self.handle_close()
                return
            else:
                if not sent:  # the end of the file
                    self.discard_buffers()
                    self.handle_close()
            self._offset += sent
            self.tot_bytes_sent += sent

    def _do_ssl_shutdown(self) -> None:
        if not self._ssl_closing:  # once: the descriptor's number may be another's by the next time
            self._ssl_closing = True
            self.del_channel()
            self._finish()

    def _finish(self) -> None:
        if self.socket.try_close() is None:
            DTPHandler.close(self)
        else:
            self.ioloop.call_later(0.01, self._finish)


class Control(TLS_FTPHandler):  # type: ignore[misc]
    """Commands and answers, small as they are, stay with pyOpenSSL."""

    dtp_handler = Data
    tls_control_required = tls_data_required = True
    authorizer = DummyAuthorizer()


port, Control.certfile, Control.keyfile, directory = sys.argv[1:]
ktls.prepare(Control.get_ssl_context())  # before the first control connection
Control.authorizer.add_anonymous(directory, perm="elradfmwMT")
with FTPServer(("127.0.0.1", int(port)), Control) as server:
    print("ftp://localhost:%d/" % server.address[1], flush=True)  # noqa: UP031
    server.serve_forever()
