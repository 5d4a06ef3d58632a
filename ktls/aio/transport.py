"""A TLS connection after its handshake, as an ``asyncio.Transport``.

Theory of operation. It uses a loop's public ``add_reader`` and ``add_writer`` on the connection's
one descriptor, so it runs on any loop that has these. Everything is a callback, no task: a loop
that is closed with connections open leaves nothing pending. What asyncio's transports promise holds
(flow control, `close` flushes, `abort` doesn't, `connection_lost` comes last and once), in
userspace mode as well.

No event tells when the peer has acknowledged what was sent, before which a close may lose it: so
the end looks again after a while.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
import warnings
from asyncio import constants, transports, trsock
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .. import closing, files, tcp, wait
from ..connection import OURS_TO_EXPLAIN, ClosePending
from ..errors import ClosedForWritingError, StalledError, WouldBlockError
from ..socket import Socket
from ..types import Alert, Mode, Version
from .handshaking import FATAL
from .watching import ReadWatch

_log = logging.getLogger("asyncio")
_READ_SIZE = 1 << 16  # never less than a record: what userspace TLS has decrypted is taken at once
_FILE_STEP = 1 << 20  # of a file, before the loop does something else
_MOST_TIMEOUTS = 100  # a close may take, however small its progress


class Transport(transports._FlowControlMixin, asyncio.Transport):
    """A TLS connection after its handshake.

    ``get_extra_info`` answers ``peername``, ``sockname``, ``socket``, ``sslcontext``,
    ``ssl_object``, ``peercert``, ``cipher``, ``compression`` as asyncio's TLS does, and:

    * ``ktls_send_enabled``, ``ktls_recv_enabled``: whether that direction is in the kernel.
    * ``ktls_tx``, ``ktls_rx``: the same as `ktls.Offload`, with the reason if it isn't.
    """

    # What asyncio's own loops look at. Their native sendfile would write to the descriptor.
    _sendfile_compatible = constants._SendfileMode.FALLBACK
    _start_tls_compatible = True
    _tls: Socket | None = None  # for __del__, should __init__ fail
    _loop: asyncio.AbstractEventLoop
    _extra: dict[str, Any]
    _maybe_pause_protocol: Callable[[], None]
    _maybe_resume_protocol: Callable[[], None]

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        tls: Socket,
        protocol: asyncio.BaseProtocol,
        context: object,
        *,
        shutdown_timeout: float,
        peername: object = None,
        on_lost: Callable[[Transport], object] | None = None,
    ) -> None:
        """Takes over a connection; `begin` starts it.

        Args:
            loop: Where to run.
            tls: Non-blocking, its handshake done.
            protocol: A Protocol or BufferedProtocol.
            context: Of the handshake, for ``sslcontext``.
            shutdown_timeout: How long `close` may go without progress, in seconds; in all it may
                take 100 times as long.
            peername: If it is known.
            on_lost: Called after ``connection_lost``.
        """
        super().__init__(_describe(tls, context, peername), loop)
        self._tls = tls
        tls.close_timeout = 0
        self._decrypts = tls.rx.mode is Mode.USERSPACE  # no event tells of what is left of a record
        self._half_closes = tls.version() == str(Version.TLS_1_3)
        self._shutdown_timeout = shutdown_timeout
        self._on_lost = on_lost
        self._buffer = bytearray()
        self._reading = ReadWatch(loop, tls.fileno(), self._read_ready)
        self._read_again: asyncio.Handle | None = None
        self._writing = False
        self._paused = False
        self._began = False
        self._eof_received = False
        self._eof_written = False
        self._closing = False
        self._lost = 0
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._acknowledged = 0
        self._timeouts = 0
        self._last_pause = 0.0
        self._error: BaseException | None = None
        self._sending_file = False
        self._room: asyncio.Future[None] | None = None
        self._pid = os.getpid()
        self.set_protocol(protocol)

    def begin(self, *, call_connection_made: bool = True) -> None:
        """Starts reading, after ``connection_made``."""
        if call_connection_made:
            self._loop.call_soon(self._protocol.connection_made, self)
        self._loop.call_soon(self._start)

    def _start(self) -> None:
        self._began = True
        self._watch_reading()

    def __repr__(self) -> str:
        """What it is and how it goes; nothing secret."""
        state = "closed" if self._tls is None else "closing" if self._closing else "open"
        return f"<{type(self).__name__} {state} buffered={len(self._buffer)} {self._tls!r}>"

    def __del__(self) -> None:
        """Nobody closed it. A forked child just lets go of it."""
        if self._tls is not None:
            if self._pid == os.getpid():
                warnings.warn(
                    f"unclosed transport {self!r}", ResourceWarning, stacklevel=1, source=self
                )
            self._tls.abandon()

    # -- the protocol ----------------------------------------------------------------------------

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Sets who gets the data from now on."""
        self._protocol: Any = protocol
        self._buffered = isinstance(protocol, asyncio.BufferedProtocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Gets who gets the data."""
        protocol: asyncio.BaseProtocol = self._protocol
        return protocol

    def _call(self, name: str, *arguments: object) -> Any:
        """Calls the protocol; an error there ends the connection, and None is returned."""
        try:
            return getattr(self._protocol, name)(*arguments)
        except FATAL:
            raise
        except BaseException as error:
            self._report(error, f"Fatal error: protocol.{name}() call failed.")
            self._break(error)
            return None

    def _report(self, error: BaseException, message: str) -> None:
        self._loop.call_exception_handler(
            {
                "message": message,
                "exception": error,
                "transport": self,
                "protocol": self._protocol,
            }
        )

    # -- reading ---------------------------------------------------------------------------------

    def is_reading(self) -> bool:
        """Whether data are passed on to the protocol."""
        return not self._closing and not self._paused and not self._sending_file

    def pause_reading(self) -> None:
        """Leaves data where they are, until `resume_reading`."""
        if not self._paused and not self._closing:
            self._paused = True
            self._reading.stop()

    def resume_reading(self) -> None:
        """Passes data on again."""
        if self._paused and not self._closing:
            self._paused = False
            self._watch_reading()

    def _watch_reading(self) -> None:
        if self._tls is None or not self._began or not self.is_reading() or self._eof_received:
            return
        self._reading.start()
        if self._tls.pending() and self._read_again is None:
            self._read_again = self._loop.call_soon(self._read_pending)

    def _read_pending(self) -> None:
        """What this process has decrypted already, of which no event tells."""
        self._read_again = None
        if self.is_reading() and not self._eof_received:
            self._read_ready()

    def _read_ready(self) -> None:
        tls = self._tls
        if tls is None or self._lost:
            return
        buffer: Any = None
        try:
            if self._buffered:
                buffer = self._get_buffer()
                if self._lost:
                    return
                count = tls.recv_into(buffer)
            else:
                data = tls.recv(_READ_SIZE)
                count = len(data)
        except WouldBlockError:
            self._reading.read_in_vain()
            return
        except FATAL:
            raise
        except BaseException as error:
            self._fatal(error, "Fatal read error on socket transport")
            return
        if self._reading.in_vain:
            self._reading.read_something()
        if not count:
            self._read_eof()
        elif self._buffered:
            self._call("buffer_updated", count)
        else:
            self._call("data_received", data)
        if buffer is not None and self._decrypts and not self._lost:  # there may be more
            self._watch_reading()

    def _get_buffer(self) -> Any:
        buffer = self._call("get_buffer", -1)
        if not self._lost and not memoryview(buffer).nbytes:
            raise RuntimeError("get_buffer() returned an empty buffer")
        return buffer

    def _read_eof(self) -> None:
        self._eof_received = True
        self._reading.stop()
        keep_open = self._call("eof_received")
        # TLS 1.2 answers close_notify at once (RFC 5246 section 7.2.1): nothing can be sent then.
        if not (keep_open and self.can_write_eof()):
            self.close()

    # -- writing ---------------------------------------------------------------------------------

    def get_write_buffer_size(self) -> int:
        """Bytes that wait to be sent, in this process."""
        return len(self._buffer)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Sends data, now as far as they fit, the rest in the background."""
        if not isinstance(data, bytes):
            if not isinstance(data, bytearray | memoryview):
                raise TypeError(
                    f"data argument must be a bytes-like object, not {type(data).__name__!r}"
                )
            data = memoryview(data).cast("B")
        if self._eof_written:
            raise RuntimeError("Cannot call write() after write_eof()")
        if self._sending_file:
            raise RuntimeError("unable to write; sendfile is in progress")
        if not data:
            return
        if self._tls is None or self._lost or self._closing:
            self._lost += bool(self._lost)
            if self._lost > constants.LOG_THRESHOLD_FOR_CONNLOST_WRITES:
                _log.warning("socket.send() raised exception.")
            return
        if not self._buffer:
            sent = self._send(data)
            if sent is None or sent == len(data):
                return
            data = memoryview(data)[sent:]
        self._buffer += data
        self._watch_writing()
        self._maybe_pause_protocol()

    def _send(self, data: bytes | bytearray | memoryview) -> int | None:
        """Sends what fits, perhaps nothing; None if the connection broke."""
        assert self._tls is not None  # noqa: S101
        try:
            return self._tls.send(data)
        except WouldBlockError:
            return 0
        except FATAL:
            raise
        except BaseException as error:
            self._fatal(error, "Fatal write error on socket transport")
            return None

    def _watch_writing(self) -> None:
        if not self._writing and self._tls is not None:
            self._writing = True
            self._loop.add_writer(self._tls.fileno(), self._write_ready)

    def _stop_writing(self) -> None:
        if self._writing and self._tls is not None:
            self._writing = False
            self._loop.remove_writer(self._tls.fileno())

    def _write_ready(self) -> None:
        if self._buffer:
            sent = self._send(self._buffer)
            if sent is None:
                return
            del self._buffer[:sent]
            self._maybe_resume_protocol()  # which may append to the buffer
            if self._buffer:
                return
        self._stop_writing()
        if self._room is not None:
            if not self._room.done():
                self._room.set_result(None)
        elif self._closing:
            self._end_step()
        elif self._eof_written:
            self._write_eof()

    def can_write_eof(self) -> bool:
        """Whether one direction can end alone: in TLS 1.3 (RFC 8446 section 6.1)."""
        return self._half_closes

    def write_eof(self) -> None:
        """Sends close_notify after all data; receiving goes on.

        Raises:
            NotImplementedError: In TLS 1.2, where close_notify ends both directions.
        """
        if not self._half_closes:
            raise NotImplementedError("TLS 1.2 has no half-closed connections")
        if self._closing or self._eof_written:
            return
        self._eof_written = True
        if not self._buffer and not self._sending_file:
            self._write_eof()

    def _write_eof(self) -> None:
        assert self._tls is not None  # noqa: S101
        try:
            self._tls.send_alert(Alert.CLOSE_NOTIFY)
        except StalledError:
            self._watch_writing()
        except OSError as error:
            self._fatal(error, "Fatal write error on socket transport")

    async def sendfile(self, file: Any, offset: int = 0, count: int | None = None) -> int:
        """Sends a file by the kernel (``sendfile(2)``), after what was written before it.

        Meanwhile nothing is read, as in asyncio's own, and nothing can be written.

        Args:
            file: A regular file, open for binary reading.
            offset: Where to begin, in bytes.
            count: How many bytes; None means up to the end.

        Returns:
            How many bytes were sent. The file's position is after the last one, also after an
            error or a cancellation.

        Raises:
            SendfileNotAvailableError: Not a regular file, or sending is in userspace.
            RuntimeError: The transport is closing, or sends a file already.
            ConnectionError: It was closed meanwhile, or broke.
        """
        if self._closing or self._eof_written:
            raise RuntimeError("Transport is closing")
        if self._sending_file:
            raise RuntimeError("sendfile is in progress already")
        sent, done = (0, False) if self._buffer else self._send_at_once(file, offset, count)
        if done:
            return sent
        files.check_range(file, offset, count)
        descriptor, size = files.regular(file)
        if descriptor is None or not self._extra["ktls_send_enabled"]:
            raise asyncio.SendfileNotAvailableError(
                "only a regular file can be sent by the kernel"
                if descriptor is None
                else f"sending isn't in the kernel: {self._extra['ktls_tx']}"
            )
        left = max(0, size - offset) if count is None else count
        try:
            if self._buffer:
                self._hold_reading()
                await self._wait_for_room()
            return await self._send_file(file, offset, left, sent)
        finally:
            if self._sending_file:
                self._sending_file = False
                if not self._loop.is_closed():  # else this is the coroutine's end, not the file's
                    self._watch_reading()
                    if self._eof_written and not self._buffer and not self._closing:
                        self._write_eof()

    def _send_at_once(self, file: Any, offset: int, count: int | None) -> tuple[int, bool]:
        """Sends what fits, if it takes no look at the file; tells whether that was all."""
        assert self._tls is not None  # noqa: S101
        step = _FILE_STEP if count is None else min(count, _FILE_STEP)
        try:
            sent = self._tls.sendfile_at_once(file, offset, step)
        except WouldBlockError as error:
            return error.sent, False
        return sent or 0, sent is not None and (sent < step or sent == count)

    def _hold_reading(self) -> None:
        """While others may run before a file is sent; most often it is, before they can."""
        self._sending_file = True
        self._reading.stop()

    async def _send_file(self, file: Any, offset: int, left: int, sent: int) -> int:
        while left > sent:
            if self._tls is None or self._closing:
                raise self._error or _cut_off()
            step = min(left - sent, _FILE_STEP)
            try:
                progress = self._tls.sendfile(file, offset + sent, step)
            except WouldBlockError as error:
                sent += error.sent
                self._hold_reading()
                await self._wait_for_room()
                continue
            sent += progress
            if progress < step or sent == left:
                break
            self._hold_reading()
            await asyncio.sleep(0)
        return sent

    async def _wait_for_room(self) -> None:
        """Waits until the socket is writable and the buffer empty."""
        self._room = self._loop.create_future()
        self._watch_writing()
        again = self._loop.call_later(wait.PUSH_AGAIN, self._write_ready)
        try:
            await self._room
        finally:
            again.cancel()
            self._room = None
            if not self._buffer:
                self._stop_writing()

    # -- the end ---------------------------------------------------------------------------------

    def is_closing(self) -> bool:
        """Whether it is closed, or about to be."""
        return self._closing

    def close(self) -> None:
        """Sends what is buffered, then close_notify, and waits until the peer has it all.

        ``connection_lost`` comes after that; with a TimeoutError if it goes on for the shutdown
        timeout without progress, or for 100 times as long in all.
        """
        if self._closing:
            return
        self._stop(None)
        self._expect_progress()
        if not self._buffer:
            self._loop.call_soon(self._end_step)

    def abort(self) -> None:
        """Closes at once, without what is buffered and without close_notify."""
        self._break(self._error)

    def _force_close(self, error: BaseException | None) -> None:
        """`abort` with a reason, which is how asyncio's own TLS over this one gives up."""
        self._break(error)

    def _fatal(self, error: BaseException, message: str) -> None:
        """The connection is broken: at most an alert can still be sent."""
        if not isinstance(error, OSError):
            self._report(error, message)
        elif self._loop.get_debug():
            _log.debug("%r: %s", self, message, exc_info=error)
        if self._lost or self._error is not None:
            return
        if not isinstance(error, OURS_TO_EXPLAIN | ClosedForWritingError):
            self._break(error)  # a close_notify would call what is cut off an end
            return
        was_closing, self._error = self._closing, error
        self._stop(error)
        self._buffer = bytearray()  # the error's frames may have views of the old one
        if not was_closing:
            self._expect_progress()
        self._loop.call_soon(self._end_step)

    def _stop(self, error: BaseException | None) -> None:
        """Nothing is read or sent from now on, but for what the end needs."""
        self._closing = True
        self._reading.stop()
        if self._read_again is not None:
            self._read_again.cancel()
        if self._room is not None and not self._room.done():
            self._room.set_exception(error or _cut_off())

    def _expect_progress(self) -> None:
        self._acknowledged = self._count_acknowledged()
        self._timers["expire"] = self._loop.call_later(self._shutdown_timeout, self._expire)

    def _expire(self) -> None:
        self._timeouts += 1  # a peer that takes byte after byte doesn't stay for ever
        if self._count_acknowledged() > self._acknowledged and self._timeouts < _MOST_TIMEOUTS:
            self._expect_progress()
        else:
            self._break(self._error or TimeoutError("SSL shutdown timed out"))

    def _count_acknowledged(self) -> int:
        """Bytes that the peer's kernel has, of all that there were."""
        assert self._tls is not None  # noqa: S101
        return tcp.acknowledged(self._tls)

    def _end_step(self) -> None:
        if self._tls is None or self._lost or self._buffer:
            return
        self._stop_writing()  # before the descriptor is closed
        try:
            pending = self._tls.try_close()
        except OSError as error:
            self._break(self._error or error)
            return
        if pending is ClosePending.WRITABLE:
            self._watch_writing()
            self._look_after(wait.PUSH_AGAIN)
        elif pending is ClosePending.ACKNOWLEDGED:
            self._last_pause = closing.next_pause(self._tls, self._last_pause)
            self._look_after(self._last_pause)
        else:
            self._break(self._error)

    def _look_after(self, seconds: float) -> None:
        """Goes on with the end then, if nothing makes it go on before."""
        if (earlier := self._timers.get("look")) is not None:
            earlier.cancel()
        self._timers["look"] = self._loop.call_later(seconds, self._end_step)

    def _break(self, error: BaseException | None) -> None:
        """Lets go of the connection, and tells the protocol."""
        if self._lost:
            return
        self._lost = 1
        self._stop(error)
        self._stop_writing()
        self._buffer = bytearray()  # as above
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._loop.call_soon(self._connection_lost, error)

    def _connection_lost(self, error: BaseException | None) -> None:
        try:
            self._protocol.connection_lost(error)
        finally:
            tls, on_lost = self._tls, self._on_lost
            # The error's traceback has this transport.
            self._tls = self._protocol = self._error = self._on_lost = None
            self._reading.forget()
            try:
                if tls is not None:
                    tls.abandon()
            finally:
                if on_lost is not None:
                    on_lost(self)


def _cut_off() -> ConnectionAbortedError:
    return ConnectionAbortedError("the transport was closed while it sent a file")


def _describe(tls: Socket, context: object, peername: object) -> dict[str, Any]:
    """What ``get_extra_info`` answers."""
    known = tls.ssl_object
    is_ssl = isinstance(known, ssl.SSLObject)
    extra = {
        "socket": trsock.TransportSocket(tls),
        "sockname": None,
        "peername": peername,
        "sslcontext": context,
        "ssl_object": known if is_ssl else tls,
        "peercert": known.getpeercert() if is_ssl else tls.getpeercert(),
        "cipher": tls.cipher(),
        "compression": None,
        "ktls_tx": tls.tx,
        "ktls_rx": tls.rx,
        "ktls_send_enabled": tls.tx.mode is not Mode.USERSPACE,
        "ktls_recv_enabled": tls.rx.mode is not Mode.USERSPACE,
    }
    with suppress(OSError):  # the peer may be gone already
        extra["sockname"] = tls.getsockname()
    if peername is None:
        with suppress(OSError):
            extra["peername"] = tls.getpeername()
    return extra
