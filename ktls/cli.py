"""``python -m ktls``: the commands and their arguments."""

from __future__ import annotations

import argparse
import http.client
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .checking import check
from .errors import KTLSError
from .getting import Download, get

_INTERRUPTED = 130  # as a shell has it


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: Of the command line; None means ``sys.argv``.

    Returns:
        The exit status: 0; 1 if there is no kernel TLS (``check``) or it failed, which stderr says
        in a line; 2 for wrong arguments; 130 if it was interrupted.
    """
    parser, serve = _parsers()
    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    if command == "serve" and options["key"] and not options["cert"]:
        serve.error("--key goes with --cert")
    try:
        if command == "check":
            return check()
        if command == "get":
            return get(Download(**options))
        return _serve(options)
    except (KTLSError, OSError, ValueError, http.client.HTTPException) as error:
        return _fail(command, str(error) or type(error).__name__)
    except KeyboardInterrupt:
        _fail(command, "interrupted")
        return _INTERRUPTED


def _serve(options: dict[str, Any]) -> int:
    try:
        from . import serving  # noqa: PLC0415 - its dependency is an extra
    except ModuleNotFoundError as error:
        if error.name != "aiohttp":
            raise
        return _fail("serve", "needs aiohttp: pip install 'ktls[serve]'")
    return serving.serve(serving.Options(**options))


def _fail(command: str, why: str) -> int:
    sys.stderr.write(f"ktls {command}: {why}\n")
    return 1


def _parsers() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """That of all, and that of ``serve``."""
    parser = argparse.ArgumentParser(prog="python -m ktls", description="Kernel TLS.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="what this kernel can do, found by trying")
    serve = commands.add_parser("serve", help="a directory's files over HTTPS")
    serve.add_argument("directory", nargs="?", default=".", help="which (this one)")
    serve.add_argument("--bind", default="127.0.0.1", metavar="ADDRESS", help="(%(default)s)")
    serve.add_argument("--port", type=_port, default=8443, help="(%(default)s); 0: a free one")
    serve.add_argument("--cert", metavar="PEM", help="the certificate chain; else one is made")
    serve.add_argument("--key", metavar="PEM", help="its key, if it is in a file of its own")
    serve.add_argument("--workers", type=_count, default=1, help="processes (%(default)s)")
    serve.add_argument("--require", action="store_true", help="the kernel's TLS or nothing")
    get = commands.add_parser("get", help="download a file over HTTPS, received by the kernel")
    get.add_argument("url", metavar="URL")
    get.add_argument("-o", "--output", type=Path, metavar="FILE", help="(URL's name); - is stdout")
    get.add_argument(
        "-C", "--continue", dest="resume", action="store_true", help="go on with FILE.part"
    )
    get.add_argument("--cacert", dest="authority", metavar="PEM", help="whom to trust instead")
    get.add_argument(
        "--insecure", dest="verify", action="store_false", help="anybody can be the server"
    )
    get.add_argument("--require", action="store_true", help="the kernel's TLS or nothing")
    return parser, serve


def _port(text: str) -> int:
    return _between(text, 0, 65535)


def _count(text: str) -> int:
    return _between(text, 1, 1024)


def _between(text: str, least: int, most: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from {least} to {most}")
    return number
