"""``python -m ktls check``: what this machine can do."""

from __future__ import annotations

import gzip
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from .probe import Probe, probe
from .types import Cipher, Mode, Offload, Reason, Version

# Stable kernels before these have known holes or lost data in net/tls; a note, never a decision.
_PATCH_FLOOR = {(6, 1): 191, (6, 12): 114}


def check() -> int:
    """Prints what this kernel can do.

    Returns:
        The exit status: 0, or 1 if this machine has no kernel TLS.
    """
    found = probe()
    sys.stdout.write("\n".join(_report(found)) + "\n")
    return 0 if found.available else 1


def _report(found: Probe) -> Iterator[str]:
    yield f"kernel      {platform.system()} {platform.release()} {platform.machine()}"
    yield f"kernel TLS  {'yes' if found.available else 'no'}"
    if found.ulp.mode is Mode.SOFTWARE:
        yield ""
        yield f"{'':20}{Version.TLS_1_2!s:16}{Version.TLS_1_3!s}"
        yield f"{'':20}{'send':6}{'receive':10}{'send':6}receive"
        for cipher in Cipher:
            yield _row(found, cipher)
        yield f"{'KeyUpdate':36}{'yes' if found.rekey else 'no'}"
    advice = list(_advice(found))
    if advice:
        yield ""
        yield from (f"* {line}" for line in advice)


def _row(found: Probe, cipher: Cipher) -> str:
    row = f"{cipher.name:20}"
    for version in Version:
        capability = found.find(version, cipher)
        tx, rx = ("-", "-") if capability is None else map(_word, (capability.tx, capability.rx))
        row += f"{tx:6}{rx:10}"
    return row.rstrip()


def _word(state: Offload) -> str:
    return "yes" if state.mode is Mode.SOFTWARE else "no"


def _advice(found: Probe) -> Iterator[str]:
    """What to do about what is missing, or slow, or old."""
    if found.ulp.reason is Reason.NO_KERNEL_TLS and _built_without_tls():
        yield "this kernel was built without CONFIG_TLS: no module can add it, use another kernel"
    elif found.ulp.reason is not None:
        yield str(found.ulp)
    else:
        yield from _missing(found)
        yield from _slow()
    yield from _old()


def _missing(found: Probe) -> Iterator[str]:
    """One line for every reason, and the ciphers that have it."""
    ciphers: dict[Reason, list[str]] = {}
    for capability in found.capabilities:
        for state in (capability.tx, capability.rx):
            if state.reason is not None:
                names = ciphers.setdefault(state.reason, [])
                if capability.cipher.name not in names:
                    names.append(capability.cipher.name)
    if not found.rekey:
        yield "a TLS 1.3 KeyUpdate ends a connection: Linux 6.14 and later can replace keys"
    for reason, names in ciphers.items():
        yield f"{', '.join(names)}: {reason.value}"


def _built_without_tls() -> bool:
    """Whether the kernel's configuration is readable and says so."""
    for path in (Path("/proc/config.gz"), Path(f"/boot/config-{platform.release()}")):
        try:
            data = path.read_bytes()
        except OSError:
            continue
        text = gzip.decompress(data) if path.suffix == ".gz" else data
        return re.search(rb"^CONFIG_TLS=[ym]$", text, re.MULTILINE) is None
    return False


def _slow() -> Iterator[str]:
    """The TLS module doesn't load the processor's AES driver by itself."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
        crypto = Path("/proc/crypto").read_text(encoding="ascii", errors="replace")
    except OSError:
        return
    drivers = re.findall(r"^name +: gcm\(aes\)\ndriver +: (.+)$", crypto, re.MULTILINE)
    in_c = bool(drivers) and all("aesni" not in name and "aes-lib" not in name for name in drivers)
    if in_c and re.search(r"^flags.* aes( |$)", flags, re.MULTILINE):
        yield "AES-GCM runs in plain C though this processor has AES-NI: `modprobe aesni_intel`"


def _old() -> Iterator[str]:
    """Debian's ``uname -r`` hides the patch level, /proc/version has it."""
    try:
        text = Path("/proc/version").read_text(encoding="ascii", errors="replace")
    except OSError:
        return
    match = re.search(r"#.* Debian (\d+)\.(\d+)\.(\d+)", text) or re.match(
        r"Linux version (\d+)\.(\d+)\.(\d+)", text
    )
    if match:
        major, minor, patch = map(int, match.groups())
        floor = _PATCH_FLOOR.get((major, minor))
        if floor is not None and patch < floor:
            yield (
                f"Linux {major}.{minor}.{patch} lacks fixes of net/tls (CVE-2025-39946, "
                f"CVE-2025-38616 and others): {major}.{minor}.{floor} or later has them"
            )
