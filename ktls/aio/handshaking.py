"""A handshake on an asyncio loop."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from functools import partial

from ..errors import HandshakeError, WouldBlockError
from ..socket import Socket

FATAL = (SystemExit, KeyboardInterrupt)  # which end a loop; no callback may swallow them


class Handshaking:
    """One handshake on a loop."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        tls: Socket,
        timeout: float,
        done: Callable[[BaseException | None], object],
    ) -> None:
        """Begins, at the loop's next turn.

        Args:
            loop: Where to run.
            tls: Non-blocking; abandoned if the handshake fails.
            timeout: In seconds.
            done: Called once: with None, or with why it failed.
        """
        self._loop = loop
        self._tls = tls
        self._done: Callable[[BaseException | None], object] | None = done
        self._descriptor = tls.fileno()
        self._watching: Callable[[int], object] | None = None
        self._timer = loop.call_later(timeout, self._expire, timeout)
        self._first = loop.call_soon(self._step)

    def fail(self, error: BaseException) -> None:
        """Ends it, unless it is done."""
        if self._done is not None:
            self._stop_watching()  # before the descriptor is closed
            self._tls.abandon()
            self._finish(error)

    def _step(self) -> None:
        try:
            self._tls.do_handshake()
        except WouldBlockError:
            self._watch()
        except FATAL:
            raise
        except BaseException as error:
            self.fail(error)
        else:
            self._finish(None)

    def _watch(self) -> None:
        writes = self._tls.handshake_wants_write
        stop = self._loop.remove_writer if writes else self._loop.remove_reader
        if self._watching != stop:
            self._stop_watching()
            watch = self._loop.add_writer if writes else self._loop.add_reader
            watch(self._descriptor, self._step)
            self._watching = stop

    def _stop_watching(self) -> None:
        if self._watching is not None:
            self._watching(self._descriptor)
            self._watching = None

    def _expire(self, timeout: float) -> None:
        self.fail(
            ConnectionAbortedError(
                f"SSL handshake is taking longer than {timeout} seconds: aborting the connection"
            )
        )

    def _finish(self, error: BaseException | None) -> None:
        self._stop_watching()
        self._timer.cancel()
        self._first.cancel()
        done, self._done = self._done, None
        if done is not None:
            done(error)


async def shake_hands(
    loop: asyncio.AbstractEventLoop,
    tls: Socket,
    timeout: float,
    watched: Callable[[Handshaking], object] = lambda _: None,
) -> None:
    """Completes the handshake, or abandons the socket."""
    waiter = loop.create_future()
    handshaking = Handshaking(loop, tls, timeout, partial(_settle, waiter))
    watched(handshaking)
    try:
        await waiter
    except BaseException:
        handshaking.fail(ConnectionAbortedError("the handshake was cancelled"))
        tls.abandon()
        raise
    finally:
        del waiter  # the exception's traceback has this frame: that would be a cycle


def _settle(waiter: asyncio.Future[None], error: BaseException | None) -> None:
    if waiter.done():
        return
    if error is None:
        waiter.set_result(None)
    else:
        waiter.set_exception(_as_ssl_says(error))


def _as_ssl_says(error: BaseException) -> BaseException:
    """The error that ``ssl`` raised, which is what users of asyncio look for."""
    cause = error.__cause__
    if isinstance(error, HandshakeError) and isinstance(cause, ssl.SSLError):
        return cause
    return error
