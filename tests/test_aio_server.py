"""Handshakes on a loop, servers, streams, start_tls and the loop itself."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import ktls
from ktls import aio
from ktls.aio import settings
from ktls.types import Mode, Reason

from .aio_kit import LIMIT, Recorder, place, quiet, run
from .aio_kit import thread as in_background
from .conftest import KERNEL_TLS, MODES, Identity, stdlib_context, tcp_pair

__all__ = ["place", "quiet"]  # fixtures

LOOPS = pytest.mark.parametrize("factory", [aio.EventLoop, asyncio.SelectorEventLoop])
Factory = Callable[[], asyncio.AbstractEventLoop]
LOCALHOST = "127.0.0.1"


@pytest.fixture
def server(identity: Identity) -> ssl.SSLContext:
    """A server's context."""
    return stdlib_context(identity, server_side=True)


@pytest.fixture
def client(identity: Identity) -> ssl.SSLContext:
    """A client's context, which trusts that server."""
    return stdlib_context(identity, server_side=False)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Sends everything back."""
    with suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()


def port_of(serving: Any) -> int:  # noqa: ANN401
    """Where a server listens."""
    port: int = serving.sockets[0].getsockname()[1]
    return port


async def ask(
    port: int, context: ssl.SSLContext, question: bytes = b"hello", host: str = LOCALHOST
) -> bytes:
    """A client's question and the answer to it."""
    reader, writer = await aio.open_connection(host, port, ssl=context, server_hostname="localhost")
    writer.write(question)
    answer = await reader.readexactly(len(question))
    writer.close()
    await writer.wait_closed()
    return answer


# -- streams and servers ---------------------------------------------------------------------------


@LOOPS
def test_streams(
    server: ssl.SSLContext, client: ssl.SSLContext, place: str, factory: Factory
) -> None:
    """Our functions, on our loop and on asyncio's."""

    async def main() -> None:
        options: Any = MODES[place]
        serving = await aio.start_server(
            echo, LOCALHOST, 0, ssl=server, ktls_options={**options, "require": place == "kernel"}
        )
        async with serving:
            answers = (ask(port_of(serving), client, bytes([i]) * 50000) for i in range(5))
            assert [each[:1] for each in await asyncio.gather(*answers)] == [
                bytes([i]) for i in range(5)
            ]
        assert not serving.is_serving()
        assert serving.sockets == ()
        await serving.wait_closed()

    run(main, factory=factory)


@pytest.mark.parametrize("ours", ["server", "client", "both"])
def test_asyncios_own_functions(
    server: ssl.SSLContext, client: ssl.SSLContext, place: str, ours: str
) -> None:
    """On our loop asyncio's functions make our transports; and asyncio's own get on with them."""
    options: Any = {"ktls_options": MODES[place]}

    def factory() -> aio.EventLoop:
        return aio.EventLoop(**options)

    def elsewhere(port: int) -> bytes:
        async def main() -> bytes:
            reader, writer = await asyncio.open_connection(
                LOCALHOST, port, ssl=client, server_hostname="localhost"
            )
            writer.write(b"x" * 100000)
            answer = await reader.readexactly(100000)
            writer.close()
            await writer.wait_closed()
            return answer

        return asyncio.run(main())

    async def main() -> None:
        serving = await asyncio.start_server(echo, LOCALHOST, 0, ssl=server)
        assert isinstance(serving, aio.Server)
        async with serving:
            if ours == "server":
                assert len(await in_background(elsewhere, port_of(serving))) == 100000
                return
            if ours == "client":
                with socket.create_server((LOCALHOST, 0)) as listener:
                    answering = asyncio.ensure_future(in_background(serve_once, listener, server))
                    assert await ask(listener.getsockname()[1], client) == b"hello"
                    await answering
                return
            reader, writer = await asyncio.open_connection(
                LOCALHOST, port_of(serving), ssl=client, server_hostname="localhost"
            )
            assert isinstance(writer.transport, aio.Transport)
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
            writer.close()
            await writer.wait_closed()

    run(main, factory=factory)


def serve_once(listener: socket.socket, context: ssl.SSLContext) -> None:
    """One connection's echo, by ``ssl``."""
    sock, _ = listener.accept()
    sock.settimeout(LIMIT)
    with context.wrap_socket(sock, server_side=True) as peer:
        peer.sendall(peer.recv(100))
        assert peer.recv(1) == b""


def test_server_by_hand(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """start_serving, serve_forever, close_clients, abort_clients, wait_closed."""

    async def main() -> None:
        sock = socket.create_server((LOCALHOST, 0))
        serving = await aio.create_server(Recorder, sock=sock, ssl=server, start_serving=False)
        assert not serving.is_serving()
        assert serving.get_loop() is asyncio.get_running_loop()
        forever = asyncio.ensure_future(serving.serve_forever())
        await asyncio.sleep(0)
        assert serving.is_serving()
        with pytest.raises(RuntimeError, match="already"):
            await serving.serve_forever()
        protocols = []
        for _ in range(2):
            transport, protocol = await aio.create_connection(
                Recorder, LOCALHOST, port_of(serving), ssl=client, server_hostname="localhost"
            )
            protocols.append(protocol)
        transport.write(b"the handshake is done there, too")
        while len(serving._transports) < 2:
            await asyncio.sleep(0)
        forever.cancel()
        serving.close_clients()
        with pytest.raises(asyncio.CancelledError):
            await forever
        for protocol in protocols:
            await protocol.until("lost")
            assert protocol.error is None
        assert sock.fileno() < 0
        with pytest.raises(RuntimeError, match="closed"):
            await serving.start_serving()
        serving.abort_clients()
        serving.close()

    run(main)


def test_server_on_many_addresses(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    async def main() -> None:
        serving = await aio.start_server(echo, ["127.0.0.1", "127.0.0.2"], 0, ssl=server)
        async with serving:
            assert len(serving.sockets) == 2
            assert "TransportSocket" in repr(serving)
            for listener in serving.sockets:
                host, port = listener.getsockname()
                assert await ask(port, client, host=host) == b"hello"

    run(main)


def test_out_of_descriptors(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """It says so, waits a second and goes on."""

    async def main() -> None:
        serving = await aio.start_server(echo, LOCALHOST, 0, ssl=server)
        async with serving:
            waiting = socket.create_connection((LOCALHOST, port_of(serving)))
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            used = max(map(int, os.listdir("/proc/self/fd")))
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(used, 3), hard))
            try:
                await asyncio.sleep(0.05)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert await ask(port_of(serving), client) == b"hello"
            waiting.close()

    run(main, expected=("socket.accept() out of system resource",))


def test_wrong_arguments(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """Asyncio's own errors."""

    async def main() -> None:
        make: Any = aio.create_server
        connect: Any = aio.create_connection
        with pytest.raises(TypeError, match="ssl argument"):
            await make(Recorder, LOCALHOST, 0, ssl=True)
        with pytest.raises(ValueError, match="ssl_handshake_timeout should be a positive number"):
            await make(Recorder, LOCALHOST, 0, ssl=server, ssl_handshake_timeout=0)
        with pytest.raises(ValueError, match="ssl_shutdown_timeout should be a positive number"):
            await connect(Recorder, LOCALHOST, 1, ssl=client, ssl_shutdown_timeout=-1)
        with pytest.raises(ValueError, match="server_hostname"):
            await connect(Recorder, sock=None, ssl=client)
        with socket.socket() as sock, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
            with pytest.raises(ValueError, match="can not be specified at the same time"):
                await make(Recorder, LOCALHOST, 0, sock=sock, ssl=server)
            with pytest.raises(ValueError, match="Stream Socket"):
                await make(Recorder, sock=datagrams, ssl=server)
        loop: Any = asyncio.get_running_loop()
        with pytest.raises(ValueError, match="only meaningful with ssl"):
            await loop.create_server(Recorder, LOCALHOST, 0, ssl_handshake_timeout=1)

    run(main)


def test_unix_sockets_stay_asyncios(
    server: ssl.SSLContext, client: ssl.SSLContext, tmp_path: Path
) -> None:
    """The kernel has no TLS for them; our loop has all the rest of asyncio's."""

    async def main() -> None:
        path = tmp_path / "socket"
        async with await asyncio.start_unix_server(echo, path, ssl=server):
            reader, writer = await asyncio.open_unix_connection(
                path, ssl=client, server_hostname="localhost"
            )
            assert not isinstance(writer.transport, aio.Transport)
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
            writer.close()
            await writer.wait_closed()
        async with await asyncio.start_server(echo, LOCALHOST, 0) as plain:
            reader, writer = await asyncio.open_connection(LOCALHOST, port_of(plain))
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
            writer.close()
            await writer.wait_closed()

    run(main)


# -- handshakes ------------------------------------------------------------------------------------


def test_certificate_errors(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """They are those of ``ssl``, which users catch; the server keeps quiet about it."""

    async def main() -> None:
        async with await aio.start_server(echo, LOCALHOST, 0, ssl=server) as serving:
            for context, name in ((ssl.create_default_context(), "localhost"), (client, "other")):
                with pytest.raises(ssl.SSLCertVerificationError):
                    await asyncio.open_connection(
                        LOCALHOST, port_of(serving), ssl=context, server_hostname=name
                    )
            with pytest.raises(ssl.SSLCertVerificationError):
                await asyncio.open_connection(LOCALHOST, port_of(serving), ssl=True)

    run(main)


def test_no_tls_at_all(server: ssl.SSLContext) -> None:
    """A client that speaks something else, one that says nothing, one that goes away."""

    async def main() -> None:
        serving = await aio.start_server(echo, LOCALHOST, 0, ssl=server, ssl_handshake_timeout=0.2)
        async with serving:
            address = (LOCALHOST, port_of(serving))
            with (
                socket.create_connection(address) as wrong,
                socket.create_connection(address) as silent,
            ):
                socket.create_connection(address).close()
                wrong.sendall(b"GET / HTTP/1.1\r\n\r\n")
                for sock in (wrong, silent):
                    sock.settimeout(LIMIT)
                    while await in_background(sock.recv, 100):
                        pass
        await serving.wait_closed()

    run(main)


def test_client_timeout(client: ssl.SSLContext) -> None:
    async def main() -> None:
        listener = socket.create_server((LOCALHOST, 0))
        port = listener.getsockname()[1]
        with listener, pytest.raises(ConnectionAbortedError, match=r"longer than 0\.1 seconds"):
            await aio.create_connection(
                Recorder, LOCALHOST, port, ssl=client, ssl_handshake_timeout=0.1
            )

    run(main)


def test_cancelled_handshake(client: ssl.SSLContext) -> None:
    """Nothing is left of it."""

    async def main() -> None:
        with socket.create_server((LOCALHOST, 0)) as listener:
            port = listener.getsockname()[1]
            connecting = asyncio.ensure_future(
                aio.create_connection(Recorder, LOCALHOST, port, ssl=client)
            )
            accepted, _ = await in_background(listener.accept)
            with accepted:
                await in_background(accepted.recv, 1)
                connecting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await connecting
                while await in_background(accepted.recv, 1000):
                    pass

    run(main)


def test_stalling_clients(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """They cost nobody anything; beyond max_handshakes the oldest gives way."""

    async def main() -> None:
        serving = await aio.start_server(echo, LOCALHOST, 0, ssl=server, max_handshakes=3)
        async with serving:
            stalling = [
                socket.create_connection((LOCALHOST, port_of(serving)), LIMIT) for _ in range(5)
            ]
            for sock in stalling[:2]:
                assert await in_background(sock.recv, 1) == b""
            assert await ask(port_of(serving), client) == b"hello"
            for sock in stalling:
                sock.close()
        await serving.wait_closed()

    run(main)


def test_endless_hello(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """Record after record: the loop has time for others, and an end comes."""
    record = bytes([22, 3, 3, 0, 1, 0])  # a byte of a handshake message

    async def main() -> None:
        serving = await aio.start_server(echo, LOCALHOST, 0, ssl=server)
        async with serving:
            with socket.create_connection((LOCALHOST, port_of(serving))) as flooding:
                flooding.settimeout(LIMIT)

                def flood() -> None:
                    with suppress(OSError):
                        flooding.sendall(record[:5] + b"\1" + (record[:5] + b"\0") * 5000)
                        while flooding.recv(100):
                            pass

                sending = asyncio.ensure_future(in_background(flood))
                assert await ask(port_of(serving), client) == b"hello"
                await sending
        await serving.wait_closed()

    run(main)


def test_factory_that_raises(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    def fail() -> asyncio.Protocol:
        raise LookupError

    async def main() -> None:
        async with await aio.create_server(fail, LOCALHOST, 0, ssl=server) as serving:
            with suppress(ConnectionError):
                reader, writer = await aio.open_connection(
                    LOCALHOST, port_of(serving), ssl=client, server_hostname="localhost"
                )
                assert await reader.read() == b""
                writer.close()
                await writer.wait_closed()
            with socket.create_server((LOCALHOST, 0)) as listener:
                answering = asyncio.ensure_future(in_background(shake_once, listener, server))
                with pytest.raises(LookupError):
                    await aio.create_connection(
                        fail,
                        LOCALHOST,
                        listener.getsockname()[1],
                        ssl=client,
                        server_hostname="localhost",
                    )
                await answering

    with pytest.raises(AssertionError, match="LookupError"):  # in the loop's reports
        run(main)


def shake_once(listener: socket.socket, context: ssl.SSLContext) -> None:
    """One connection's handshake, and its end."""
    sock, _ = listener.accept()
    sock.settimeout(LIMIT)
    with suppress(OSError), context.wrap_socket(sock, server_side=True) as peer:
        peer.recv(1)


@pytest.mark.skipif(KERNEL_TLS, reason="this kernel has TLS")
def test_require_without_a_kernel(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """A server that can't be is told at its start; a client before anything is sent."""

    async def main() -> None:
        with pytest.raises(ktls.KernelUnavailableError):
            await aio.start_server(echo, LOCALHOST, 0, ssl=server, ktls_options={"require": True})
        listener = socket.create_server((LOCALHOST, 0))
        port = listener.getsockname()[1]
        with listener, pytest.raises(ktls.KernelUnavailableError):
            await aio.open_connection(LOCALHOST, port, ssl=client, ktls_options={"require": True})

    run(main)


@pytest.mark.kernel
def test_require_and_a_cipher_without_kernel(
    server: ssl.SSLContext, client: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    """The connection is dropped, and the log says why."""
    server.maximum_version = ssl.TLSVersion.TLSv1_2
    server.set_ciphers("ECDHE-ECDSA-AES128-SHA256")
    client.set_ciphers("ECDHE-ECDSA-AES128-SHA256")

    async def main() -> None:
        serving = await aio.start_server(
            echo, LOCALHOST, 0, ssl=server, ktls_options={"require": True}
        )
        async with serving:
            with suppress(OSError):
                reader, writer = await aio.open_connection(
                    LOCALHOST, port_of(serving), ssl=client, server_hostname="localhost"
                )
                assert await reader.read() == b""
                writer.close()
                await writer.wait_closed()
        await serving.wait_closed()

    run(main)
    assert "connection dropped: this connection has ECDHE-ECDSA-AES128-SHA256" in caplog.text


def test_reason_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """What isn't in the kernel and was to be is in the log, each reason once."""
    monkeypatch.setattr(settings, "_told", set())
    for _ in range(2):
        settings._tell_once(ktls.Offload(Mode.SOFTWARE))
        settings._tell_once(ktls.Offload(Mode.USERSPACE, Reason.NOT_WANTED))
        settings._tell_once(ktls.Offload(Mode.USERSPACE, Reason.CIPHER_SUITE, "detail"))
    assert [each.getMessage() for each in caplog.records] == [
        "kernel TLS isn't used, for one connection at least: "
        f"userspace: {Reason.CIPHER_SUITE.value} (detail)"
    ]


# -- start_tls -------------------------------------------------------------------------------------


@LOOPS
@pytest.mark.parametrize("ours", ["server", "client"])
def test_start_tls(
    server: ssl.SSLContext, client: ssl.SSLContext, place: str, factory: Factory, ours: str
) -> None:
    """Either side goes over; what was written before is sent before."""
    options: Any = {**MODES[place], "require": place == "kernel"}
    before = os.urandom(1 << 20)

    async def main() -> None:
        accepted, connecting = tcp_pair()
        sock, theirs = (accepted, connecting) if ours == "server" else (connecting, accepted)
        theirs.settimeout(LIMIT)

        def peer() -> None:
            count = 0
            while count < len(before):
                count += len(theirs.recv(min(len(before) - count, 1 << 16)))
            context = client if ours == "server" else server
            name = "localhost" if ours == "server" else None
            with context.wrap_socket(
                theirs, server_side=ours == "client", server_hostname=name
            ) as tls:
                tls.sendall(tls.recv(100))
                assert tls.recv(1) == b""

        peering = asyncio.ensure_future(in_background(peer))
        loop = asyncio.get_running_loop()
        plain, old = await loop.create_connection(Recorder, sock=sock)
        plain.write(before)
        protocol = Recorder()
        transport = await aio.start_tls(
            plain,
            protocol,
            server if ours == "server" else client,
            server_side=ours == "server",
            server_hostname=None if ours == "server" else "localhost",
            ktls_options=options,
        )
        assert transport.get_extra_info("ktls_send_enabled") is (place == "kernel")
        transport.write(b"hello")
        assert await protocol.until_data(5) == b"hello"
        transport.close()
        await protocol.until("lost")
        assert protocol.error is None
        assert old.events == ["made"]
        await peering
        while not plain.is_closing():
            await asyncio.sleep(0)

    run(main, factory=factory)


def test_start_tls_of_streams(server: ssl.SSLContext, client: ssl.SSLContext, place: str) -> None:
    """StreamWriter.start_tls on our loop, on both sides at once; and TLS within TLS."""
    options: Any = MODES[place]

    async def over(reader: asyncio.StreamReader, writer: Any) -> None:  # noqa: ANN401
        assert await reader.readline() == b"STARTTLS\n"
        writer.write(b"go\n")
        for _ in range(2):
            await writer.start_tls(server)
        await echo(reader, writer)

    async def main() -> None:
        serving = await asyncio.start_server(over, LOCALHOST, 0)
        async with serving:
            writer: Any
            reader, writer = await asyncio.open_connection(LOCALHOST, port_of(serving))
            writer.write(b"STARTTLS\n")
            assert await reader.readline() == b"go\n"
            await writer.start_tls(client, server_hostname="localhost")
            assert isinstance(writer.transport, aio.Transport)
            await writer.start_tls(client, server_hostname="localhost")
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
            writer.close()
            await writer.wait_closed()
            await asyncio.sleep(0)

    run(main, factory=lambda: aio.EventLoop(ktls_options=options))


@pytest.mark.parametrize("how", ["garbage", "silence", "abort", "not read"])
def test_start_tls_that_fails(server: ssl.SSLContext, how: str) -> None:
    """The caller gets an error, and the protocol its end, so that who waits for it doesn't hang."""

    async def main() -> None:
        accepted, connecting = tcp_pair()
        loop = asyncio.get_running_loop()
        plain, _ = await loop.create_connection(Recorder, sock=accepted)
        if how == "garbage":
            connecting.sendall(b"GET / HTTP/1.1\r\n\r\n")
        if how == "not read":
            plain.write(bytes(20 << 20))
        protocol = Recorder()
        starting = asyncio.ensure_future(
            aio.start_tls(plain, protocol, server, server_side=True, ssl_handshake_timeout=0.2)
        )
        if how == "abort":
            for _ in range(5):
                await asyncio.sleep(0)
            plain.abort()
        with pytest.raises((ConnectionError, ssl.SSLError)):
            await starting
        await protocol.until("lost")
        assert protocol.error is not None
        connecting.close()

    run(main)


def test_start_tls_and_the_plain_transport(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """Whoever closes the plain transport closes the connection: a server its clients, for one."""

    async def main() -> None:
        accepted, connecting = tcp_pair()
        loop = asyncio.get_running_loop()
        ends = []
        for sock in (accepted, connecting):
            plain, _ = await loop.create_connection(Recorder, sock=sock)
            ends.append((plain, Recorder()))
        (plain, one), (other_plain, other) = ends
        await asyncio.gather(
            aio.start_tls(plain, one, server, server_side=True),
            aio.start_tls(other_plain, other, client, server_hostname="localhost"),
        )
        plain.close()
        await asyncio.gather(one.until("lost"), other.until("lost"))
        assert one.error is other.error is None
        assert "eof" in other.events

    run(main)


def test_start_tls_of_something_else(server: ssl.SSLContext) -> None:
    async def main() -> None:
        left, right = socket.socketpair()
        plain, _ = await asyncio.get_running_loop().create_connection(Recorder, sock=left)
        with pytest.raises(TypeError, match="not supported"):
            await aio.start_tls(plain, Recorder(), server, server_side=True)
        plain.abort()
        right.close()
        await asyncio.sleep(0)

    run(main)
