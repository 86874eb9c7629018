"""A word with a server: its answer, or None; with real sockets."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from miles.data.service_call import call


class Echo(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200 if self.headers["Authorization"] == "Bearer secret" else 401)
        self.end_headers()
        self.wfile.write(json.dumps({"path": self.path, "body": json.loads(body) if body else None}).encode())

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>")

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()


def test_an_answer(server: str) -> None:
    assert call(server, "secret", "POST", "/stop") == {"path": "/stop", "body": None}
    assert call(server, "secret", "POST", "/leave", {"why": "ä"}) == {"path": "/leave", "body": {"why": "ä"}}


def test_a_refusal_or_nobody_is_none(server: str) -> None:
    assert call(server, "wrong", "POST", "/stop") is None
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert call(url, "secret", "POST", "/stop") is None
        silent.listen()
        assert call(url, "secret", "POST", "/stop", seconds=0.2) is None


def test_what_another_program_says_is_no_answer(server: str) -> None:
    assert call(server, "secret", "GET", "/status") is None
