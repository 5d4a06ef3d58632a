"""`wrap`: from a TCP connection and a context to a `Socket`."""

from __future__ import annotations

import errno
import socket

from OpenSSL import SSL

from . import offload
from .errors import OffloadError, SocketError
from .handover import Options
from .handshake import Handshake
from .pyopenssl import Engine
from .socket import Socket
from .types import MAX_PAYLOAD, MIN_FRAGMENT

_LEAST_RECORD_LIMIT = 8  # a KeyUpdate, an alert and the Finished are records, too


def wrap(
    sock: socket.socket,
    context: SSL.Context,
    *,
    server_side: bool = False,
    server_hostname: str | None = None,
    check_hostname: bool = True,
    session: SSL.Session | None = None,
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
        context: A pyOpenSSL context. It is given to `ktls.prepare` as far as needed, which works
            until its first connection.
        server_side: Accept a handshake rather than begin one.
        server_hostname: The server's name, for server_name (RFC 6066) and the check below.
        check_hostname: For a client whose context verifies the peer: also check that the
            certificate is for ``server_hostname``, which pyOpenSSL itself doesn't do.
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
    if hasattr(sock, "selected_alpn_protocol") or offload.has_any_keys(sock):
        raise SocketError(errno.EISCONN, "the socket has TLS already: pass a plain TCP socket")
    if do_handshake_on_connect and sock.gettimeout() == 0:
        raise ValueError("a non-blocking socket needs do_handshake_on_connect=False")
    engine = Engine.create(
        context,
        server_side=server_side,
        server_hostname=server_hostname,
        check_hostname=check_hostname,
        session=session,
    )
    in_kernel = offload.IN_KERNEL
    if tx or rx:
        try:
            offload.attach(sock)
        except OffloadError as error:
            if require:
                raise
            in_kernel = offload.refused(error)
    tls = Socket(
        sock,
        engine,
        Handshake(engine),
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
