"""The parts of a hand-over, each by itself and often: what `ktls.wrap` adds to a handshake."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from OpenSSL import SSL

from ktls import _ktls, offload
from ktls.engine import Secrets
from ktls.handshake import Handshake
from ktls.proof import initial_keys, prove_end
from ktls.pyopenssl import Engine
from ktls.records import HEADER_SIZE, split
from ktls.types import TrafficKeys

Records = list[bytes]


def _shake(context: SSL.Context) -> tuple[Engine, Records, Records]:
    """A handshake through memory; returns the server's side, its flights, the client's records."""
    engine = Engine.create(context, server_side=True)
    engine.want_secrets()
    server = Handshake(engine)
    client = Handshake(Engine.create(SSL.Context(SSL.TLS_CLIENT_METHOD), server_side=False))
    sent: Records = []
    received: Records = []
    while not server.done:
        received += _pass_on(client, server)
        sent.append(b"".join(_pass_on(server, client)))
    return engine, sent, received


def _pass_on(giver: Handshake, taker: Handshake) -> Records:
    records = split(giver.outgoing())
    for record in records:
        if not taker.done:  # else they are session tickets
            taker.receive(record[:HEADER_SIZE])
            taker.receive(record[HEADER_SIZE:])
    return records


def _install(keys: TrafficKeys | None) -> None:
    """A TCP connection, to whose one end the kernel's TLS is attached; or only the connection."""
    with offload.loopback_pair() as (_, sock):
        if keys is not None:
            offload.attach(sock)
            offload.install(sock, _ktls.RX, keys.rx)
            offload.install(sock, _ktls.TX, keys.tx)


PARTS = ("secrets", "keys", "proof", "pair", "install")


def ready(name: str, context: SSL.Context) -> Callable[[], object]:
    """One of `PARTS`, ready to be repeated."""
    engine, sent, received = _shake(context)
    secrets: Secrets = engine.secrets()
    parts: tuple[Callable[[], object], ...] = (
        engine.secrets,
        partial(initial_keys, secrets),
        partial(prove_end, secrets, sent, received),
        partial(_install, None),
        partial(_install, initial_keys(secrets).keys),
    )
    return dict(zip(PARTS, parts, strict=True))[name]
