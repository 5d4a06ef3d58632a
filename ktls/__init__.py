"""Kernel TLS for Python: ``sendfile(2)`` over HTTPS with the OpenSSL that you already have.

::

    from OpenSSL import SSL
    import ktls

    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.use_certificate_chain_file("cert.pem")
    context.use_privatekey_file("key.pem")

    with ktls.wrap(sock, context, server_side=True) as tls:
        with open(path, "rb") as file:
            tls.sendfile(file)
        print(tls.tx)  # "software", or "userspace" and the reason

`wrap` does the handshake with the context's library, pyOpenSSL or ``ssl``, proves the keys, hands
them to the kernel and returns a `Socket`. `extract_keys` and `enable` are its two halves for a
connection that is driven elsewhere. `probe` tells what this kernel can do. All errors are
`KTLSError`: the tree is in `ktls.errors`.
"""

from .detaching import ConnectionState
from .diag import ConnectionInfo, info, stats
from .errors import (
    AlertReceived,
    AlgorithmUnavailableError,
    AlreadyEnabledError,
    ClosedForWritingError,
    ConnectionLostError,
    DecryptError,
    DetachedError,
    HandOverError,
    HandshakeCutOffError,
    HandshakeError,
    HandshakeNotDoneError,
    KernelUnavailableError,
    KeyLimitError,
    KeyMaterialError,
    KTLSError,
    NotInKernelError,
    OffloadError,
    RecordError,
    RekeyUnsupportedError,
    SocketError,
    StalledError,
    TruncationError,
    UnprovenSequenceError,
    UnreadDataError,
    UnsupportedConnectionError,
    WouldBlockError,
)
from .offload import enable
from .probe import Capability, Probe, probe
from .pyopenssl import extract_keys
from .socket import Socket
from .types import (
    MAX_PAYLOAD,
    Alert,
    Cipher,
    CryptoInfo,
    Mode,
    Offload,
    Reason,
    RecordType,
    TrafficKeys,
    Version,
)
from .wrapping import prepare, wrap

__all__ = [
    "MAX_PAYLOAD",
    "Alert",
    "AlertReceived",
    "AlgorithmUnavailableError",
    "AlreadyEnabledError",
    "Capability",
    "Cipher",
    "ClosedForWritingError",
    "ConnectionInfo",
    "ConnectionLostError",
    "ConnectionState",
    "CryptoInfo",
    "DecryptError",
    "DetachedError",
    "HandOverError",
    "HandshakeCutOffError",
    "HandshakeError",
    "HandshakeNotDoneError",
    "KTLSError",
    "KernelUnavailableError",
    "KeyLimitError",
    "KeyMaterialError",
    "Mode",
    "NotInKernelError",
    "Offload",
    "OffloadError",
    "Probe",
    "Reason",
    "RecordError",
    "RecordType",
    "RekeyUnsupportedError",
    "Socket",
    "SocketError",
    "StalledError",
    "TrafficKeys",
    "TruncationError",
    "UnprovenSequenceError",
    "UnreadDataError",
    "UnsupportedConnectionError",
    "Version",
    "WouldBlockError",
    "enable",
    "extract_keys",
    "info",
    "prepare",
    "probe",
    "stats",
    "wrap",
]
