"""Where in TCP's stream the records end that the kernel has taken.

A send that a full socket stops leaves whole records inside net/tls (its ``tx_list``): encrypted,
and reported as sent. They go out by themselves when there is room (``tls_sw_write_space``), but
SIOCOUTQ doesn't count them, no call tells of them, and SHUT_WR or ``close`` cuts them off. So what
the stream must have come to is calculated, from the bytes that the kernel took and from its own
number of records.
"""

from __future__ import annotations

import socket

from . import _ktls, tcp
from .keychain import KeyChain


class Tally:
    """Of one connection whose TX has keys."""

    def __init__(
        self, sock: socket.socket, chain: KeyChain, rec_seq: int | None, position: int | None
    ) -> None:
        """Starts between two records.

        Args:
            sock: Nobody sends on it meanwhile.
            chain: Of the keys that the kernel has.
            rec_seq: Of the next record; None where the kernel is to tell.
            position: Where the last record ends, as `end` of another process tells it; None where
                all is in TCP's hands.
        """
        self._sock = sock
        self._overhead = chain.overhead
        self._position = tcp.written(sock) if position is None else position
        self._counted = self._updated = self._rec_seq() if rec_seq is None else rec_seq

    def end(self, payload: int) -> int:
        """Where the last record ends, while none is open.

        Args:
            payload: All bytes that the kernel took to make records of.

        Returns:
            A number of bytes since the TCP connection began.
        """
        return self._position + payload + self._overhead * (self._rec_seq() - self._counted)

    def before_update(self) -> None:
        """A KeyUpdate is next, and no record is open."""
        self._updated = self._rec_seq() + 1

    def updated(self) -> None:
        """It was sent, and the kernel counts from 0 again."""
        self._position += self._overhead * (self._updated - self._counted)
        self._counted = self._updated = 0  # again, it would add nothing

    def _rec_seq(self) -> int:
        *_, rec_seq = _ktls.query(self._sock.fileno(), _ktls.TX)
        return int.from_bytes(rec_seq, "big")
