"""What a file is to a connection: something to send by its descriptor, or to receive into."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import socket
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from . import _ktls

# Of the pipe for splice: the most that Linux gives anyone who asks, and if it doesn't (all of a
# user's pipes together are limited) what is enough for a record.
_PIPE_SIZES = (1 << 20, 1 << 18)


class SendableFile(Protocol):
    """What `Socket.sendfile` takes; a regular file, as from ``open``, is read by the kernel."""

    def read(self, size: int, /) -> bytes:
        """Reads at most so many bytes."""

    def seek(self, offset: int, /) -> object:
        """Moves the position."""


class ReceivingFile(Protocol):
    """What `Socket.recvfile` takes; a regular file, as from ``open``, is written by the kernel."""

    def write(self, data: memoryview, /) -> int | None:
        """Writes; returns how many bytes, or None for none."""


def check_range(file: object, offset: int | None, count: int | None) -> None:
    """The rules of ``socket.socket.sendfile``.

    Raises:
        ValueError: A text file, a negative offset, a count that isn't positive.
        TypeError: No whole numbers.
    """
    mode = getattr(file, "mode", "b")
    if isinstance(mode, str) and "b" not in mode:
        raise ValueError("the file must be open in binary mode")
    if not isinstance(offset, int | None) or not isinstance(count, int | None):
        raise TypeError("offset and count are whole numbers")
    if offset is not None and offset < 0:
        raise ValueError(f"offset must not be negative, is {offset}")
    if count is not None and count <= 0:
        raise ValueError(f"count must be positive or None, is {count}")


def regular(file: object) -> tuple[int | None, int]:
    """Descriptor and size of a regular file; None for anything else.

    Also for what has a descriptor but other bytes than it, such as a ``gzip.GzipFile``.
    """
    if isinstance(file, tempfile._TemporaryFileWrapper):
        file = file.file
    raw = getattr(file, "raw", file)
    if not isinstance(raw, io.FileIO):
        return None, 0
    descriptor = raw.fileno()
    info = os.fstat(descriptor)
    return (descriptor, info.st_size) if stat.S_ISREG(info.st_mode) else (None, 0)


class SinkFull(Exception):  # noqa: N818 - it carries, rather than reports
    """A file didn't take data that were received for it.

    Attributes:
        error: Why not.
        rest: The data.
    """

    def __init__(self, error: BaseException, rest: bytes) -> None:
        """Takes both."""
        super().__init__()
        self.error = error
        self.rest = rest


class Sink(Protocol):
    """Where received data go.

    Attributes:
        received: How many bytes are there.
        splices: Whether `splice` is of use.
        told: The errno of what stopped the last `splice`, or 0.
    """

    received: int
    splices: bool
    told: int

    def write(self, data: memoryview) -> None:
        """Takes data.

        Raises:
            SinkFull: Not all.
        """

    def splice(self, sock: socket.socket, limit: int | None) -> int:
        """Takes what a kernel TLS socket has ready (``ktls_recvfile`` in ``ktls.h``).

        Returns:
            How many bytes.

        Raises:
            SinkFull: As above.
        """

    def close(self) -> None:
        """Lets go of the file, its position after the last byte received."""


def sink(file: ReceivingFile, offset: int | None) -> Sink:
    """Makes the sink that fits a file.

    Raises:
        ValueError: A file that isn't open for writing, an offset for one that can't seek.
    """
    if not getattr(file, "writable", lambda: True)():
        raise ValueError("the file must be open for writing")
    seekable = getattr(file, "seekable", lambda: hasattr(file, "seek"))()
    if not seekable:
        if offset:
            raise ValueError("a file that can't seek has no offset")
        return _AnySink(file)
    if offset is not None:
        file.seek(offset)  # type: ignore[attr-defined]
    descriptor, _ = regular(file)
    if descriptor is None or fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND:
        return _AnySink(file)
    return _RegularSink(file, descriptor)


class _AnySink:
    """Calls the file's own ``write``."""

    splices = False
    told = 0

    def __init__(self, file: ReceivingFile) -> None:
        self.received = 0
        self._file = file

    def write(self, data: memoryview) -> None:
        """See `Sink.write`."""
        written = 0
        try:
            while written < len(data):
                count = self._file.write(data[written:])
                if not count:
                    raise BlockingIOError(errno.EAGAIN, "write to the file: would block")
                written += count
        except BaseException as error:
            written += getattr(error, "characters_written", 0)
            raise SinkFull(error, bytes(data[written:])) from None
        finally:
            self.received += written

    def splice(self, sock: socket.socket, limit: int | None) -> int:
        """See `Sink.splice`: recvmsg can do as well."""
        return 0

    def close(self) -> None:
        """See `Sink.close`: writing moved the position."""


class _RegularSink:
    """Writes to the descriptor, from the file's position on."""

    def __init__(self, file: ReceivingFile, descriptor: int) -> None:
        self.received = 0
        self.splices = True
        self.told = 0
        self._seek: Callable[[int], object] = file.seek  # type: ignore[attr-defined]
        getattr(file, "flush", lambda: None)()  # what it still holds belongs before
        self._start: int = file.tell()  # type: ignore[attr-defined]
        self._descriptor = descriptor
        self._pipe: tuple[int, int] | None = None

    def write(self, data: memoryview) -> None:
        """See `Sink.write`."""
        written = 0
        try:
            while written < len(data):
                at = self._start + self.received + written
                written += os.pwrite(self._descriptor, data[written:], at)
        except BaseException as error:
            raise SinkFull(error, bytes(data[written:])) from None
        finally:
            self.received += written

    def splice(self, sock: socket.socket, limit: int | None) -> int:
        """See `Sink.splice`."""
        pipe = self._pipe = self._pipe or _new_pipe()
        moved, held, refusal, self.told, raised = _ktls.recvfile(
            sock.fileno(),
            *pipe,
            self._descriptor,
            self._start + self.received,
            _PIPE_SIZES[0] if limit is None else min(limit, _PIPE_SIZES[0]),
        )
        self.received += moved
        if held:
            self._take_back(pipe[0], held, refusal, raised)
        if raised is not None:
            raise raised
        if self.told == errno.ENOBUFS:
            self.splices, self.told = False, 0  # it is too small: recvmsg can do as well
        return moved + held

    def _take_back(self, pipe: int, held: int, refusal: int, raised: BaseException | None) -> None:
        """What the file refused comes out of the pipe; perhaps it takes it another way."""
        rest = b""
        while len(rest) < held:
            rest += os.read(pipe, held - len(rest))
        if refusal != errno.EINVAL:
            text = f"splice to the file: {os.strerror(refusal)}"
            raise SinkFull(raised or OSError(refusal, text), rest)
        self.splices = False  # its file system can't
        self.write(memoryview(rest))

    def close(self) -> None:
        """See `Sink.close`."""
        for end in self._pipe or ():
            os.close(end)
        self._pipe = None
        self._seek(self._start + self.received)


def _new_pipe() -> tuple[int, int]:
    ends = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    for size in _PIPE_SIZES:
        with suppress(OSError):
            fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, size)
            break
    return ends
