"""The probe: what it finds must be what the kernel then does."""

from __future__ import annotations

import functools

import pytest

import ktls
from ktls import Cipher, Mode, Reason, Version

from .conftest import KERNEL_TLS

probe = functools.cache(ktls.probe)  # one takes seconds in the lab
WORKING = (
    Cipher.AES_GCM_128,
    Cipher.AES_GCM_256,
    Cipher.AES_CCM_128,
    Cipher.CHACHA20_POLY1305,
)


def test_every_version_and_cipher_is_there_once() -> None:
    found = [(each.version, each.cipher) for each in probe().capabilities]
    assert found == [(version, cipher) for cipher in Cipher for version in cipher.versions]


@pytest.mark.skipif(KERNEL_TLS, reason="for a kernel without TLS")
def test_without_kernel_tls() -> None:
    found = probe()
    assert not found.available
    assert found.ulp.reason is Reason.NO_KERNEL_TLS
    assert {each.tx.reason for each in found.capabilities} == {Reason.NO_KERNEL_TLS}


@pytest.mark.kernel
@pytest.mark.parametrize("cipher", WORKING)
@pytest.mark.parametrize("version", list(Version))
def test_what_works(version: Version, cipher: Cipher) -> None:
    found = probe()
    assert found.available
    capability = found.find(version, cipher)
    assert capability is not None
    assert (capability.tx.mode, capability.rx.mode) == (Mode.SOFTWARE, Mode.SOFTWARE)


@pytest.mark.kernel
def test_what_this_kernel_lacks_has_its_reason() -> None:
    """No kernel of the lab has SM4; the module's absence is not taken for TLS's."""
    capability = probe().find(Version.TLS_1_3, Cipher.SM4_GCM)
    assert capability is not None
    assert capability.tx.reason is capability.rx.reason is Reason.NO_ALGORITHM


def test_a_combination_that_no_kernel_has() -> None:
    assert probe().find(Version.TLS_1_2, Cipher.SM4_GCM) is None
