"""``python -m ktls``: the commands and their arguments."""

from __future__ import annotations

import argparse
import http.client
import sys
from collections.abc import Sequence
from pathlib import Path

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
    options = _parser().parse_args(arguments)
    try:
        if options.command == "check":
            return check()
        return get(
            Download(
                options.url,
                output=options.output,
                resume=options.resume,
                authority=options.cacert,
                verify=not options.insecure,
                require=options.require,
            )
        )
    except (KTLSError, OSError, ValueError, http.client.HTTPException) as error:
        text = str(error) or type(error).__name__
        sys.stderr.write(f"ktls {options.command}: {text}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"ktls {options.command}: interrupted\n")
        return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ktls", description="Kernel TLS.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="what this kernel can do, found by trying")
    get = commands.add_parser("get", help="download a file over HTTPS, received by the kernel")
    get.add_argument("url", metavar="URL")
    get.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="by default the URL's last part; - is stdout",
    )
    get.add_argument(
        "-C",
        "--continue",
        dest="resume",
        action="store_true",
        help="go on with FILE.part, if the server's file is still the same",
    )
    get.add_argument("--cacert", metavar="PEM", help="trust these authorities instead")
    get.add_argument(
        "--insecure", action="store_true", help="don't verify the server: anybody can be it"
    )
    get.add_argument(
        "--require", action="store_true", help="fail if the kernel can't do the receiving"
    )
    return parser
