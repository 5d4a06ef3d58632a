"""From a connection's secrets to its traffic keys: pure functions, no state, no I/O.

TLS 1.2: the PRF and key block of RFC 5246 sections 5 and 6.3. TLS 1.3: HKDF-Expand-Label and the
traffic keys of RFC 8446 sections 7.1 and 7.3, the next generation of a secret of section 7.2.
"""

from __future__ import annotations

import functools

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.hmac import HMAC

from .types import Cipher

_HASHES = {"sha256": hashes.SHA256(), "sha384": hashes.SHA384()}


def _mac(keyed: HMAC, data: bytes) -> bytes:
    """The HMAC of data, by one that has its key and stays as it is: that is half of the work."""
    copy = keyed.copy()
    copy.update(data)
    return copy.finalize()


def prf(hash_name: str, secret: bytes, label: bytes, seed: bytes, size: int) -> bytes:
    """The TLS 1.2 PRF, which is P_hash (RFC 5246 section 5).

    Args:
        hash_name: ``"sha256"`` or ``"sha384"``.
        secret: The HMAC key.
        label: ASCII, such as ``b"key expansion"``.
        seed: What follows the label.
        size: How many bytes to return.

    Returns:
        ``size`` pseudorandom bytes.
    """
    keyed, seed = HMAC(secret, _HASHES[hash_name]), label + seed
    out, a = b"", seed
    while len(out) < size:
        a = _mac(keyed, a)
        out += _mac(keyed, a + seed)
    return out[:size]


def expand_label(hash_name: str, secret: bytes, label: bytes, context: bytes, size: int) -> bytes:
    """HKDF-Expand-Label (RFC 8446 section 7.1), with HKDF-Expand of RFC 5869 section 2.3.

    Args:
        hash_name: ``"sha256"`` or ``"sha384"``.
        secret: As long as the hash.
        label: Without its prefix ``tls13``.
        context: A transcript hash, or empty.
        size: How many bytes to return.

    Returns:
        ``size`` pseudorandom bytes.
    """
    keyed, info = HMAC(secret, _HASHES[hash_name]), _hkdf_label(label, context, size)
    out = block = _mac(keyed, info + b"\1")
    number = 1
    while len(out) < size:
        number += 1
        block = _mac(keyed, block + info + bytes([number]))
        out += block
    return out[:size]


def _hkdf_label(label: bytes, context: bytes, size: int) -> bytes:
    label = b"tls13 " + label
    return size.to_bytes(2, "big") + bytes([len(label)]) + label + bytes([len(context)]) + context


@functools.cache
def _blocks(cipher: Cipher) -> tuple[bytes, bytes]:
    """What HKDF-Expand gives its HMAC for a key and for an IV, of which neither is longer."""
    sizes = (b"key", cipher.key_size), (b"iv", cipher.salt_size + cipher.iv_size)
    key, iv = (_hkdf_label(label, b"", size) + b"\1" for label, size in sizes)
    return key, iv


def tls12_keys(
    hash_name: str, cipher: Cipher, master_secret: bytes, client_random: bytes, server_random: bytes
) -> tuple[tuple[bytes, bytes], tuple[bytes, bytes]]:
    """The key block of TLS 1.2 (RFC 5246 section 6.3), for AEAD ciphers.

    Args:
        hash_name: The PRF's hash.
        cipher: Fixes the sizes.
        master_secret: 48 bytes.
        client_random: 32 bytes.
        server_random: 32 bytes.

    Returns:
        (key, implicit nonce) of the client's direction, then of the server's. The nonce is 4 bytes
        for AES (RFC 5288 section 3), 12 for ChaCha20-Poly1305 (RFC 7905 section 2).
    """
    key, nonce = cipher.key_size, cipher.salt_size or cipher.iv_size
    seed = server_random + client_random
    block = prf(hash_name, master_secret, b"key expansion", seed, 2 * (key + nonce))
    nonces = block[2 * key :]
    return (block[:key], nonces[:nonce]), (block[key : 2 * key], nonces[nonce:])


def tls13_keys(hash_name: str, cipher: Cipher, secret: bytes) -> tuple[bytes, bytes]:
    """One direction's traffic key (RFC 8446 section 7.3).

    Args:
        hash_name: The cipher suite's hash.
        cipher: Fixes the sizes.
        secret: The traffic secret, as long as the hash.

    Returns:
        The key, and the 12 byte IV.
    """
    for_key, for_iv = _blocks(cipher)
    keyed = HMAC(secret, _HASHES[hash_name])
    key = _mac(keyed, for_key)
    keyed.update(for_iv)
    return key[: cipher.key_size], keyed.finalize()[: cipher.salt_size + cipher.iv_size]


def next_secret(hash_name: str, secret: bytes) -> bytes:
    """The traffic secret after a KeyUpdate (RFC 8446 section 7.2).

    Args:
        hash_name: The cipher suite's hash.
        secret: The current traffic secret.

    Returns:
        The next one, of the same length.
    """
    return expand_label(hash_name, secret, b"traffic upd", b"", len(secret))
