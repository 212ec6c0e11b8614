"""`dit health api`: what a container's health check runs."""

import http.server
import socket
import threading
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from app import health
from app.cli import app
from app.health import ailment


class Answering(http.server.BaseHTTPRequestHandler):
    """`/healthz` is well."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/healthz" else 404)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Nothing on standard error."""


@pytest.fixture
def port() -> Iterator[int]:
    with http.server.HTTPServer(("127.0.0.1", 0), Answering) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_an_api_that_answers_is_well_whatever_proxy_is_named(port: int, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert ailment(host, port) is None


def test_one_that_is_not_there_or_says_nothing_is_not_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "TIMEOUT_S", 0.1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        assert "does not answer" in str(ailment("127.0.0.1", port))
        silent.listen()
        assert "does not answer" in str(ailment("127.0.0.1", port))


def test_the_command_says_it_with_its_status(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIT_PORT", str(port))
    assert CliRunner().invoke(app, ["health", "api"]).stdout == "the API is well\n"
    monkeypatch.setenv("DIT_PORT", "1")
    ill = CliRunner().invoke(app, ["health", "api"])
    assert ill.exit_code == 1 and "http://127.0.0.1:1/healthz does not answer" in ill.stderr
