"""`wrap`: from a TCP connection and a context to a `Socket`."""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Callable
from typing import Any

from OpenSSL import SSL

from . import offload, pyopenssl, stdlib
from .engine import Engine
from .errors import HandshakeError, OffloadError, SocketError
from .handover import Options
from .handshake import Handshake
from .socket import Socket
from .types import MAX_PAYLOAD, MIN_FRAGMENT, Mode

_LEAST_RECORD_LIMIT = 8  # a KeyUpdate, an alert and the Finished are records, too


def prepare(
    context: SSL.Context | ssl.SSLContext,
    keylog: Callable[[SSL.Connection, bytes], None] | None = None,
) -> None:
    """Makes a context deliver what the hand-over needs; call it before the first connection.

    `wrap` does as much as it needs by itself. Calling it again does nothing.

    A pyOpenSSL context gets a key-log callback and an info callback. Callbacks that it already has
    go on being called.

    An ``ssl`` context gets a ``keylog_filename`` that names memory. A file that it already names
    goes on getting every line, when ktls next has a handshake with this context or at its end.
    Prepare it yourself if it has such a file and other threads use it without ktls (``ssl`` closes
    the old file under their feet), if an ``sni_callback`` will choose it, and again after setting
    its ``keylog_filename``.

    Args:
        context: Any TLS context.
        keylog: pyOpenSSL only: called with (connection, line) for every key-log line, instead of a
            callback that was set before.

    Raises:
        TypeError: Another context.
        ValueError: pyOpenSSL: the context made a connection already and can't be changed. ``ssl``:
            ``keylog`` was given.
        OSError: ``ssl``: no memory, or the file that it names can't be opened any more.
    """
    if isinstance(context, ssl.SSLContext):
        if keylog is not None:
            raise ValueError("an ssl context has no key-log callback: set its keylog_filename")
        stdlib.prepare(context)
    elif isinstance(context, SSL.Context):
        pyopenssl.prepare(context, keylog)
    else:
        raise _unknown(context)


def wrap(
    sock: socket.socket,
    context: SSL.Context | ssl.SSLContext,
    *,
    server_side: bool = False,
    server_hostname: str | None = None,
    check_hostname: bool | None = None,
    session: SSL.Session | ssl.SSLSession | None = None,
    tx: bool = True,
    rx: bool = True,
    require: bool = False,
    do_handshake_on_connect: bool = True,
    suppress_ragged_eofs: bool = True,
    close_timeout: float = 5.0,
    record_limit: int | None = None,
    max_send_fragment: int = MAX_PAYLOAD,
    expect_no_pad: bool = False,
    zerocopy: bool = False,
) -> Socket:
    """Runs TLS over a connected TCP socket and puts its records into the kernel.

    Where the kernel can't, the same object goes on in userspace; its ``tx`` and ``rx`` tell, with
    the reason.

    Args:
        sock: Connected. On return it is detached: the new socket owns the connection, with the same
            timeout. If the arguments are refused it is left as it was; if the handshake fails it is
            closed.
        context: Of pyOpenSSL or ``ssl``. It is prepared for the hand-over as far as needed: see
            `ktls.prepare`; a pyOpenSSL context can be until its first connection.
        server_side: Accept a handshake rather than begin one.
        server_hostname: The server's name, for server_name (RFC 6066) and the check below.
        check_hostname: For a client whose pyOpenSSL context verifies the peer: also check that the
            certificate is for ``server_hostname``, which pyOpenSSL itself doesn't do. None means
            True. An ``ssl`` context has its own ``check_hostname``, and this may only agree.
        session: A session to resume, from `Socket.get_session` with this context.
        tx: Whether to put sending into the kernel.
        rx: Whether to put receiving into the kernel.
        require: Raise rather than go on in userspace.
        do_handshake_on_connect: Whether to complete the handshake here. With False, call
            `Socket.do_handshake`; a non-blocking socket must.
        suppress_ragged_eofs: Read a FIN without close_notify as an end rather than an error.
        close_timeout: How long closing may take to get out what was sent before, in seconds.
        record_limit: Update the sending key after so many records, 8 at the least, rather than at
            the limit of RFC 8446 section 5.5.
        max_send_fragment: Most plaintext bytes in a record sent, 64 to `MAX_PAYLOAD`: a reader has
            the first byte sooner, the whole takes longer. A kernel that makes full records only
            leaves TX in userspace (FRAGMENT_LIMIT), as it does for a peer that negotiated less.
        expect_no_pad: Tell the kernel that TLS 1.3 records come without padding, which spares it a
            copy; one with padding then costs more, but nothing goes wrong (a peer that pads all of
            them can make this end work twice). It isn't done on kernels that get padding wrong
            then (Linux 6.1 does): `Socket.info` tells whether it is in effect.
        zerocopy: Let a network card that does TLS read a file's pages when it sends them, rather
            than copy them before. Dangerous: a file that is changed while it is sent gives records
            that don't authenticate, and the connection breaks; retransmitted bytes may differ from
            those sent first. Without such a card it has no effect.

    Returns:
        The TLS socket.

    Raises:
        ValueError: Arguments that don't go together.
        TypeError: Another context.
        SocketError: Not a connected TCP socket, or one that has TLS already.
        UnsupportedConnectionError: A context for DTLS.
        HandshakeError: The handshake failed.
        StalledError: It took longer than the socket's timeout.
        OffloadError: ``require`` was set and the kernel refused: KernelUnavailableError before
            anything was sent.
        HandOverError: ``require`` was set and the connection can't be handed over.
    """
    if not MIN_FRAGMENT <= max_send_fragment <= MAX_PAYLOAD:
        raise ValueError(f"max_send_fragment must be {MIN_FRAGMENT} to {MAX_PAYLOAD} bytes")
    if record_limit is not None and record_limit < _LEAST_RECORD_LIMIT:
        raise ValueError(f"record_limit must be {_LEAST_RECORD_LIMIT} at the least")
    offload.check_socket(sock)
    if hasattr(sock, "selected_alpn_protocol"):
        raise _has_tls()
    if do_handshake_on_connect and sock.gettimeout() == 0:
        raise ValueError("a non-blocking socket needs do_handshake_on_connect=False")
    engine = _create_engine(
        context,
        server_side=server_side,
        server_hostname=server_hostname,
        check_hostname=check_hostname,
        session=session,
    )
    in_kernel, attached = offload.IN_KERNEL, False
    if tx or rx:
        try:
            attached = offload.attach(sock) if require else offload.try_attach(sock)
        except OffloadError as error:
            if require:
                raise
            in_kernel = offload.refused(error)
    if not attached and offload.has_any_keys(sock):
        raise _has_tls()
    if (tx or rx) and in_kernel.mode is Mode.SOFTWARE:
        engine.want_secrets()
    try:
        handshake = Handshake(engine)
    except HandshakeError:
        sock.close()
        raise
    tls = Socket(
        sock,
        engine,
        handshake,
        tx=in_kernel if tx else offload.NOT_WANTED,
        rx=in_kernel if rx else offload.NOT_WANTED,
        require=require,
        suppress_ragged_eofs=suppress_ragged_eofs,
        close_timeout=close_timeout,
        options=Options(record_limit, max_send_fragment, expect_no_pad, zerocopy),
    )
    if do_handshake_on_connect:
        try:
            tls.do_handshake()
        except BaseException:
            tls.close()
            raise
    return tls


def _create_engine(context: object, **arguments: Any) -> Engine:  # noqa: ANN401
    """The engine for a context, by its library."""
    if isinstance(context, ssl.SSLContext):
        return stdlib.Engine.create(context, **arguments)
    if isinstance(context, SSL.Context):
        return pyopenssl.Engine.create(context, **arguments)
    raise _unknown(context)


def _has_tls() -> SocketError:
    return SocketError(errno.EISCONN, "the socket has TLS already: pass a plain TCP socket")


def _unknown(context: object) -> TypeError:
    return TypeError(f"neither OpenSSL.SSL.Context nor ssl.SSLContext: {type(context).__name__}")
