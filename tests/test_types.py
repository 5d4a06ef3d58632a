"""The vocabulary: what it says of the C core, what it accepts, and that it shows no secret."""

from __future__ import annotations

import copy
import dataclasses
import logging
import pickle
import re
import ssl
import traceback
from collections.abc import Callable
from typing import Any

import pytest
from OpenSSL import SSL

import ktls
from ktls import _ktls, errors
from ktls.engine import Secrets
from ktls.errors import KeyMaterialError, KTLSError
from ktls.keychain import KeyChain
from ktls.proof import HandOver
from ktls.records import RecordCipher
from ktls.types import (
    MAX_PAYLOAD,
    Alert,
    Cipher,
    CryptoInfo,
    Mode,
    Offload,
    Reason,
    TrafficKeys,
    Version,
)

from .conftest import Identity, Pair
from .test_handshake import meeting
from .test_records import info_for

TABLE = _ktls.cipher_table()


def test_ciphers_agree_with_the_core() -> None:
    """Every row is a member of the same name, with its sizes."""
    assert {row[0] for row in TABLE} == {int(cipher) for cipher in Cipher}
    for number, name, key, iv, salt, tag, tls12, tls13 in TABLE:
        cipher = Cipher(number)
        assert cipher.name.replace("_", "").lower() in re.sub(r"[^a-z0-9]", "", name.lower())
        sizes = (cipher.key_size, cipher.iv_size, cipher.salt_size, cipher.tag_size)
        assert sizes == (key, iv, salt, tag)
        assert (Version.TLS_1_2 in cipher.versions, Version.TLS_1_3 in cipher.versions) == (
            tls12,
            tls13,
        )


def test_constants() -> None:
    assert [int(version) for version in Version] == [0x0303, 0x0304]
    assert [str(version) for version in Version] == ["TLSv1.2", "TLSv1.3"]
    assert MAX_PAYLOAD == _ktls.MAX_PAYLOAD == 2**14
    assert Cipher.CHACHA20_POLY1305.iv_size == 12
    assert {cipher.iv_size + cipher.salt_size for cipher in Cipher} == {12}


@pytest.mark.parametrize("cipher", Cipher)
@pytest.mark.parametrize("version", Version)
def test_crypto_info(version: Version, cipher: Cipher) -> None:
    """Right sizes in a version that has the cipher, and nothing else."""
    if version not in cipher.versions:
        with pytest.raises(KeyMaterialError, match=cipher.name):
            info_for(version, cipher)
        return
    info = info_for(version, cipher, rec_seq=5)
    explicit = version is Version.TLS_1_2 and cipher is not Cipher.CHACHA20_POLY1305
    assert info.explicit_nonce_size == (8 if explicit else 0)
    for name in ("key", "iv", "salt"):
        right: bytes = getattr(info, name)
        for wrong in (right + b"x", right[1:], b"") if right else (b"x",):
            with pytest.raises(KeyMaterialError, match=name):
                dataclasses.replace(info, **{name: wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"version": 0x0302},
        {"version": "TLSv1.3"},
        {"cipher": 50},
        {"cipher": 59},
        {"rec_seq": -1},
        {"rec_seq": 1 << 64},
        {"key": bytearray(16)},
        {"key": "k" * 16},
        {"iv": None},
    ],
    ids=str,
)
def test_bad_crypto_info(change: dict[str, Any]) -> None:
    with pytest.raises(KeyMaterialError) as caught:
        dataclasses.replace(info_for(Version.TLS_1_3, Cipher.AES_GCM_128), **change)
    assert isinstance(caught.value, ValueError)


def test_limits_of_rec_seq() -> None:
    for rec_seq in (0, (1 << 64) - 1):
        assert info_for(Version.TLS_1_3, Cipher.AES_GCM_128, rec_seq).rec_seq == rec_seq


def test_bare_numbers() -> None:
    """An IntEnum's number either is the member, or is refused."""
    good = info_for(Version.TLS_1_3, Cipher.AES_GCM_128)
    info = dataclasses.replace(good, version=0x0304, cipher=51)  # type: ignore[arg-type]
    assert repr(info) == repr(good)
    assert info.explicit_nonce_size == 0


@pytest.mark.parametrize("rec_seq", [0.0, b"\0" * 8, "0", None], ids=repr)
def test_rec_seq_is_an_int(rec_seq: object) -> None:
    with pytest.raises(KeyMaterialError):
        dataclasses.replace(
            info_for(Version.TLS_1_3, Cipher.AES_GCM_128),
            rec_seq=rec_seq,  # type: ignore[arg-type]
        )


def test_directions_must_agree() -> None:
    one = info_for(Version.TLS_1_2, Cipher.AES_GCM_128)
    for other in (
        info_for(Version.TLS_1_3, Cipher.AES_GCM_128),
        info_for(Version.TLS_1_2, Cipher.AES_CCM_128),
    ):
        with pytest.raises(KeyMaterialError):
            TrafficKeys(one, other)


@pytest.mark.parametrize("size", [-1, 0, 62, MAX_PAYLOAD + 1])
def test_fragments_that_no_record_has(size: int) -> None:
    """RFC 8449 section 4: 64 at the least, of which TLS 1.3 needs one for the record's type."""
    info = info_for(Version.TLS_1_3, Cipher.AES_GCM_128)
    with pytest.raises(KeyMaterialError, match="16384"):
        TrafficKeys(info, info, max_fragment=size)
    for good in (63, MAX_PAYLOAD):
        assert TrafficKeys(info, info, max_fragment=good).max_fragment == good
    assert TrafficKeys(info, info).max_fragment == MAX_PAYLOAD


@pytest.mark.parametrize(
    "frozen",
    [
        info_for(Version.TLS_1_2, Cipher.AES_GCM_128),
        TrafficKeys(*[info_for(Version.TLS_1_2, Cipher.AES_GCM_128)] * 2),
        Offload(Mode.SOFTWARE),
        Secrets(Version.TLS_1_3, Cipher.AES_GCM_128, "sha256", True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_frozen(frozen: Any) -> None:  # noqa: ANN401 - four dataclasses
    for field in dataclasses.fields(frozen):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, field.name, None)


def test_offload_says_it() -> None:
    assert str(Offload(Mode.SOFTWARE)) == "software"
    text = str(Offload(Mode.USERSPACE, Reason.NO_KERNEL_TLS, "setsockopt(TCP_ULP): ENOENT"))
    assert text.startswith("userspace: ")
    assert "modprobe tls" in text
    assert text.endswith("(setsockopt(TCP_ULP): ENOENT)")
    assert all(reason.value for reason in Reason)
    assert len({reason.value for reason in Reason}) == len(Reason)


# -- no secret is ever shown --------------------------------------------------------------------


def traces(secret: bytes) -> list[str]:
    """A secret as it would look in text."""
    return [secret.hex(), secret.hex(" "), repr(secret)[2:-1], repr(list(secret))[1:-1]]


def assert_hidden(text: str, secrets: list[bytes]) -> None:
    """None of the secrets is in the text, in any form."""
    lowered = text.lower()
    for secret in secrets:
        assert len(secret) >= 12, "too short to look for"
        for trace in traces(secret):
            assert trace.lower() not in lowered


def test_reprs_hide_keys() -> None:
    info = info_for(Version.TLS_1_2, Cipher.AES_GCM_256)
    keys = TrafficKeys(info, info)
    secret = bytes(range(0x20, 0x50))
    chain = KeyChain(Version.TLS_1_3, info.cipher, "sha384", secret)
    tls12 = (secret, secret[:32], secret[16:])
    hidden = [info.key, info.salt + info.iv, secret]
    for value in (
        info,
        keys,
        HandOver(info, info, chain, chain),
        chain,
        RecordCipher(info),
        Secrets(Version.TLS_1_3, info.cipher, "sha384", True, tls13={"CLIENT": secret}),
        Secrets(Version.TLS_1_2, info.cipher, "sha384", False, tls12=tls12),
        copy.copy(keys),
        [keys],
    ):
        for text in (repr(value), str(value), f"{value}", f"{value!r}"):
            assert_hidden(text, hidden)
    assert repr(info) == "<CryptoInfo TLSv1.2 AES_GCM_256 rec_seq=0>"


def test_errors_hide_keys() -> None:
    """Not even in the text of what is refused."""
    info = info_for(Version.TLS_1_3, Cipher.AES_GCM_256)
    for change in ({"key": info.key[:-1]}, {"iv": info.key}, {"salt": info.key}):
        with pytest.raises(KeyMaterialError) as caught:
            dataclasses.replace(info, **change)  # type: ignore[arg-type]
        assert_hidden("".join(traceback.format_exception(caught.value)), [info.key[:-1]])


def test_misplaced_key_is_hidden() -> None:
    """Arguments in the wrong order: a key where the version or the cipher belongs."""
    info = info_for(Version.TLS_1_3, Cipher.AES_GCM_256)
    for change in ({"version": info.key}, {"cipher": info.key}):
        with pytest.raises(KeyMaterialError) as caught:
            dataclasses.replace(info, **change)  # type: ignore[arg-type]
        assert_hidden(str(caught.value), [info.key])


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_handshake_hides_secrets(identity: Identity, version: str) -> None:
    """Handshake, Engine and what they hand over, while the secrets are there and after."""
    pair = meeting(identity, version).run()
    for end in (pair.server, pair.client):
        shown = [repr(end), repr(end.engine), repr(vars(end.engine))]
        secrets = end.engine.secrets()
        values = [secrets.tls12[0]] if secrets.tls12[0] else list(secrets.tls13.values())
        assert values
        shown += [repr(secrets), repr(end), str(end.engine)]
        assert_hidden("\n".join(shown), values)


def test_connection_hides_secrets(
    make_pair: Callable[..., Pair],
    version: str,
    side: str,
    mode: str,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A whole connection at DEBUG, its socket's repr, and both outputs."""
    seen: list[bytes] = []
    true_init = CryptoInfo.__post_init__
    true_secrets = Secrets.__init__

    def note_key(info: CryptoInfo) -> None:
        seen.append(info.key)
        true_init(info)

    def note_secrets(self: Secrets, *args: Any, **keywords: Any) -> None:  # noqa: ANN401
        true_secrets(self, *args, **keywords)
        seen.extend([*self.tls13.values(), *filter(None, self.tls12[:1])])

    monkeypatch.setattr(CryptoInfo, "__post_init__", note_key)
    monkeypatch.setattr(Secrets, "__init__", note_secrets)
    caplog.set_level(logging.DEBUG)
    pair = make_pair(version, side, mode)
    pair.tls.sendall(b"the plaintext itself")
    assert pair.peer.recv(100) == b"the plaintext itself"
    shown = [repr(pair.tls), str(pair.tls), str(pair.tls.tx), str(pair.tls.rx)]
    pair.peer.close()
    assert pair.tls.recv(1) == b""
    pair.tls.close()
    shown += [repr(pair.tls), caplog.text, *capfd.readouterr()]
    assert bool(seen) == (mode != "userspace")
    assert_hidden("\n".join(shown), [*seen, b"the plaintext itself"])
    assert caplog.text


# -- the package ---------------------------------------------------------------------------------


def test_exports() -> None:
    """``__all__`` is sorted, and is all that isn't a module."""
    public = {
        name
        for name, value in vars(ktls).items()
        if not name.startswith("_") and not isinstance(value, type(ktls))
    }
    assert set(ktls.__all__) == public - {"annotations"}
    assert len(set(ktls.__all__)) == len(ktls.__all__)
    assert sorted(ktls.__all__, key=_like_ruff) == list(ktls.__all__)


def _like_ruff(name: str) -> tuple[int, str]:
    """RUF022: constants, then classes, then the rest."""
    kind = 0 if name.isupper() else 1 if name[0].isupper() else 2
    return kind, name


def classes() -> list[type[KTLSError]]:
    """Every error class of the package."""
    return [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, KTLSError)
    ]


def test_error_tree() -> None:
    """The docstring draws every class under its base, with the builtins that it also is."""
    assert errors.__doc__ is not None
    drawn: dict[str, list[str]] = {}
    path: list[tuple[int, str]] = []
    for line in errors.__doc__.splitlines():
        found = re.match(r"    ([|` ]*(?:\|--|`--) )?(\w+)(?: \(([\w, ]+)\))?(?:\s|$)", line)
        if found is None or not hasattr(errors, found[2]):
            continue
        depth = len(found[1] or "")
        while path and path[-1][0] >= depth:
            path.pop()
        builtins = found[3].split(", ") if found[3] else []
        drawn[found[2]] = [path[-1][1] if path else "Exception", *builtins]
        path.append((depth, found[2]))
    assert set(drawn) == {each.__name__ for each in classes()}
    for each in classes():
        assert drawn[each.__name__] == [parent.__name__ for parent in each.__bases__]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ktls.DecryptError("broken", Alert.BAD_RECORD_MAC), "BAD_RECORD_MAC"),
        (ktls.AlertReceived(Alert.UNKNOWN_CA), "ALERT_UNKNOWN_CA"),
        (ktls.AlertReceived(99), "ALERT_NUMBER 99"),
    ],
)
def test_what_the_peer_did_is_an_ssl_error(error: ssl.SSLError, reason: str) -> None:
    """Users of ``ssl`` and asyncio look for SSLError, and for why in its attributes."""
    for each in (error, copy.copy(error), pickle.loads(pickle.dumps(error))):  # noqa: S301
        assert isinstance(each, ssl.SSLError)
        assert (each.library, each.reason) == ("SSL", reason)
        assert str(each) == error.args[0]


def test_errors_are_exported() -> None:
    for each in classes():
        assert getattr(ktls, each.__name__) is each


def test_alerts_are_the_protocols() -> None:
    """RFC 8446 section 6: spot checks at both ends of the list."""
    assert (Alert.CLOSE_NOTIFY, Alert.BAD_RECORD_MAC, Alert.NO_APPLICATION_PROTOCOL) == (0, 20, 120)
    assert SSL.TLS1_3_VERSION == Version.TLS_1_3
