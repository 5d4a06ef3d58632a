"""What can go wrong, by the stage that it goes wrong in.

::

    KTLSError                               every error of this package
    |-- SocketError (OSError)               not a connected TCP socket; it is left as it was
    |-- KeyMaterialError (ValueError)       keys of a wrong size, an unknown cipher or version
    |-- HandOverError                       the connection can't be handed to the kernel
    |   |-- HandshakeNotDoneError           its handshake isn't complete
    |   |-- UnsupportedConnectionError      version or cipher suite that kernel TLS doesn't have
    |   `-- UnprovenSequenceError           keys or sequence numbers that no record proves
    |-- OffloadError (OSError)              the kernel refused; ``reason`` says why
    |   |-- KernelUnavailableError          no kernel TLS on this machine
    |   |-- AlgorithmUnavailableError       kernel TLS, but not this algorithm
    |   `-- AlreadyEnabledError             another ULP, or keys that can't be replaced
    |-- NotInKernelError (RuntimeError)     only the kernel can do that, and it isn't in charge
    |-- HandshakeError (ConnectionError)    the handshake failed; the socket is closed
    |   `-- HandshakeCutOffError (ConnectionResetError)
    |                                       because the peer, or the network, went away
    |-- AlertReceived (ConnectionError, SSLError)
    |                                       the peer sent a fatal alert
    |-- RecordError (ConnectionError, SSLError)
    |   |                                   the peer sent what TLS forbids; the alert went out
    |   `-- DecryptError                    a record that doesn't authenticate
    |-- RekeyUnsupportedError (ConnectionError)
    |                                       a KeyUpdate, and keys that can't be replaced
    |-- KeyLimitError (ConnectionError)     the key has protected as many records as it may
    |-- DetachedError (RuntimeError)        the connection went on in another process
    |-- UnreadDataError                     unwrap() while the peer is still sending
    |-- TruncationError (ConnectionError)   TCP ended without close_notify
    |-- ClosedForWritingError (BrokenPipeError)
    |                                       a write after close_notify or SHUT_WR
    |-- ConnectionLostError (ConnectionResetError)
    |                                       the peer is gone; ``sent`` bytes had gone out
    |-- WouldBlockError (BlockingIOError)   a non-blocking socket isn't ready; ``sent`` bytes went
    `-- StalledError (TimeoutError)         the socket's timeout ran out; ``sent`` bytes went out

No error's text, arguments or attributes ever hold a key, a secret or plaintext.
"""

from __future__ import annotations

import errno
import ssl
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .types import Alert, Reason


class KTLSError(Exception):
    """Base class of all errors that this package raises on its own account.

    They can be copied and pickled: an error that ends a connection is raised anew by every later
    call, without the frames (and the data in them) of the first.

    Attributes:
        sent: How many bytes of the caller's data the failed call had sent before.
    """

    sent: int = 0
    _made_of: tuple[object, ...] | None = None

    def __reduce__(self) -> tuple[type[KTLSError], tuple[object, ...]]:
        """The class, and the arguments that it was made of."""
        return type(self), self.args if self._made_of is None else self._made_of


class SocketError(KTLSError, OSError):
    """The socket isn't a connected TCP socket. It is left as it was."""


class KeyMaterialError(KTLSError, ValueError):
    """Key material of a wrong size, or for a cipher or version that doesn't exist here."""


class HandOverError(KTLSError):
    """The connection can't be handed to the kernel.

    Attributes:
        reason: The same as a `Reason`.
    """

    def __init__(self, text: str, reason: Reason) -> None:
        """Takes what to tell the user, and the reason."""
        super().__init__(text)
        self.reason = reason
        self._made_of = (text, reason)


class HandshakeNotDoneError(HandOverError):
    """The handshake isn't complete."""


class UnsupportedConnectionError(HandOverError):
    """Kernel TLS has no such protocol version or cipher suite."""


class UnprovenSequenceError(HandOverError):
    """The keys or sequence numbers can't be proved by a record, so they aren't used.

    A wrong sequence number is a dead connection or, worse, a nonce used twice.
    """


class OffloadError(KTLSError, OSError):
    """The kernel refused kernel TLS for this socket.

    Attributes:
        errno: Of the system call.
        reason: What it means.
    """

    def __init__(self, number: int, text: str, reason: Reason) -> None:
        """Takes the errno, the text for the user and the reason."""
        super().__init__(number, text)
        self.reason = reason
        self._made_of = (number, text, reason)


class KernelUnavailableError(OffloadError):
    """This machine's kernel has no TLS, or doesn't let this process load it."""


class AlgorithmUnavailableError(OffloadError):
    """The kernel has TLS, but not this cipher, version or direction."""


class AlreadyEnabledError(OffloadError):
    """The socket has another ULP, or has keys that this kernel can't replace."""


class NotInKernelError(KTLSError, RuntimeError):
    """Only kernel TLS can do that, and this direction isn't in the kernel: see ``tx``, ``rx``."""


class HandshakeError(KTLSError, ConnectionError):
    """The TLS handshake failed. The socket is closed, OpenSSL's alert was sent."""


class HandshakeCutOffError(HandshakeError, ConnectionResetError):
    """The connection ended before the handshake did."""


class AlertReceived(KTLSError, ConnectionError, ssl.SSLError):  # noqa: N818 - the protocol's wording
    """The peer ended the connection with a fatal alert.

    Attributes:
        description: Which (RFC 8446 section 6.2), or the bare number of an unknown one.
        library: "SSL", as ``ssl`` has it.
        reason: The alert's name, in capitals.
    """

    __str__ = OSError.__str__  # SSLError's wants an errno

    def __init__(self, description: Alert | int) -> None:
        """Takes the alert's description."""
        name = getattr(description, "name", "").lower() or f"number {int(description)}"
        super().__init__(f"the peer sent a fatal alert: {name}")
        self.description = description
        self.library, self.reason = "SSL", f"ALERT_{name.upper()}"
        self._made_of = (description,)


class RecordError(KTLSError, ConnectionError, ssl.SSLError):
    """The peer sent what TLS forbids.

    Attributes:
        alert: The alert that was sent, as far as the peer could still be reached.
        library: "SSL", as ``ssl`` has it.
        reason: The alert's name, in capitals.
    """

    __str__ = OSError.__str__  # SSLError's wants an errno

    def __init__(self, text: str, alert: Alert) -> None:
        """Takes the text and the alert that answers it."""
        super().__init__(f"{text} ({alert.name.lower()})")
        self.alert = alert
        self.library, self.reason = "SSL", alert.name
        self._made_of = (text, alert)


class DecryptError(RecordError):
    """A record didn't authenticate: it was changed, replayed, or made with other keys."""


class RekeyUnsupportedError(KTLSError, ConnectionError):
    """The keys are to be updated, and can't be here.

    Linux can replace keys from 6.14 on. Or the connection came from another process, and without
    the secret that the next keys are made of.
    """

    def __init__(self, text: str | None = None) -> None:
        """Takes the reason, if it isn't the kernel."""
        super().__init__(
            text
            or "a TLS 1.3 KeyUpdate needs a kernel that can replace keys (Linux 6.14 or later): "
            "connect again, or keep this peer's connections in userspace (tx=False, rx=False)"
        )


class KeyLimitError(KTLSError, ConnectionError):
    """The key has protected as many records as it may (RFC 8446 section 5.5): connect again."""


class DetachedError(KTLSError, RuntimeError):
    """The connection went on in another process, or may: `Socket.detach_state` was called."""


class UnreadDataError(KTLSError):
    """The peer sent data that nobody has read; it is still there."""


class TruncationError(KTLSError, ConnectionError):
    """TCP ended without close_notify: what came before may be cut short."""


class ClosedForWritingError(KTLSError, BrokenPipeError):
    """Nothing can be sent any more: after close_notify or SHUT_WR."""

    def __init__(self, text: str) -> None:
        """Takes the text; errno is EPIPE."""
        super().__init__(errno.EPIPE, text)
        self._made_of = (text,)


class ConnectionLostError(KTLSError, ConnectionResetError):
    """The peer reset the connection or is gone.

    Attributes:
        sent: How many bytes of the caller's data the kernel had taken before. The peer may
            have received fewer.
    """

    def __init__(self, number: int, text: str, sent: int = 0) -> None:
        """Takes the errno and text of the failed call, and how much it had sent."""
        super().__init__(number, text)
        self.sent = sent
        self._made_of = (number, text, sent)


class WouldBlockError(KTLSError, BlockingIOError):
    """The operation on a non-blocking socket can't complete now.

    Attributes:
        sent: How many bytes of the caller's data went out, also as ``characters_written``.
        received: How many bytes `Socket.recvfile` has put into its file.
    """

    def __init__(self, call: str, sent: int = 0, received: int = 0) -> None:
        """Takes the name of the call, and how much it had done."""
        super().__init__(errno.EAGAIN, f"{call}: would block")
        self.sent = self.characters_written = sent
        self.received = received
        self._made_of = (call, sent, received)


class StalledError(KTLSError, TimeoutError):
    """The socket's timeout ran out.

    Attributes:
        sent: How many bytes of the caller's data went out before.
        received: How many bytes `Socket.recvfile` has put into its file.
    """

    def __init__(self, call: str, sent: int = 0, received: int = 0) -> None:
        """Takes the name of the call, and how much it had done."""
        super().__init__(errno.ETIMEDOUT, f"{call}: timed out")
        self.sent = sent
        self.received = received
        self._made_of = (call, sent, received)
