"""``python -m ktls get``: a download that the kernel receives, by splice into the file.

HTTP is http.client's, on a `ktls.Socket`. The answer's head is read without reading ahead, so that
the body is still in the socket, where `Socket.recvfile` takes it from. A body in chunks has its
lengths in between, and is copied.

What arrives goes to FILE.part, which becomes FILE when it is whole. Its modification time is then
that of the server's file, by which a later resume is conditional (If-Range, RFC 9110 section
13.1.5): if the server's file has changed, or it is not known whether, it begins anew.
"""

from __future__ import annotations

import http.client
import io
import os
import re
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import formatdate, parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urljoin, urlsplit

from .socket import Socket
from .types import Mode
from .wrapping import wrap

_STEP = 1 << 22  # bytes between two looks at the progress
_TIMEOUT = 60.0  # seconds without a byte
_MOST_REDIRECTS = 10
_STDOUT = Path("-")
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_WHOLE = re.compile(r"bytes \*/(\d+)")
Progress = Callable[[int], object]


@dataclass(frozen=True)
class Download:
    """What to get, and how.

    Attributes:
        url: Begins with https.
        output: The file; None means the URL's last part, "-" standard output.
        resume: Go on with what an earlier download left.
        authority: A PEM file of authorities to trust instead of the system's.
        verify: Whether the server has to prove who it is.
        require: Whether it is an error if the kernel can't receive.
    """

    url: str
    output: Path | None = None
    resume: bool = False
    authority: str | None = None
    verify: bool = True
    require: bool = False


def get(download: Download) -> int:
    """Downloads, and says on stderr how it went.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: The URL isn't one of https.
        HTTPException: The server's answer isn't the file.
        KTLSError: As for `ktls.wrap` and `Socket.recvfile`.
        OSError: Of the network or the file.
    """
    context = ssl.create_default_context(cafile=download.authority)
    if not download.verify:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    output = download.output or Path(_name(download.url))
    part = output.with_name(output.name + ".part")
    have = part.stat() if download.resume and output != _STDOUT and part.exists() else None
    headers = {"Accept-Encoding": "identity", "User-Agent": "ktls"}
    if have is not None and have.st_size and have.st_mtime:
        headers["Range"] = f"bytes={have.st_size}-"
        headers["If-Range"] = formatdate(have.st_mtime, usegmt=True)
    started = time.monotonic()
    connection, response = _request(download, context, headers)
    tls = connection.tls
    try:
        begin, size = _extent(response, have.st_size if have is not None else 0)
        if output == _STDOUT:
            count = _receive(tls, response, sys.stdout.buffer, begin, size)
        else:
            with part.open("r+b" if begin else "wb") as file:
                file.seek(begin)
                try:
                    count = _receive(tls, response, file, begin, size)
                finally:
                    _set_time(file, response)
            part.replace(output)
        seconds = time.monotonic() - started
        sys.stderr.write(f"{output}: {_amount(count)} in {seconds:.1f} s, ")
        sys.stderr.write(f"{_amount(count / seconds)}/s, {_mode(tls, response)}\n")
    finally:
        response.close()
        connection.close()
    return 0


class _Response(http.client.HTTPResponse):
    """An answer that reads not a byte of its body ahead."""

    def __init__(self, sock: Any, *arguments: Any, **keywords: Any) -> None:  # noqa: ANN401
        super().__init__(sock, *arguments, **keywords)
        self.fp.close()
        self.fp: Any = sock.makefile("rb", buffering=0)

    def begin(self) -> None:
        super().begin()
        if self.chunked:
            self.fp = io.BufferedReader(self.fp)


class _Connection(http.client.HTTPConnection):
    """HTTP on a `ktls.Socket`, which `tls` is also when http.client lets go of it."""

    response_class = _Response
    default_port = 443

    def __init__(self, netloc: str, context: ssl.SSLContext, *, require: bool) -> None:
        super().__init__(netloc, timeout=_TIMEOUT)
        self.tls: Socket
        self._context = context
        self._require = require

    def connect(self) -> None:
        super().connect()
        self.sock = self.tls = wrap(
            self.sock,
            self._context,
            server_hostname=self.host,
            require=self._require,
            suppress_ragged_eofs=False,
        )


def _request(
    download: Download, context: ssl.SSLContext, headers: dict[str, str]
) -> tuple[_Connection, http.client.HTTPResponse]:
    """The answer to a GET, redirects followed, and its connection."""
    url = download.url
    for _ in range(_MOST_REDIRECTS + 1):
        parts = urlsplit(url)
        if parts.scheme != "https" or not parts.netloc:
            raise ValueError(f"not an https URL: {url}")
        connection = _Connection(parts.netloc.rpartition("@")[2], context, require=download.require)
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers=headers)
            response = connection.getresponse()
        except BaseException:
            connection.close()
            raise
        location = response.getheader("Location")
        if not (response.status in (301, 302, 303, 307, 308) and location):
            return connection, response
        connection.close()
        url = urljoin(url, location)
    raise http.client.HTTPException(f"more than {_MOST_REDIRECTS} redirects")


def _extent(response: http.client.HTTPResponse, have: int) -> tuple[int, int | None]:
    """Where the body begins in the file, and how long the file is to be, if that is known."""
    told = response.getheader("Content-Range", "")
    if response.status == http.client.OK:
        return 0, response.length
    if response.status == http.client.PARTIAL_CONTENT:
        match = _RANGE.fullmatch(told)
        if not match or int(match[1]) != have:
            raise http.client.HTTPException(f"the server sent another part: {told!r}")
        end = int(match[2]) + 1
        if match[3] not in ("*", str(end)) or response.length not in (None, end - have):
            raise http.client.HTTPException(f"the server sent more or less than the rest: {told!r}")
        return have, end
    whole = _WHOLE.fullmatch(told)
    if response.status == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and whole:
        if int(whole[1]) == have:  # it is all here already
            response.length = 0
            return have, have
        raise http.client.HTTPException("the server's file is another now: try without -C")
    raise http.client.HTTPException(f"the server says: {response.status} {response.reason}")


def _receive(
    tls: Socket, response: http.client.HTTPResponse, file: BinaryIO, begin: int, size: int | None
) -> int:
    """Receives the body; returns how many bytes."""
    count = 0
    with _progress(begin, size) as progress:
        while size is None or begin + count < size:
            left = _STEP if size is None else min(_STEP, size - begin - count)
            if response.chunked:
                data = response.read(min(left, _STEP >> 4))
                file.write(data)
                step = len(data)
            else:
                step = tls.recvfile(file, left)
            if not step:
                break
            count += step
            progress(step)
    if size is not None and begin + count < size:
        raise http.client.HTTPException(
            f"the connection ended {size - begin - count} bytes before the file did: -C goes on"
        )
    if size is not None and count and response.chunked and response.read(1):
        raise http.client.HTTPException("the server sent more than the rest")
    file.flush()
    return count


@contextmanager
def _progress(begin: int, size: int | None) -> Iterator[Progress]:
    """A progress bar on a terminal, if rich is there to draw one."""
    try:
        from rich import progress  # noqa: PLC0415 - an extra
        from rich.console import Console  # noqa: PLC0415
    except ImportError:
        yield lambda _: None
        return
    columns = (
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with progress.Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=size, completed=begin)
        yield lambda step: bar.advance(task, step)


def _set_time(file: BinaryIO, response: http.client.HTTPResponse) -> None:
    """The server's file's time, or none, for a resume to be sure."""
    file.flush()
    seconds = 0.0
    with suppress(TypeError, ValueError):  # no such header, or no date in it
        seconds = parsedate_to_datetime(response.getheader("Last-Modified", "")).timestamp()
    os.utime(file.fileno(), (seconds, seconds))


def _name(url: str) -> str:
    """The last part of a URL's path, as a file name that stays in this directory."""
    name = unquote(urlsplit(url).path).rpartition("/")[2].replace("\0", "")
    return "index.html" if name in ("", ".", "..") else name


def _mode(tls: Socket, response: http.client.HTTPResponse) -> str:
    suite = tls.cipher()
    name = f"{tls.version()} {suite[0] if suite else ''}"
    if tls.rx.mode is Mode.USERSPACE:
        return f"{name}, received in {tls.rx}"
    return f"{name}, received by the kernel{', copied from chunks' if response.chunked else ''}"


def _amount(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    return f"{count:.1f} GiB"
