import socket

import pytest

from miles.config.address import family_of, is_loopback, url_of


@pytest.mark.parametrize(
    ("host", "loopback", "url"),
    [
        ("127.0.0.1", True, "http://127.0.0.1:80"),
        ("127.5.0.1", True, "http://127.5.0.1:80"),
        ("localhost", True, "http://localhost:80"),
        ("::1", True, "http://[::1]:80"),
        ("0.0.0.0", False, "http://0.0.0.0:80"),
        ("::", False, "http://[::]:80"),
        ("fd00::2", False, "http://[fd00::2]:80"),
        ("10.0.0.7", False, "http://10.0.0.7:80"),
        ("node7.cluster", False, "http://node7.cluster:80"),
    ],
)
def test_addresses(host: str, loopback: bool, url: str) -> None:
    assert is_loopback(host) == loopback
    assert url_of(host, 80) == url
    assert family_of(host) == (socket.AF_INET6 if url[7] == "[" else socket.AF_INET)
