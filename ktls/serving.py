"""``python -m ktls serve``: a directory's files over HTTPS, by aiohttp and sendfile(2).

Theory of operation. aiohttp does HTTP on `ktls.aio.EventLoop`, and its FileResponse ranges and
conditions. Which file that sends is decided once, on a descriptor that is open (``O_PATH``: that
reads nothing and waits for nothing): where the kernel says that it really is must be inside the
directory, with no name on the way that begins with a dot. So nothing that changes meanwhile, such
as a symbolic link, leads anywhere else.

Workers are forked with a socket each, bound to the same port (``SO_REUSEPORT``). The first process
waits for what happens to them; should it die, a pipe that it held tells them.
"""

from __future__ import annotations

import asyncio
import datetime
import html
import io
import ipaddress
import logging
import mimetypes
import os
import signal
import socket
import stat
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any
from urllib.parse import quote_from_bytes, unquote_to_bytes

from aiohttp import web
from aiohttp.abc import AbstractAccessLogger, AbstractStreamWriter
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from OpenSSL import SSL

from . import offload
from .aio import EventLoop, Server

GRACE = 10.0  # seconds, for what is being sent when a signal ends it
_KILL_AFTER = GRACE + 5
_BACKLOG = 1024
_VALID = datetime.timedelta(days=30)
_STOPPING = (signal.SIGINT, signal.SIGTERM)

_log = logging.getLogger("ktls.serve")


class ServingError(ValueError):
    """It can't be served; the text is one line for the user."""


@dataclass(frozen=True)
class Options:
    """What to serve, and how.

    Attributes:
        directory: Whose files.
        bind: A local address, or a name of one.
        port: 0 means a free one.
        cert: A PEM file with the chain; None means a certificate made on the spot.
        key: Its key; None means that it is in the same file.
        workers: How many processes.
        require: Whether connections that can't go to the kernel are refused.
    """

    directory: str = "."
    bind: str = "127.0.0.1"
    port: int = 8443
    cert: str | None = None
    key: str | None = None
    workers: int = 1
    require: bool = False


def serve(options: Options) -> int:
    """Serves until SIGINT or SIGTERM.

    Args:
        options: What to serve.

    Returns:
        The exit status: 1 if a worker died.

    Raises:
        ServingError: It can't begin.
        KernelUnavailableError: Required, and not there.
    """
    if not os.path.isdir(options.directory):
        raise ServingError(f"{options.directory}: not a directory")
    if options.require:
        with offload.loopback_pair() as ends:
            offload.attach(ends[0])
    context, fingerprint = _make_context(options)
    sockets = _bind(options)
    _log_to_stderr()

    def announce() -> None:
        if fingerprint:
            sys.stdout.write(f"self-signed certificate, SHA-256 {fingerprint}\n")
        sys.stdout.write(f"serving {options.directory} on {_url(options.bind, sockets[0])}\n")
        sys.stdout.flush()

    site = _Site(_Directory(options.directory), context, options.require)
    if len(sockets) == 1:
        site.run(sockets[0], announce)
        return 0
    return _Workers(site, sockets).run(announce)


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logging.getLogger().addHandler(handler)
    _log.setLevel(logging.INFO)


# -- TLS and the port ------------------------------------------------------------------------------


def _make_context(options: Options) -> tuple[SSL.Context, str]:
    """The server's context; with a certificate made here also its fingerprint."""
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.set_min_proto_version(SSL.TLS1_2_VERSION)
    if options.cert is None:
        certificate, key = _self_signed(options.bind)
        context.use_certificate(certificate)
        context.use_privatekey(key)
        return context, certificate.fingerprint(hashes.SHA256()).hex(":").upper()
    key_file = options.key or options.cert
    with _explained(options.cert, "no certificate chain in PEM"):
        context.use_certificate_chain_file(options.cert)
    with _explained(key_file, "not the certificate's private key in PEM"):
        context.use_privatekey_file(key_file)
        context.check_privatekey()
    return context, ""


@contextmanager
def _explained(path: str, otherwise: str) -> Iterator[None]:
    """OpenSSL reads a file within: what can be wrong is the file, or ``otherwise``."""
    try:
        with open(path, "rb"):
            yield
    except OSError as error:
        raise ServingError(f"{path}: {error.strerror}") from error
    except SSL.Error as error:
        raise ServingError(f"{path}: {otherwise}") from error


def _self_signed(bind: str) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A certificate for this machine, and its key, that are only ever in memory."""
    key = ec.generate_private_key(ec.SECP256R1())
    addresses, names = {"127.0.0.1", "::1"}, {"localhost"}
    for name in (bind, socket.gethostname()):
        with suppress(ValueError):
            addresses.add(str(ipaddress.ip_address(name)))
            continue
        if name and name.isascii():
            names.add(name)
    now = datetime.datetime.now(datetime.timezone.utc)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    alternatives: list[x509.GeneralName] = [x509.DNSName(name) for name in sorted(names)]
    alternatives += [x509.IPAddress(ipaddress.ip_address(each)) for each in sorted(addresses)]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + _VALID)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    return certificate, key


def _bind(options: Options) -> list[socket.socket]:
    """A bound socket for each worker, all on the same port."""
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(
            options.bind, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, *_, address = found[0]
        if options.workers > 1 and options.port:  # others may be there, and willing to share
            _bound(family, address, shared=False).close()
        for _ in range(options.workers):
            sockets.append(_bound(family, address, shared=options.workers > 1))
            address = sockets[0].getsockname()
    except (OSError, UnicodeError) as error:
        for sock in sockets:
            sock.close()
        reason = error.strerror if isinstance(error, OSError) else "not a host's name"
        raise ServingError(
            f"can't listen on {options.bind} port {options.port}: {reason}"
        ) from error
    return sockets


def _bound(family: int, address: Any, *, shared: bool) -> socket.socket:  # noqa: ANN401 - a sockaddr
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
        if not shared:
            sock.listen(_BACKLOG)  # which fails where another listens
    except BaseException:
        sock.close()
        raise
    return sock


def _url(bind: str, sock: socket.socket) -> str:
    """What to enter into a browser on this machine."""
    host, port = sock.getsockname()[:2]
    if ipaddress.ip_address(host.partition("%")[0]).is_unspecified:
        name = "localhost"
    else:
        name = f"[{bind}]" if ":" in bind else bind
    return f"https://{name}:{port}/"


# -- files -----------------------------------------------------------------------------------------


class _Directory:
    """What is served: files and directories inside one, those without a dot in front."""

    def __init__(self, root: str) -> None:
        self._root = os.path.realpath(root)

    @contextmanager
    def opened(self, names: list[str]) -> Iterator[tuple[int, str]]:
        """Opens what is there, for nothing but to say which it is; yields it and its own name.

        Raises:
            HTTPNotFound: Nothing is there, or nothing that is served.
        """
        if any(map(_hidden, names)):
            raise web.HTTPNotFound
        try:
            descriptor = os.open(os.path.join(self._root, *names), os.O_PATH | os.O_CLOEXEC)
        except (OSError, ValueError) as error:  # a zero byte in its name
            raise web.HTTPNotFound from error
        try:
            real = os.readlink(_path(descriptor))
            if not self._has(real):
                raise web.HTTPNotFound
            yield descriptor, real
        finally:
            os.close(descriptor)

    def _has(self, real: str) -> bool:
        """Whether a path without symbolic links is of something served."""
        try:
            names = PurePath(real).relative_to(self._root).parts
        except ValueError:
            return False
        return not any(map(_hidden, names))

    def find(self, path: str) -> web.StreamResponse:
        """Answers a request for a path, as it stands in the URL."""
        names = [name for name in os.fsdecode(unquote_to_bytes(path)).split("/") if name]
        with self.opened(names) as (descriptor, real):
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISDIR(mode):
                if not path.endswith("/"):  # its links are relative; no // in front: that's a host
                    raise web.HTTPMovedPermanently("/" + "".join(f"{_quote(n)}/" for n in names))
                return self._listing(names, descriptor, real)
            if not stat.S_ISREG(mode) or path.endswith("/"):
                raise web.HTTPNotFound
            return _OpenFile(os.dup(descriptor), names[-1])

    def _listing(self, names: list[str], descriptor: int, real: str) -> web.Response:
        title = _escape("/" + "".join(f"{name}/" for name in names))
        items = ['<li><a href="../">../</a>'] if names else []
        try:
            with os.scandir(_path(descriptor)) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    name = self._entry(entry, real)
                    if name:
                        items.append(f'<li><a href="./{_quote(name)}">{_escape(name)}</a>')
        except OSError as error:
            raise web.HTTPForbidden from error
        text = f"<!doctype html>\n<title>{title}</title>\n<h1>{title}</h1>\n<ul>\n"
        return web.Response(
            text=text + "\n".join(items) + "\n</ul>\n", content_type="text/html", charset="utf-8"
        )

    def _entry(self, entry: os.DirEntry[str], directory: str) -> str:
        """An entry's name, with a slash if it is a directory; empty if it isn't served."""
        link = entry.is_symlink() and os.path.realpath(os.path.join(directory, entry.name))
        if _hidden(entry.name) or (link and not self._has(link)):
            return ""
        with suppress(OSError):
            if entry.is_dir():
                return f"{entry.name}/"
            if entry.is_file():
                return entry.name
        return ""


class _OpenFile(web.FileResponse):
    """A file that was opened, whatever its path leads to by now; none beside it that is packed."""

    def __init__(self, descriptor: int, name: str) -> None:
        kind, encoding = mimetypes.guess_type(name)
        headers = {
            "Content-Type": kind if kind and not encoding else "application/octet-stream",
            "X-Content-Type-Options": "nosniff",
        }
        super().__init__(_path(descriptor), headers=headers)
        self._file = io.FileIO(descriptor)

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Sends it."""
        try:
            return await super().prepare(request)
        finally:
            self._file.close()


def _path(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}"


def _hidden(name: str) -> bool:
    return name.startswith(".")


def _quote(name: str) -> str:
    return quote_from_bytes(os.fsencode(name))


def _escape(name: str) -> str:
    return html.escape(os.fsencode(name).decode("utf-8", "replace"))


# -- serving ---------------------------------------------------------------------------------------


class _AccessLog(AbstractAccessLogger):
    """One line a response: who, what, status, announced length, who encrypted it."""

    def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
        """Writes it."""
        asked = ascii(f"{request.method} {request.path_qs}")
        length = "-" if response.content_length is None else response.content_length
        where = request.get("encrypted by") or _encrypted_by(request)
        self.logger.info(
            "%s %s %s %s %s %.3fs", request.remote, asked, response.status, length, where, time
        )


def _encrypted_by(request: web.BaseRequest) -> str:
    transport = request.transport
    sending = transport is not None and transport.get_extra_info("ktls_send_enabled")
    return "kernel" if sending else "userspace"


@dataclass(frozen=True)
class _Site:
    """All that a process serves."""

    directory: _Directory
    context: SSL.Context
    require: bool

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        request["encrypted by"] = _encrypted_by(request)  # the log may come after the connection
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, self.directory.find, request.rel_url.raw_path)

    def run(
        self, sock: socket.socket, ready: Callable[[], object], parent: int | None = None
    ) -> None:
        """Serves until a signal, or the end of the file ``parent``; what is being sent gets out.

        Args:
            sock: Bound; it is closed.
            ready: Called when clients can come.
            parent: A descriptor of a pipe.
        """
        loop = EventLoop(ktls_options={"require": True} if self.require else None)
        stop = asyncio.Event()
        for number in _STOPPING:
            loop.add_signal_handler(number, stop.set)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
        if parent is not None:
            loop.add_reader(parent, stop.set)
        try:
            loop.run_until_complete(self._serve(loop, sock, ready, stop, parent))
            loop.run_until_complete(_end_tasks(loop))
            loop.run_until_complete(loop.shutdown_default_executor())
        finally:
            loop.close()

    async def _serve(
        self,
        loop: EventLoop,
        sock: socket.socket,
        ready: Callable[[], object],
        stop: asyncio.Event,
        parent: int | None,
    ) -> None:
        app = web.Application()
        app.router.add_get("/{path:(?s:.*)}", self._answer)
        runner = web.AppRunner(
            app, access_log=_log, access_log_class=_AccessLog, shutdown_timeout=GRACE
        )
        await runner.setup()
        assert runner.server is not None  # noqa: S101
        server = await loop.create_server(
            runner.server, sock=sock, ssl=self.context, backlog=_BACKLOG
        )
        ready()
        await stop.wait()
        for number in _STOPPING:  # a second one doesn't wait
            loop.remove_signal_handler(number)
        if parent is not None:
            loop.remove_reader(parent)
        server.close()
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_drain(runner, server), GRACE)
        server.abort_clients()


async def _drain(runner: web.AppRunner, server: Server) -> None:
    """Idle connections end at once, the others after their response."""
    await runner.cleanup()
    await server.wait_closed()


async def _end_tasks(loop: asyncio.AbstractEventLoop) -> None:
    tasks = asyncio.all_tasks(loop) - {asyncio.current_task(loop)}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class _Workers:
    """Processes that serve, watched by this one."""

    def __init__(self, site: _Site, sockets: list[socket.socket]) -> None:
        self._site = site
        self._sockets = sockets
        self._processes: set[int] = set()

    def run(self, announce: Callable[[], object]) -> int:
        """Runs them until a signal comes or one of them ends; returns the exit status."""
        watched = {*_STOPPING, signal.SIGCHLD}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
        ready, tell_ready = os.pipe()
        parent, held = os.pipe()  # the held end is closed when this process ends
        for sock in self._sockets:
            process = os.fork()
            if not process:
                os.close(ready)
                os.close(held)
                for other in self._sockets:
                    if other is not sock:
                        other.close()
                _work(self._site, sock, tell_ready, parent)
            self._processes.add(process)
        os.close(tell_ready)
        os.close(parent)
        # A worker's end of the pipe closes when it has written to it, or died.
        begun = sum(iter(lambda: len(os.read(ready, 4096)), 0))
        os.close(ready)
        if begun == len(self._sockets):
            announce()
        for sock in self._sockets:
            sock.close()
        try:
            return self._watch(watched)
        finally:
            os.close(held)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _watch(self, watched: set[signal.Signals]) -> int:
        status = 0
        while len(self._processes) == len(self._sockets):
            if signal.sigwaitinfo(watched).si_signo != signal.SIGCHLD:
                break
            for process, code in self._reap():
                status = 1
                how = f"signal {-code}" if code < 0 else f"status {code}"
                _log.error("worker %d ended with %s: all stop", process, how)
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + _KILL_AFTER
        while self._processes:
            left = deadline - time.monotonic()
            came = signal.sigtimedwait(watched, max(0, left))
            if came is None or came.si_signo != signal.SIGCHLD:  # too late, or asked again
                self._signal(signal.SIGKILL)
                deadline = time.monotonic() + _KILL_AFTER
            if any(code for _, code in self._reap()):
                status = 1
        return status

    def _signal(self, number: int) -> None:
        for process in self._processes:
            os.kill(process, number)

    def _reap(self) -> list[tuple[int, int]]:
        """Takes out those that ended; returns them with their exit codes, a signal negative."""
        ended = []
        for process in list(self._processes):
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                self._processes.remove(process)
                ended.append((process, os.waitstatus_to_exitcode(status)))
        return ended


def _work(site: _Site, sock: socket.socket, tell_ready: int, parent: int) -> None:
    """What a worker does, to its end."""
    status = 1
    try:

        def ready() -> None:
            os.write(tell_ready, b"+")
            os.close(tell_ready)

        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        site.run(sock, ready, parent)
        status = 0
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)
