"""CPython's own tests of TLS in asyncio pass with our event loop.

They are the interpreter's own, by name, and those that can't pass with the reason. The names are of
one version; what another lacks is left out there.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import unittest

import pytest

from .aio_kit import place
from .borrowed import run

__all__ = ["place"]  # a fixture

PACKAGE = "test.test_asyncio"
LISTED = sys.version_info[:3] == (3, 11, 7)  # whose tests these are
LIMIT = 180  # seconds

OF_A_LOOP = """
    connect_accepted_socket_ssl_timeout_for_plain_socket create_server_ssl
    create_server_ssl_match_failed create_server_ssl_verified create_server_ssl_verify_failed
    create_ssl_connection create_ssl_unix_connection create_unix_server_ssl
    create_unix_server_ssl_verified create_unix_server_ssl_verify_failed ssl_connect_accepted_socket
"""
SENDFILE = """
    sendfile_ssl sendfile_ssl_close_peer_after_receiving sendfile_ssl_partial
    sendfile_ssl_pre_and_post_data
"""
START_TLS = """
    create_connection_memory_leak create_connection_ssl_failed_certificate
    create_connection_ssl_slow_handshake start_tls_client_buf_proto_1 start_tls_client_corrupted_ssl
    start_tls_client_reg_proto_1 start_tls_server_1 start_tls_slow_client_cancel
"""
TESTS = {
    "test_base_events.BaseEventLoopWithSelectorTests": """
        create_connection_no_ssl_server_hostname_errors create_connection_ssl_server_hostname_errors
        create_connection_ssl_timeout_for_plain_socket create_server_ssl_timeout_for_plain_socket
    """,
    "test_events.EPollEventLoopTests": OF_A_LOOP,
    "test_sendfile.EPollEventLoopTests": SENDFILE,
    "test_ssl.TestSSL": f"""
        {START_TLS} connect_accepted_socket connect_timeout_warning handshake_timeout_handler_leak
        shutdown_timeout_handler_leak ssl_handshake_connection_lost ssl_handshake_timeout
    """,
    "test_sslproto.SelectorStartTLSTests": "handshake_timeout start_tls_wrong_args",
    "test_streams.StreamTests": """
        open_connection_no_loop_ssl open_unix_connection_no_loop_ssl start_tls
    """,
}
LONG = {  # many megabytes, or the same once more
    "test_events.PollEventLoopTests": OF_A_LOOP,
    "test_events.SelectEventLoopTests": OF_A_LOOP,
    "test_sendfile.PollEventLoopTests": SENDFILE,
    "test_sendfile.SelectEventLoopTests": SENDFILE,
    "test_ssl.TestSSL": """
        create_connection_ssl_1 create_server_ssl_1 create_server_ssl_over_ssl shutdown_cleanly
    """,
    "test_sslproto.SelectorStartTLSTests": START_TLS,
}
EXCLUDED = {
    "test_base_events": {
        "create_connection_ssl_server_hostname_default": "mocks a private method of asyncio's loop",
    },
    "test_selector_events": {
        "make_ssl_transport_without_ssl_error": "calls a private method of asyncio's loop",
    },
    "test_ssl": {
        "flush_before_shutdown": "reaches into asyncio's SSLProtocol for its SSLObject",
        "remote_shutdown_receives_trailing_data": "needs private methods of asyncio's SSLProtocol",
        "shutdown_timeout_handler_not_set": (
            "expects no close_notify after a truncated stream, where TLS wants one: RFC 8446 "
            "section 6.1; the connection itself ends as it expects"
        ),
        "ssl_connect_accepted_socket": "makes two contexts and nothing else",
    },
    "test_sslproto": {
        "buf_feed_data": "tests a private function of asyncio's",
        "close_during_handshake": "of SSLProtocol, a private class",
        "connection_lost": "of SSLProtocol",
        "data_received_after_closing": "of SSLProtocol",
        "eof_received_waiter": "of SSLProtocol",
        "fatal_error_no_name_error": "of SSLProtocol",
        "get_extra_info_on_closed_connection": "of SSLProtocol",
        "handshake_timeout_negative": "of SSLProtocol",
        "handshake_timeout_zero": "of SSLProtocol",
        "set_new_app_protocol": "of SSLProtocol",
        "write_after_closing": "of SSLProtocol",
    },
    "test_unix_events": {  # for which the kernel has no TLS: they are asyncio's as before
        "create_unix_connection_nossl_serverhost": "mocks, of what ours doesn't override",
        "create_unix_connection_ssl_noserverhost": "the same",
        "create_unix_connection_ssl_timeout_with_plain_sock": "the same",
        "create_unix_server_ssl_bool": "the same",
        "create_unix_server_ssl_timeout_with_plain_sock": "the same",
    },
}
OF_TLS = re.compile("ssl|tls")  # in the name of a test or its module


def ids(tests: dict[str, str]) -> set[str]:
    """The full names of the tests, of those that this interpreter has."""
    found = set()
    for path, names in tests.items():
        module, case = path.split(".")
        here = getattr(importlib.import_module(f"{PACKAGE}.{module}"), case, None)
        for name in names.split():
            if hasattr(here, f"test_{name}"):
                found.add(f"{PACKAGE}.{path}.test_{name}")
            else:
                assert not LISTED, f"{path} has no test_{name}"
    return found


def loaded() -> set[str]:
    """The tests of TLS in the modules that the lists know, as ``module.test``."""
    found = set()

    def look(suite: unittest.TestSuite) -> None:
        for each in suite:
            if isinstance(each, unittest.TestSuite):
                look(each)
            elif OF_TLS.search(each.id()) and not getattr(each, "__unittest_skip__", False):
                _, module, _, name = each.id().rsplit(".", 3)
                found.add(f"{module}.{name}")

    for module in {path.split(".")[0] for path in TESTS} | set(EXCLUDED):
        look(unittest.defaultTestLoader.loadTestsFromName(f"{PACKAGE}.{module}"))
    return found


@pytest.fixture(autouse=True)
def cpython() -> None:
    """Where the interpreter has no tests nothing can be run; CI's must have them."""
    try:
        importlib.import_module(PACKAGE)
    except ImportError:
        if "CI" in os.environ:
            raise
        pytest.skip("this Python came without its tests: Debian's are in libpython3-testsuite")


def test_nothing_is_forgotten() -> None:
    """Every test of TLS is in a list, or excluded for a reason."""
    if not LISTED:
        pytest.skip("the lists are those of another version")
    listed = {each.split(".")[2] + each[each.rindex(".") :] for each in ids(TESTS) | ids(LONG)}
    excluded = {f"{module}.test_{name}" for module, names in EXCLUDED.items() for name in names}
    assert not listed & excluded
    assert loaded() <= listed | excluded
    assert excluded <= loaded()


@pytest.mark.timeout(LIMIT + 10)
@pytest.mark.parametrize(
    "tests", [TESTS, pytest.param(LONG, marks=pytest.mark.torture)], ids=["short", "long"]
)
def test_cpython(tests: dict[str, str], place: str) -> None:
    """All of them pass, none is skipped."""
    names = ids(tests)
    assert run("unittest", sorted(names), place=place, limit=LIMIT) == names
