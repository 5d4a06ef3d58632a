"""aiohttp's and uvicorn's own tests of TLS pass with our event loop.

They come from the sources of the versions that are installed, by name, and those that can't pass
with the reason. pyproject.toml pins the versions, for the names are theirs.
"""

from __future__ import annotations

import pytest

from .borrowed import run, sources

LIMIT = 120  # seconds

AIOHTTP = """
    test_client_functional.py::test_aiohttp_request_ssl
    test_client_functional.py::test_drop_auth_on_redirect_to_other_host
    test_client_functional.py::test_error_in_performing_request
    test_client_functional.py::test_server_hostname_override_not_reused
    test_client_functional.py::test_ssl_client
    test_client_functional.py::test_ssl_client_alpn
    test_client_functional.py::test_ssl_client_shutdown_timeout
    test_client_functional.py::test_tcp_connector_fingerprint_fail
    test_client_functional.py::test_tcp_connector_fingerprint_ok
    test_connector.py::test_start_tls_with_zero_total_timeout
    test_connector.py::test_tcp_connector_do_not_raise_connector_ssl_error
    test_connector.py::test_tcp_connector_raise_connector_ssl_error
    test_web_sendfile_functional.py::test_static_file_ssl
"""
AIOHTTP_LONG = """
    test_proxy_functional.py::test_secure_https_proxy_absolute_path
"""  # TLS within TLS, too
UVICORN = """
    test_ssl.py::test_run
    test_ssl.py::test_run_chain
    test_ssl.py::test_run_chain_only
    test_ssl.py::test_run_password
    test_ssl.py::test_run_ssl_context_factory_custom
    test_ssl.py::test_run_ssl_context_factory_default
"""
EXCLUDED = {
    "aiohttp": {
        "test_connector.py::test_start_tls_connection_returns_none": (
            "asyncio's start_tls returns None for a transport that is closed already, which "
            "aiohttp makes a ClientConnectorError of; ours raises ConnectionAbortedError, of which "
            "aiohttp makes one with another text"
        ),
        "test_proxy_functional.py::test_https_proxy_unsupported_tls_in_tls": "of Python 3.10",
        "test_proxy_functional.py::test_uvloop_secure_https_proxy": "of uvloop",
    },
    "uvicorn": dict.fromkeys(
        [
            "test_ssl.py::test_default_ssl_context_factory_requires_ssl_certfile",
            "test_ssl.py::test_is_ssl_true_when_only_factory_set",
            "test_ssl.py::test_ssl_ciphers_applied_when_set",
            "test_ssl.py::test_ssl_context_factory_must_return_ssl_context",
            "test_ssl.py::test_ssl_context_factory_mutates_default",
        ],
        "makes a configuration and no connection",
    ),
}


@pytest.fixture(
    params=["userspace", pytest.param("kernel", marks=[pytest.mark.kernel, pytest.mark.torture])]
)
def place(request: pytest.FixtureRequest) -> str:
    """Where the records are made; in the lab these tests take a minute."""
    return str(request.param)


@pytest.mark.timeout(LIMIT + 10)
@pytest.mark.parametrize(
    ("name", "tests"),
    [
        pytest.param("aiohttp", AIOHTTP, id="aiohttp"),
        pytest.param("aiohttp", AIOHTTP_LONG, id="aiohttp-long", marks=pytest.mark.torture),
        pytest.param("uvicorn", UVICORN, id="uvicorn"),
    ],
)
def test_framework(name: str, tests: str, place: str) -> None:
    """All of them pass, with all their parameters, and none is skipped."""
    names = {f"tests/{each}" for each in tests.split()}
    passed = run("pytest", sorted(names), place=place, limit=LIMIT, directory=sources(name))
    assert {each.partition("[")[0] for each in passed} == names
