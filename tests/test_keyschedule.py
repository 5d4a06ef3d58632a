"""Key derivation against published vectors and another implementation.

Where a vector comes from is said beside it. "OpenSSL" is the command line tool of OpenSSL 3.0.22,
whose output is recorded here as literals, made by ::

    openssl kdf -keylen SIZE -kdfopt digest:HASH -kdfopt hexsecret:SECRET \
        -kdfopt hexseed:LABEL_AND_SEED TLS1-PRF
    openssl kdf -keylen SIZE -kdfopt digest:HASH -kdfopt mode:EXPAND_ONLY -kdfopt hexkey:SECRET \
        -kdfopt "prefix:tls13 " -kdfopt label:LABEL [-kdfopt hexdata:CONTEXT] TLS13-KDF
"""

from __future__ import annotations

import hashlib
import hmac

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from hypothesis import given
from hypothesis import strategies as st

from ktls.keyschedule import expand_label, next_secret, prf, tls12_keys, tls13_keys
from ktls.types import Cipher

unhex = bytes.fromhex

# "TLS 1.2 test vectors" on the IETF TLS mailing list
# (https://www.ietf.org/mail-archive/web/tls/current/msg03416.html), as many implementations carry
# them; OpenSSL's TLS1-PRF gives the same output.
PRF_VECTORS = [
    pytest.param(
        "sha256",
        "9bbe436ba940f017b17652849a71db35",
        "a0ba9f936cda311827a6f796ffd5198c",
        """
        e3f229ba727be17b8d122620557cd453c2aab21d07c3d495329b52d4e61edb5a
        6b301791e90d35c9c9a46b4e14baf9af0fa022f7077def17abfd3797c0564bab
        4fbc91666e9def9b97fce34f796789baa48082d122ee42c5a72e5a5110fff701
        87347b66""",
        id="sha256",
    ),
    pytest.param(
        "sha384",
        "b80b733d6ceefcdc71566ea48e5567df",
        "cd665cf6a8447dd6ff8b27555edb7465",
        """
        7b0c18e9ced410ed1804f2cfa34a336a1c14dffb4900bb5fd7942107e81c83cd
        e9ca0faa60be9fe34f82b1233c9146a0e534cb400fed2700884f9dc236f80edd
        8bfa961144c9e8d792eca722a7b32fc3d416d473ebc2c5fd4abfdad05d918425
        9b5bf8cd4d90fa0d31e2dec479e4f1a26066f2eea9a69236a3e52655c9e9aee6
        91c8f3a26854308d5eaa3be85e0990703d73e56f""",
        id="sha384",
    ),
]

# RFC 8448 section 3 ("Simple 1-RTT Handshake"): traffic secret, write key, write IV.
RFC8448_KEYS = {
    "SERVER_HANDSHAKE_TRAFFIC_SECRET": (
        "b67b7d690cc16c4e75e54213cb2d37b4e9c912bcded9105d42befd59d391ad38",
        "3fce516009c21727d0f2e4e86ee403bc",
        "5d313eb2671276ee13000b30",
    ),
    "CLIENT_HANDSHAKE_TRAFFIC_SECRET": (
        "b3eddb126e067f35a780b3abf45e2d8f3b1a950738f52e9600746a0e27a55a21",
        "dbfaa693d1762c5b666af5d950258d01",
        "5bd3c71b836e0b76bb73265f",
    ),
    "SERVER_TRAFFIC_SECRET_0": (
        "a11af9f05531f856ad47116b45a950328204b4f44bfb6b3a4b4f1f3fcb631643",
        "9f02283b6c9c07efc26bb9f2ac92e356",
        "cf782b88dd83549aadf1e984",
    ),
    "CLIENT_TRAFFIC_SECRET_0": (
        "9e40646ce79a7f9dc05af8889bce6552875afa0b06df0087f792ebb7c17504a5",
        "17422dda596ed5d9acd890e3c63f5051",
        "5b78923dee08579033e523d9",
    ),
}

# The application secrets above after a KeyUpdate; not in the RFC. OpenSSL, label "traffic upd"; the
# same literals are in Botan's src/tests/test_tls_cipher_state.cpp.
UPDATED = {
    "SERVER_TRAFFIC_SECRET_0": "51921b8aa3001976eb401d0a4319a8516416a6c56001a357e5d162031e84f916",
    "CLIENT_TRAFFIC_SECRET_0": "fcdfcc72725aaee48bf64e4fd8b749cdbdbab39d90da0b26e2245ca6ea167207",
}

# OpenSSL, TLS13-KDF: hash, label, context, output; the secret is 00 01 02 ... as long as the hash.
COUNTING = bytes(range(48))
EXPANDED = [
    ("sha256", "key", b"", "2ffbc449e87844051c7768f61ffd8ad070830f01ec2c520ef65f08e8296dffa0"),
    ("sha256", "iv", b"", "2f41c846a431a163814bcd71"),
    (
        "sha256",
        "traffic upd",
        b"",
        "2cecd0a17506ef5fa73edc062d6e7b5397cf074ec1b4d8f99a120772932f0b45",
    ),
    ("sha256", "finished", b"", "38bfb0a834fc61265acc278446da8b66db085dbf77c75210a53deb87a4cc7d0e"),
    ("sha384", "key", b"", "6877d022f1c61d24ebb7487c16752d9a4798e40431c75b39320e537c90e23225"),
    ("sha384", "iv", b"", "42822531a0fe88648fc09e9f"),
    (
        "sha384",
        "traffic upd",
        b"",
        "401331b63e9d59f202e8f041042d9516f4cd7fa2e2ee14631d3b49fc340d7af3"
        "7fc2c0c9f252d8036f81ec5b85cbe5db",
    ),
    (
        "sha384",
        "c ap traffic",
        COUNTING,
        "54b19ac203643cc62f2444c0d0e3332f95221ca8d6a26fe833f2dc35913ce69d"
        "756ab60fdf7f89cd31b3788f04d39b0f",
    ),
]

# OpenSSL, TLS1-PRF: the key block for master secret 00..2f, client random 40..5f, server random
# 80..9f, seed "key expansion", server random, client random.
CLIENT_RANDOM, SERVER_RANDOM = bytes(range(0x40, 0x60)), bytes(range(0x80, 0xA0))
SHA256_BLOCK = """
    a1c8bdbce8830007e5719b5f9764ae0c42c3a103d08d01b711b292bfd1f33247
    3e5667ef1f21ed64b616b533929f8e737406938bbae4d1387dbb67a32bbfd03f
    e3f3a5e61a434e9c07de3b04218aeb811ebeced2da38d56b"""
SHA384_BLOCK = """
    c01fa61789f58022d722461abcb5df04cf985a08f0d461ab4d544db598b85319
    03c0472368c11f6751efc2d81d6b896d8db6be95536abb42a66b015259cf7264
    092ed6c52036945c"""
BLOCKS = [
    (Cipher.AES_GCM_128, "sha256", SHA256_BLOCK, (16, 16, 4, 4)),
    (Cipher.AES_CCM_128, "sha256", SHA256_BLOCK, (16, 16, 4, 4)),
    (Cipher.AES_GCM_256, "sha384", SHA384_BLOCK, (32, 32, 4, 4)),
    (Cipher.CHACHA20_POLY1305, "sha256", SHA256_BLOCK, (32, 32, 12, 12)),
]


@pytest.mark.parametrize(("name", "secret", "seed", "output"), PRF_VECTORS)
def test_prf(name: str, secret: str, seed: str, output: str) -> None:
    """At full length, and every shorter one is a prefix."""
    expected = unhex(output)
    for size in (0, 1, 47, 48, 49, 64, len(expected)):
        assert prf(name, unhex(secret), b"test label", unhex(seed), size) == expected[:size]


@pytest.mark.parametrize(("name", "label", "context", "output"), EXPANDED)
def test_expand_label(name: str, label: str, context: bytes, output: str) -> None:
    secret = COUNTING[: hashlib.new(name).digest_size]
    size = len(unhex(output))
    assert expand_label(name, secret, label.encode(), context, size) == unhex(output)


@pytest.mark.parametrize("label", RFC8448_KEYS)
def test_tls13_keys(label: str) -> None:
    secret, key, iv = map(unhex, RFC8448_KEYS[label])
    assert tls13_keys("sha256", Cipher.AES_GCM_128, secret) == (key, iv)


@pytest.mark.parametrize("cipher", [Cipher.AES_GCM_256, Cipher.CHACHA20_POLY1305])
def test_tls13_keys_of_32_bytes(cipher: Cipher) -> None:
    name = "sha384" if cipher is Cipher.AES_GCM_256 else "sha256"
    key, iv = (unhex(row[3]) for row in EXPANDED if row[0] == name and row[1] in ("key", "iv"))
    secret = COUNTING[: hashlib.new(name).digest_size]
    assert tls13_keys(name, cipher, secret) == (key, iv)


@pytest.mark.parametrize("label", UPDATED)
def test_next_secret(label: str) -> None:
    assert next_secret("sha256", unhex(RFC8448_KEYS[label][0])) == unhex(UPDATED[label])


def test_next_secret_sha384() -> None:
    expected = next(unhex(row[3]) for row in EXPANDED if row[:2] == ("sha384", "traffic upd"))
    assert next_secret("sha384", COUNTING) == expected


@pytest.mark.parametrize(("cipher", "name", "block", "sizes"), BLOCKS)
def test_tls12_keys(
    cipher: Cipher, name: str, block: str, sizes: tuple[int, int, int, int]
) -> None:
    """RFC 5246 section 6.3: both keys, then both nonces, the client's first."""
    parts, rest = [], unhex(block)
    for size in sizes:
        parts.append(rest[:size])
        rest = rest[size:]
    client_key, server_key, client_nonce, server_nonce = parts
    assert tls12_keys(name, cipher, COUNTING, CLIENT_RANDOM, SERVER_RANDOM) == (
        (client_key, client_nonce),
        (server_key, server_nonce),
    )


@given(
    name=st.sampled_from(["sha256", "sha384"]),
    label=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=32),
    context=st.binary(max_size=64),
    size=st.integers(1, 255),
)
def test_expand_label_is_hkdf(name: str, label: str, context: bytes, size: int) -> None:
    """RFC 8446 section 7.1 by hand: HkdfLabel through HKDF-Expand (RFC 5869 section 2.3)."""
    secret = COUNTING[: hashlib.new(name).digest_size]
    full = b"tls13 " + label.encode()
    info = bytes([0, size, len(full)]) + full + bytes([len(context)]) + context
    expected, block, number = b"", b"", 1
    while len(expected) < size:
        block = hmac.digest(secret, block + info + bytes([number]), name)
        expected += block
        number += 1
    assert expand_label(name, secret, label.encode(), context, size) == expected[:size]
    algorithm = hashes.SHA256() if name == "sha256" else hashes.SHA384()
    assert HKDFExpand(algorithm, size, info).derive(secret) == expected[:size]
