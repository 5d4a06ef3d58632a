"""The C core (src/ktls.c), built by itself and run against scripted system calls.

The tests proper are in ktls_test.c; what is here builds that program, runs it once under
AddressSanitizer and UndefinedBehaviorSanitizer, and shows each of its tests as one of pytest's.
The rest checks how the core compiles: warnings, language standards, absent kernel headers, and
ktls.h by itself in C and C++. No kernel TLS is needed. CC and CXX choose the compilers.
"""

import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
SRC = TESTS.parent / "src"
PROGRAM = TESTS / "ktls_test.c"
CORE = SRC / "ktls.c"

CC = shlex.split(os.environ.get("CC") or "cc")
CXX = shlex.split(os.environ.get("CXX") or "c++")
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1"]
WRAPPED = [
    "setsockopt",
    "getsockopt",
    "sendmsg",
    "recvmsg",
    "sendfile64",
    "fstat64",
    "syscall",
    "splice",
    "fcntl64",
    "ioctl",
    "explicit_bzero",
]

NAMES = re.findall(r'^\t\{ "([^"]+)", test_\w+ \},$', PROGRAM.read_text(), re.MULTILINE)


def run(command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    """Runs a compiler or a test program.

    Args:
        command: The program and its arguments.

    Returns:
        The finished process: its exit status, and both its outputs as text in `stdout`.
    """
    return subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=50,
        check=False,
    )


def compiles(command: Sequence[str | Path]) -> None:
    """Runs a compiler, which must succeed and have nothing to say.

    Args:
        command: The compiler and its arguments.
    """
    done = run(command)
    assert (done.returncode, done.stdout) == (0, ""), shlex.join(map(str, command))


def build_program(output: Path, core: Path = CORE) -> None:
    """Builds ktls_test.c, its system calls replaced by its fakes, with sanitizers.

    Args:
        output: The program to write.
        core: What to test: ktls.c or an object file made from it.
    """
    wraps = [f"-Wl,--wrap={name}" for name in WRAPPED]
    # Some distributions' compilers fortify unasked, and that renames explicit_bzero.
    flags = ["-std=gnu11", "-U_FORTIFY_SOURCE", f"-I{SRC}", *WARNINGS, *SANITIZERS]
    compiles([*CC, *flags, "-o", output, PROGRAM, core, *wraps])


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """The test program, built and run once for this module."""
    program = tmp_path_factory.mktemp("core") / "ktls_test"
    build_program(program)
    return run([program])


def test_program(result: subprocess.CompletedProcess[str]) -> None:
    """It ends well, and its output is the whole plan and nothing else."""
    tests = [f"ok {number} - {name}" for number, name in enumerate(NAMES, 1)]
    assert result.stdout.splitlines() == [f"1..{len(NAMES)}", *tests]
    assert result.returncode == 0


@pytest.mark.parametrize("name", NAMES)
def test_c(name: str, result: subprocess.CompletedProcess[str]) -> None:
    """One test of the program says "ok"."""
    assert f"ok {NAMES.index(name) + 1} - {name}" in result.stdout.splitlines(), result.stdout


@pytest.mark.parametrize("level", ["-O0", "-O2", "-O3"])
@pytest.mark.parametrize("standard", ["c11", "gnu17"])
def test_no_warnings(standard: str, level: str, tmp_path: Path) -> None:
    """The core compiles in silence, whatever the optimizer finds out about it."""
    compiles(
        [*CC, f"-std={standard}", level, *WARNINGS, "-c", CORE, "-o", tmp_path / "ktls.o"],
    )


def test_no_kernel_headers(tmp_path: Path) -> None:
    """Without <linux/tls.h>, TCP_ULP and SOL_TLS the core is the same, and passes its tests."""
    headers = tmp_path / "include"
    for name, text in {
        "linux/tls.h": "#error absent\n",
        "netinet/tcp.h": "#include_next <netinet/tcp.h>\n#undef TCP_ULP\n",
        "sys/socket.h": "#include_next <sys/socket.h>\n#undef SOL_TLS\n",
    }.items():
        (headers / name).parent.mkdir(parents=True, exist_ok=True)
        (headers / name).write_text(text)
    old: list[str | Path] = [
        *CC,
        "-std=gnu11",
        "-isystem",
        headers,
        *WARNINGS,
        *SANITIZERS,
        "-U_FORTIFY_SOURCE",
    ]
    probe = tmp_path / "probe.c"
    probe.write_text(
        "#include <netinet/tcp.h>\n#include <sys/socket.h>\n"
        "#if defined(TCP_ULP) || defined(SOL_TLS)\n#error not an old machine\n#endif\n"
        "int probe;\n"
    )
    compiles([*old, "-c", probe, "-o", tmp_path / "probe.o"])
    probe.write_text("#include <linux/tls.h>\nint probe;\n")
    assert "absent" in run([*old, "-c", probe, "-o", tmp_path / "probe.o"]).stdout

    compiles([*old, "-c", CORE, "-o", tmp_path / "ktls.o"])
    build_program(tmp_path / "ktls_test", tmp_path / "ktls.o")
    done = run([tmp_path / "ktls_test"])
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("compiler", "suffix", "standard"),
    [(CC, "c", "c11"), (CC, "c", "gnu17"), (CXX, "cpp", "c++11"), (CXX, "cpp", "c++20")],
    ids=["c11", "gnu17", "c++11", "c++20"],
)
def test_header_alone(compiler: list[str], suffix: str, standard: str, tmp_path: Path) -> None:
    """ktls.h needs no header before it, may come twice, and links from C and C++."""
    user = tmp_path / f"user.{suffix}"
    user.write_text(
        '#include "ktls.h"\n#include "ktls.h"\n'
        "int main(void)\n{\n\treturn ktls_cipher_by_id(KTLS_CIPHER_AES_GCM_128) ? 0 : 1;\n}\n"
    )
    core, program = tmp_path / "ktls.o", tmp_path / "user"
    compiles([*CC, "-c", CORE, "-o", core])
    compiles([*compiler, f"-std={standard}", *WARNINGS, f"-I{SRC}", user, core, "-o", program])
    assert run([program]).returncode == 0
