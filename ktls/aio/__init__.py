"""asyncio: servers, clients, streams and an event loop whose TLS goes through the kernel.

::

    with asyncio.Runner(loop_factory=ktls.aio.EventLoop) as runner:
        runner.run(main())  # every ssl= in it goes through ktls, frameworks included

Or, on any loop, `create_server`, `create_connection`, `start_server`, `open_connection` and
`start_tls` instead of asyncio's, whose arguments they have. Where the kernel can't, connections
stay in userspace with the same semantics: ``get_extra_info("ktls_tx")`` tells why.

These mean more than there:

* ``ssl``: an ``ssl.SSLContext`` or an ``OpenSSL.SSL.Context``.
* ``ktls_options``: `WrapOptions`, as for `ktls.wrap`.

A handshake that fails raises what ``ssl`` raises (``ssl.SSLError``, with an ``ssl`` context) or
`HandshakeError`; one that takes too long ConnectionAbortedError, as with asyncio.
"""

from .client import create_connection, open_connection, start_tls
from .loop import EventLoop
from .server import Server, create_server, start_server
from .settings import WrapOptions
from .transport import Transport

__all__ = [
    "EventLoop",
    "Server",
    "Transport",
    "WrapOptions",
    "create_connection",
    "create_server",
    "open_connection",
    "start_server",
    "start_tls",
]
