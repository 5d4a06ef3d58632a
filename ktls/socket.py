"""`Socket`: a `Connection` as a Python socket, whose TLS records the kernel makes if it can.

All that moves data: each method gives the work to the connection's sender or receiver (or, where
there is nothing to think about, to C: ``_ktls.Lane``, ``_ktls.Intake``), and types the errors.
"""

from __future__ import annotations

import copy
import errno
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NoReturn

from typing_extensions import Buffer

from . import _ktls, files, offload, tcp, wait
from .connection import Connection
from .detaching import ConnectionState, DetachedFacts
from .errors import (
    ConnectionLostError,
    KTLSError,
    NotInKernelError,
    OffloadError,
    RekeyUnsupportedError,
    SocketError,
    StalledError,
    TruncationError,
    UnreadDataError,
    WouldBlockError,
)
from .files import ReceivingFile, SendableFile, SinkFull
from .handover import Options, take_on
from .receiving import End, KernelReceiver, Receiver
from .sending import CLOSE_NOTIFY, KernelSender, Sender, file_error
from .types import MAX_PAYLOAD, Alert, AlertLevel, Mode, RecordType, Version

_CHUNK = 1 << 18  # of a file that is sent by reading it
_RESET = "recvmsg: " + os.strerror(errno.ECONNRESET)


class Socket(Connection):
    """A TLS connection. `ktls.wrap` makes one; all that ``socket.socket`` promises holds.

    Its descriptor takes plaintext only while `tx` is in the kernel. Where it isn't, whatever writes
    to ``fileno()`` behind this object's back (``os.sendfile``, an event loop's ``sock_sendfile``)
    puts plain bytes on the wire: use `sendfile`, or ``require=True``.

    Attributes:
        tx: Where sent records are made and, if not in the kernel, why. Final after the handshake.
        rx: The same for received records.
        close_timeout: How long `close`, `shutdown` and `unwrap` may take, in seconds, to get out
            what was sent before them.
    """

    # -- sending -----------------------------------------------------------------------------------

    def send(self, data: Buffer, flags: int = 0) -> int:
        """Sends data, as much as fits: `sendall` sends all of it.

        Args:
            data: Any bytes. In userspace mode, a send that would block must be repeated with at
                least the same data, as with OpenSSL.
            flags: As for ``send(2)``; MSG_MORE keeps the record open (in the kernel only).

        Returns:
            How many bytes of it were sent.

        Raises:
            WouldBlockError: Nothing fits now.
            StalledError: Nothing fitted before the timeout ran out.
            ConnectionLostError: The peer is gone; so say all later calls.
            ClosedForWritingError: After close_notify or SHUT_WR.
        """
        if (lane := self._lane) is not None:
            sent = lane.send(data, flags | wait.MORE if self._corked else flags)
            if sent is not None:
                if sent < 0 or lane.attention:
                    self._after_lane("send", sent)
                return sent
        sender = self._open_sender()
        try:
            return sender.send(data, flags | self._more())
        except OSError as error:
            raise self._send_error("send", error) from None

    def sendall(self, data: Buffer, flags: int = 0) -> None:
        """Sends all data. The timeout bounds each wait for progress.

        Args:
            data: Any bytes.
            flags: As for `send`.

        Raises:
            WouldBlockError: The socket is non-blocking; the error's ``sent`` bytes went out.
            StalledError: As above, after the timeout.
            ConnectionLostError: As above.
            ClosedForWritingError: After close_notify or SHUT_WR.
        """
        sent = 0
        if (lane := self._lane) is not None:
            sent = lane.send(data, flags | wait.MORE if self._corked else flags) or 0
            if sent < 0 or (sent and lane.attention):
                self._after_lane("sendall", sent)
            if sent and sent == (len(data) if isinstance(data, bytes) else memoryview(data).nbytes):
                return
        sender = self._open_sender()
        view = memoryview(data).cast("B")
        try:
            while sent < len(view):
                sent += sender.send(view[sent:], flags | self._more())
        except OSError as error:
            raise self._send_error("sendall", error, sent) from None

    def _after_lane(self, call: str, sent: int) -> None:
        """Raises the lane's error, or sends what came to be owed during its send."""
        if sent < 0:
            raise self._send_error(call, OSError(-sent, os.strerror(-sent)))
        self._retry(call, sent)

    def _retry(self, call: str, sent: int) -> None:
        """Sends what came to be owed during a send by the lane."""
        sender = self._sender
        try:
            if sender is not None:
                sender.retry()
        except OSError as error:
            raise self._send_error(call, error, sent) from None

    def sendmsg(
        self,
        buffers: Iterable[Buffer],
        ancdata: Iterable[tuple[int, int, Buffer]] = (),
        flags: int = 0,
        address: object = None,
    ) -> int:
        """Sends many buffers as one `send`.

        Args:
            buffers: Sent one after the other.
            ancdata: Must be empty: `send_record` sends other records than data.
            flags: As for `send`.
            address: Must be None.

        Returns:
            How many bytes were sent.

        Raises:
            ValueError: Ancillary data or an address.
            KTLSError: As for `send`.
        """
        if list(ancdata) or address is not None:
            raise ValueError("TLS has neither ancillary data (see send_record) nor addresses")
        sender = self._open_sender()
        try:
            return sender.sendmsg(list(buffers), flags | self._more())
        except OSError as error:
            raise self._send_error("sendmsg", error) from None

    @_ktls.by_lane
    def sendfile(self, file: SendableFile, offset: int = 0, count: int | None = None) -> int:
        """Sends a file; in the kernel without a copy through this process (``sendfile(2)``).

        Args:
            file: Open for binary reading. A regular file is sent by its descriptor, anything else
                by reading it.
            offset: Where to begin, in bytes.
            count: How many bytes to send; None means up to the end.

        Returns:
            How many bytes were sent: fewer than ``count`` only if the file is shorter. The file's
            position is after the last one, also when an error is raised.

        Raises:
            ValueError: A text file, a negative offset, a count that isn't positive.
            WouldBlockError: The socket is non-blocking and full; the error's ``sent`` bytes went
                out. Go on at ``offset + sent`` when it is writable. With an SO_SNDBUF below 16 KiB
                try it every so often even if it isn't: Linux 6.1 may not tell.
            StalledError: As above; no byte was sent for the socket's timeout.
            ConnectionLostError: As above; the peer is gone.
            ClosedForWritingError: After close_notify or SHUT_WR.
        """
        sent = self.sendfile_at_once(file, offset, count)
        if sent is not None:
            return sent
        files.check_range(file, offset, count)
        sender = self._open_sender()
        descriptor, size = files.regular(file)
        if descriptor is None or size == 0:  # /proc's files say that they are empty
            return self._send_by_reading(file, offset, count)
        return self._send_from(sender, file, descriptor, offset, count, 0, None)

    def sendfile_at_once(
        self, file: SendableFile, offset: int = 0, count: int | None = None
    ) -> int | None:
        """`sendfile` where there is nothing to think about, for event loops; it never reads a file.

        Args:
            file: As for `sendfile`.
            offset: As for `sendfile`.
            count: As for `sendfile`.

        Returns:
            As `sendfile`; None if there is something to think about: then nothing was sent.

        Raises:
            KTLSError: As for `sendfile`.
        """
        lane = self._lane
        return None if lane is None else lane.sendfile(self, file, offset, count)

    def _after_file(
        self,
        file: SendableFile,
        offset: int,
        count: int | None,
        sent: int,
        number: int,
        left: float | None,
    ) -> int:
        """Goes on after so many bytes by the lane, which the errno stopped there.

        Args:
            file: As for `sendfile`.
            offset: As for `sendfile`.
            count: As for `sendfile`.
            sent: How many bytes.
            number: 0 after all of them, EINTR where there is something to think about.
            left: Seconds of the socket's timeout, if it has begun.
        """
        if not number:
            self._retry("sendfile", sent)
            return sent
        try:
            sender = self._open_sender()
        except KTLSError as error:  # another thread closed it meanwhile
            error.sent = sent
            raise
        descriptor: int = file.fileno()  # type: ignore[attr-defined]
        stopped = None if number == errno.EINTR else file_error(number)
        return self._send_from(sender, file, descriptor, offset, count, sent, stopped, left)

    def _send_from(
        self,
        sender: Sender,
        file: SendableFile,
        descriptor: int,
        offset: int,
        count: int | None,
        sent: int,
        stopped: BaseException | None,
        seconds: float | None = None,
    ) -> int:
        """Goes on with `sendfile` after so many bytes, and what stopped it there."""
        timeout = self.gettimeout()
        deadline = wait.Deadline(self) if seconds is None else wait.Deadline.within(seconds)
        try:
            while True:
                if timeout != self.gettimeout():  # another thread has set it
                    timeout, deadline = self.gettimeout(), wait.Deadline(self)
                if stopped is None:
                    left = None if count is None else count - sent
                    progress, stopped = sender.sendfile(descriptor, offset + sent, left)
                    sent += progress
                    if progress:
                        deadline = wait.Deadline(self)
                if stopped is None:
                    return sent
                if isinstance(stopped, BlockingIOError) and self.gettimeout() != 0:
                    try:
                        wait.until(self, wait.WRITABLE, deadline.left(wait.PUSH_AGAIN))
                    except TimeoutError:
                        raise StalledError("sendfile", sent) from None
                    stopped = None
                elif isinstance(stopped, OSError):
                    raise self._send_error("sendfile", stopped, sent)
                else:
                    raise stopped
        finally:
            file.seek(offset + sent)

    def _send_by_reading(self, file: SendableFile, offset: int, count: int | None) -> int:
        seekable = getattr(file, "seekable", lambda: True)()
        if seekable:
            file.seek(offset)
        elif offset:
            raise ValueError("a file that can't seek has no offset")
        sent = 0
        try:
            while count is None or sent < count:
                chunk = file.read(_CHUNK if count is None else min(_CHUNK, count - sent))
                if not chunk:
                    break
                view = memoryview(chunk)
                while view:
                    progress = self.send(view)
                    sent += progress
                    view = view[progress:]
            self._flush("sendfile")
        except (WouldBlockError, StalledError, ConnectionLostError) as error:
            error.sent = sent
            raise
        finally:
            if seekable:
                file.seek(offset + sent)
        return sent

    def send_record(self, content_type: int, data: Buffer) -> int:
        """Sends one record of any type. What it means to the peer is the caller's business.

        Args:
            content_type: A `RecordType`, or any byte.
            data: At most `MAX_PAYLOAD` bytes, fewer where records are shorter.

        Returns:
            How many bytes were sent.

        Raises:
            NotInKernelError: TX is in userspace, and it isn't data.
            KTLSError: As for `send`.
            OSError: EMSGSIZE: too long for a record.
        """
        sender = self._open_sender()
        try:
            return sender.send_record(content_type, data)
        except OSError as error:
            raise self._send_error("send_record", error) from None

    def send_alert(self, description: Alert, level: AlertLevel = AlertLevel.FATAL) -> None:
        """Sends an alert, after all data before it. After a fatal one, close the socket.

        Args:
            description: Which.
            level: TLS 1.3 ignores it.

        Raises:
            NotInKernelError: TX is in userspace, and it isn't close_notify: OpenSSL sends alerts
                when it sees fit.
            KTLSError: As for `send`.
        """
        begun = self._finished_sending and not self._close_notify_sent
        if description is Alert.CLOSE_NOTIFY and begun and self._send_fatal is None:
            self._finish_sending()  # it stalled; once more
            return
        sender = self._open_sender()
        if description is Alert.CLOSE_NOTIFY:
            self._finish_sending()
            return
        try:
            sender.alert(level, description)
        except OSError as error:
            raise self._send_error("send_alert", error) from None

    @contextmanager
    def cork(self) -> Iterator[None]:
        """Joins the sends within into full records (MSG_MORE), which saves one per small send.

        The last record goes out at the end, whatever happened; within, when a control record or a
        sendfile follows. Corks may be nested: the outermost counts. In userspace it has no effect.
        Where the end would block, entering and leaving another cork tries again.

        Raises:
            KTLSError: As for `send`.
        """
        self._corked += 1
        try:
            yield
        except BaseException:
            with suppress(OSError, KTLSError):  # the first error is the one to know about
                self._uncork()
            raise
        self._uncork()

    def _uncork(self) -> None:
        self._corked -= 1
        if not self._corked and not self._finished_sending:  # which sends out what is open
            self._flush("cork")

    def _more(self) -> int:
        return wait.MORE if self._corked else 0

    def _flush(self, call: str) -> None:
        sender = self._open_sender()
        try:
            sender.flush()
        except OSError as error:
            raise self._send_error(call, error) from None

    def update_keys(self, request_peer: bool = False) -> None:
        """Sends a TLS 1.3 KeyUpdate and goes on with the next key (RFC 8446 section 4.6.3).

        This happens by itself before a key has protected as many records as it may.

        Args:
            request_peer: Ask the peer to update its keys, too.

        Raises:
            NotInKernelError: TX is in userspace, or this is TLS 1.2.
            RekeyUnsupportedError: This kernel can't replace keys. Nothing was sent.
            KTLSError: As for `send`.
        """
        sender = self._open_sender()
        try:
            sender.update_keys(request_peer)
        except RekeyUnsupportedError:
            raise  # nothing was sent: the connection goes on with the key it has
        except OSError as error:
            raise self._send_error("update_keys", error) from None

    # -- receiving ---------------------------------------------------------------------------------

    def recv(self, bufsize: int, flags: int = 0) -> bytes:
        """Receives data.

        Args:
            bufsize: At most so many bytes.
            flags: MSG_PEEK, MSG_WAITALL and MSG_DONTWAIT have their usual meaning.

        Returns:
            The data; ``b""`` once the peer has closed.

        Raises:
            WouldBlockError: Nothing there, on a non-blocking socket.
            StalledError: The timeout ran out.
            TruncationError: TCP ended without close_notify, if ``suppress_ragged_eofs`` is off.
            AlertReceived: The peer sent a fatal alert.
            RecordError: The peer broke the protocol. This and the errors below stay: all later
                calls raise them again.
            RekeyUnsupportedError: A KeyUpdate, which this kernel can't follow.
            ConnectionLostError: The peer reset the connection.
        """
        if (intake := self._intake) is not None and not flags and not self._unread:
            flags_by_timeout = 0 if self.gettimeout() is None else wait.DONTWAIT
            data = intake.recv(bufsize, flags_by_timeout)
            if data is not None:
                return data
        buffer = bytearray(bufsize)
        count = self._recv_at_leisure(memoryview(buffer), flags)
        return bytes(memoryview(buffer)[:count])

    def recv_into(self, buffer: Buffer, nbytes: int = 0, flags: int = 0) -> int:
        """Receives data into a buffer.

        Args:
            buffer: A writable buffer.
            nbytes: At most so many bytes; 0 means the buffer's size.
            flags: As for `recv`.

        Returns:
            How many bytes; 0 once the peer has closed.

        Raises:
            ValueError: ``nbytes`` is negative or more than the buffer has.
            KTLSError: As for `recv`.
        """
        if (intake := self._intake) is not None and not (nbytes or flags or self._unread):
            flags_by_timeout = 0 if self.gettimeout() is None else wait.DONTWAIT
            received = intake.recv_into(buffer, flags_by_timeout)
            if received is not None:
                return received
        view = memoryview(buffer).cast("B")
        if view.readonly:
            raise TypeError("recv_into needs a writable buffer")
        if not 0 <= nbytes <= len(view):
            raise ValueError(f"nbytes must be 0 to {len(view)}, the buffer's size")
        return self._recv_at_leisure(view[: nbytes or len(view)], flags)

    def _recv_at_leisure(self, view: memoryview, flags: int) -> int:
        """Receives where there may be something to think about."""
        if not view:
            return 0
        count = self._recv_some(view, flags & ~wait.WAITALL)
        while flags & wait.WAITALL and not flags & wait.PEEK and 0 < count < len(view):
            try:
                more = self._recv_some(view[count:], flags & ~wait.WAITALL)
            except KTLSError:
                break  # what came before it isn't lost; if it is final, the next call has it
            if not more:
                break
            count += more
        return count

    def recvmsg(
        self, bufsize: int, ancbufsize: int = 0, flags: int = 0
    ) -> tuple[bytes, list[tuple[int, int, bytes]], int, Any]:
        """Receives data; there is never ancillary data, see `recv_record` for record types.

        Args:
            bufsize: As for `recv`.
            ancbufsize: Has no effect.
            flags: As for `recv`.

        Returns:
            The data, an empty list, 0 and None.

        Raises:
            KTLSError: As for `recv`.
        """
        return self.recv(bufsize, flags), [], 0, None

    def recvmsg_into(
        self, buffers: Iterable[Buffer], ancbufsize: int = 0, flags: int = 0
    ) -> tuple[int, list[tuple[int, int, bytes]], int, Any]:
        """Receives data into the first of the buffers that isn't empty.

        Args:
            buffers: Writable buffers.
            ancbufsize: Has no effect.
            flags: As for `recv`.

        Returns:
            How many bytes, an empty list, 0 and None.

        Raises:
            KTLSError: As for `recv`.
        """
        for buffer in buffers:
            if len(memoryview(buffer).cast("B")):
                return self.recv_into(buffer, flags=flags), [], 0, None
        return 0, [], 0, None

    def recv_record(self, bufsize: int = MAX_PAYLOAD) -> tuple[RecordType, bytes]:
        """Receives data or the end, as records.

        Every other record is acted upon as in `recv` and isn't returned.

        Args:
            bufsize: At most so many bytes; of a longer record the rest comes with the next call.

        Returns:
            APPLICATION_DATA and the data, or at the end ALERT and the two bytes of close_notify.
            APPLICATION_DATA and ``b""`` is an end without close_notify.

        Raises:
            KTLSError: As for `recv`.
        """
        data = self.recv(bufsize)
        if not data and self._end is End.CLOSE_NOTIFY:
            return RecordType.ALERT, CLOSE_NOTIFY
        return RecordType.APPLICATION_DATA, data

    def pending(self) -> int:
        """Bytes of data that wait in this process, where no ``select`` sees them.

        With RX in the kernel 0; else what is left of one record. And what `recvfile` received for a
        file that then didn't take it.
        """
        waiting = self._receiver.pending() if self._receiver is not None else 0
        return waiting + len(self._unread)

    def recvfile(
        self, file: ReceivingFile, count: int | None = None, *, offset: int | None = None
    ) -> int:
        """Receives data into a file; in the kernel without a copy through this process.

        The data go by ``splice(2)`` through a pipe; around records that aren't data, such as
        tickets and KeyUpdates, a few of them are copied.

        Args:
            file: Open for binary writing. A regular file is written by its descriptor, anything
                else, or a file open for appending, by its ``write``.
            count: How many bytes to receive; None means up to the end of the stream.
            offset: Where in the file to put them, in bytes; None means at its position.

        Returns:
            How many bytes were received: fewer than ``count`` only if the peer has closed. The
            file's position is after the last one, also when an error is raised.

        Raises:
            ValueError: A text file or one that can't be written, a negative offset, a count that
                isn't positive.
            OSError: Of the file, such as ENOSPC. What it didn't take comes with the next receive.
            WouldBlockError: The socket is non-blocking and nothing is there; the error's
                ``received`` bytes are in the file. Go on when it is readable.
            StalledError: As above; no byte came for the socket's timeout.
            TruncationError: As for `recv`.
            KTLSError: As for `recv`.
        """
        files.check_range(file, offset, count)
        if self._receiver is None:
            self._not_ready()
        sink = files.sink(file, offset)
        try:
            while count is None or sink.received < count:
                left = None if count is None else count - sink.received
                if self._unread:
                    part = bytes(self._unread[:left])
                    del self._unread[: len(part)]
                    sink.write(memoryview(part))
                elif not self._recv_by(partial(_recv_to_file, sink=sink, limit=left)):
                    break
        except SinkFull as full:
            self._unread[:0] = full.rest
            raise full.error from None
        except (WouldBlockError, StalledError) as error:
            error.received = sink.received
            raise
        finally:
            sink.close()
        return sink.received

    def _recv_some(self, view: memoryview, flags: int) -> int:
        if self._unread:
            count = min(len(view), len(self._unread))
            view[:count] = self._unread[:count]
            if not flags & wait.PEEK:
                del self._unread[:count]
            return count
        return self._recv_by(lambda receiver: receiver.recv_into(view, flags))

    def _recv_by(self, call: Callable[[Receiver], int | End]) -> int:
        """Receives something, under the rules for errors and ends that stay."""
        if self._recv_fatal is not None:
            raise copy.copy(self._recv_fatal)
        if self.fileno() < 0:
            self._not_ready()
        if self._end is None:
            if self._receiver is None:
                self._not_ready()
            outcome = self._receive(self._receiver, call)
            if not isinstance(outcome, End):
                return outcome
            if outcome is End.FIN and isinstance(self._send_fatal, ConnectionLostError):
                # The reset was told to a send; the kernel calls what follows it an end.
                self._drop_intake()
                self._recv_fatal = self._send_fatal
                raise copy.copy(self._recv_fatal)
            if outcome is End.FIN and self._reset_unheard():
                raise self._lost(
                    "recv", ConnectionResetError(errno.ECONNRESET, _RESET), receiving=True
                )
            self._drop_intake()
            self._end = outcome
            if outcome is End.CLOSE_NOTIFY and self.version() == str(Version.TLS_1_2):
                # RFC 5246 section 7.2.1. In TLS 1.3 we may go on sending.
                self._end_sending()
                with suppress(StalledError):  # a reader doesn't wait for it: close() has the time
                    self._finish_sending(0)
        if self._end is End.FIN and not self._suppress_ragged_eofs:
            raise TruncationError("TCP ended without close_notify: data may be missing")
        return 0

    def _reset_unheard(self) -> bool:
        """Whether the end is a reset: one recvmsg that brought data took what told of it, too."""
        kernel = self.rx.mode is not Mode.USERSPACE
        return kernel and not self._finished_sending and tcp.is_gone(self)

    def _receive(self, receiver: Receiver, call: Callable[[Receiver], int | End]) -> int | End:
        try:
            return call(receiver)
        except KTLSError as error:
            self._drop_intake()
            self._recv_fatal = copy.copy(error)
            self._latch_sending(error)
            if isinstance(error, RekeyUnsupportedError | OffloadError):
                self._give_up(error)
            raise
        except BlockingIOError:
            raise WouldBlockError("recv") from None
        except OSError as error:
            if isinstance(error, TimeoutError) and error.errno is None:
                raise StalledError("recv") from None
            raise self._lost("recv", error, receiving=True) from None

    def unwrap(self) -> None:
        """Closes TLS in both directions: sends close_notify, and waits for the peer's.

        The socket can't go back to plain TCP (the kernel doesn't give up its keys): close it next.

        Raises:
            UnreadDataError: The peer sent data that wasn't read; nothing of it is lost.
            StalledError: Not done before the timeout; call it again.
            WouldBlockError: Not done yet, on a non-blocking socket; call it again.
            KTLSError: As for `recv`.
        """
        if self._sender is None:
            self._not_ready()
        if self._send_fatal is None:
            self._finish_for_good(self._sender)
        if self._recv_some(memoryview(bytearray(1)), wait.PEEK):
            raise UnreadDataError("the peer sent data: recv() until it returns b'', then unwrap()")

    # -- in another process ------------------------------------------------------------------------

    def detach_state(self, *, key_updates: bool = False) -> ConnectionState:
        """Makes ready to go on in another process, which gets the descriptor and this state.

        There, without any key in its memory, `from_state` makes a socket that sends and receives
        data, alerts and close_notify. This one does no more, and closing it closes only its
        descriptor: pass that one on first, by ``socket.send_fds``, to a spawned process, or by fork
        (which copies all memory, and with it what OpenSSL has). Whoever has the descriptor can read
        the kernel's keys by ``getsockopt``, if he tries.

        Args:
            key_updates: Hand over the traffic secrets, too, so that the receiver can follow and
                make TLS 1.3 KeyUpdates. Without them a KeyUpdate of the peer ends the connection
                there by RekeyUnsupportedError, and the limit of a key by KeyLimitError.

        Returns:
            The state. It can be pickled.

        Raises:
            NotInKernelError: A direction is in userspace: then its keys are OpenSSL's.
            UnreadDataError: `recvfile` left data that its file didn't take.
            DetachedError: This was done already.
            KTLSError: As for `send`: what is owed or corked goes out first.
        """
        sender, receiver = self._sender, self._receiver
        for fatal in (self._recv_fatal, self._send_fatal):
            if fatal is not None:
                raise copy.copy(fatal)
        if sender is None:
            self._not_ready()
        if not isinstance(sender, KernelSender) or not isinstance(receiver, KernelReceiver):
            raise NotInKernelError(
                f"OpenSSL has the keys of a direction: TX {self.tx}; RX {self.rx}"
            )
        if self._unread:
            raise UnreadDataError("recvfile left data that its file didn't take: recv() it first")
        rx_chain, (handshake_part, record_part) = receiver.detach()
        try:
            tx_chain, used, stream_end = sender.detach()
        except OSError as error:
            raise self._send_error("detach_state", error) from None
        self._block_as_told()
        self._detached, self._sender, self._receiver, self._lane = True, None, None, None
        self._drop_intake()
        return ConnectionState(
            tx_chain=tx_chain if key_updates else tx_chain.without_secret(),
            rx_chain=rx_chain if key_updates else rx_chain.without_secret(),
            server_side=self._facts.server_side,
            cipher_suite=self.cipher(),
            alpn=self.selected_alpn_protocol(),
            certificate=self._facts.peer_certificate(),
            verifies=self._facts.verifies(),
            session_reused=self.session_reused,
            records_sent=used,
            stream_end=stream_end,
            record_limit=self._options.record_limit,
            max_fragment=sender.max_fragment,
            suppress_ragged_eofs=self._suppress_ragged_eofs,
            close_timeout=self.close_timeout,
            finished_sending=self._finished_sending,
            close_notify_sent=self._close_notify_sent,
            end=self._end.name if self._end is not None else None,
            handshake_part=handshake_part,
            record_part=record_part,
        )

    def release(self) -> None:
        """Lets OpenSSL's connection go, which an idle connection in the kernel needn't keep.

        It is most of the memory of one. Data, alerts, KeyUpdates and close_notify go on, by the
        secrets that stay here. What is no longer possible: session tickets that come are dropped
        and `get_session` gives None, `ssl_object` too. A connection with many tickets under way, of
        a client that wants to resume, is better kept until they are there.

        Nobody may use the socket meanwhile.

        Raises:
            NotInKernelError: A direction is in userspace: its records are OpenSSL's.
            UnreadDataError, DetachedError, KTLSError: As for `detach_state`; nothing is released.
        """
        state = self.detach_state(key_updates=True)
        self._facts.keep_session()  # of those that the context shares
        self._facts, self._detached = DetachedFacts(state), False
        self._set_out(take_on(self, state))
        if state.finished_sending:
            self._end_sending()

    @classmethod
    def from_state(cls, fd: int, state: ConnectionState) -> Socket:
        """Goes on with a connection that another process has made.

        Args:
            fd: The connection's descriptor, which the socket owns from then on.
            state: From `detach_state`. It must come from somebody you trust, like all that is
                unpickled.

        Returns:
            The socket, blocking. What needs OpenSSL isn't there: `get_session` gives None.

        Raises:
            SocketError: Not a connected TCP socket. In this and the next case the descriptor is
                still the caller's.
            KeyMaterialError: The kernel has no keys for it, or those of another version or cipher.
        """
        try:
            sock = socket.socket(fileno=fd)
        except OSError as error:
            raise SocketError(error.errno, f"not a socket: {error.strerror}") from None
        except ValueError as error:
            raise SocketError(errno.EBADF, f"not a socket: {error}") from None
        tls = cls(
            sock,
            DetachedFacts(state),
            None,
            tx=offload.IN_KERNEL,
            rx=offload.IN_KERNEL,
            require=True,
            suppress_ragged_eofs=state.suppress_ragged_eofs,
            close_timeout=state.close_timeout,
            options=Options(state.record_limit, state.max_fragment),
        )
        try:
            tls._set_out(take_on(tls, state))
        except BaseException:
            tls.detach()
            raise
        if state.finished_sending:
            tls._end_sending()
        tls._close_notify_sent = state.close_notify_sent
        if state.end:
            tls._drop_intake()
            tls._end = End[state.end]
        return tls

    # -- what a TLS connection can't do ------------------------------------------------------------

    def _refuse(self, *_args: object, **_keywords: object) -> NoReturn:
        raise NotImplementedError("a TLS connection has no plain, unconnected or second side")

    accept = bind = connect = connect_ex = dup = listen = _refuse
    recvfrom = recvfrom_into = sendto = sendmsg_afalg = _refuse


def _recv_to_file(receiver: Receiver, sink: files.Sink, limit: int | None) -> int | End:
    return receiver.recv_to_file(sink, limit)
