"""What every answer carries: security headers, policies under which both pages work, CORS when asked for; and streams still stream."""

import http.client
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import sync_playwright
from redis import Redis
from starlette.testclient import TestClient

from app.jobs import JobStore
from worker import protocol

STATIC = Path(__file__).parents[2] / "app" / "static"
CHROMIUM = Path("/usr/bin/chromium")
PAGES = ["/", "/docs"]
Open = Callable[..., AbstractContextManager[TestClient]]
Listen = Callable[..., AbstractContextManager[int]]


def policy(answer: Any) -> dict[str, str]:
    """Directive → sources."""
    parts = (part.split(maxsplit=1) for part in answer.headers["content-security-policy"].split(";"))
    return {part[0]: part[-1] for part in parts}


def has_security_headers(headers: Any) -> bool:
    told = [headers[name] for name in ("X-Content-Type-Options", "Referrer-Policy", "X-Frame-Options")]
    return told == ["nosniff", "no-referrer", "DENY"]


def test_every_answer_has_the_security_headers(client: TestClient, submit: Callable[..., str], worker: Any) -> None:
    job = f"/jobs/{worker.succeed(worker.take(submit()))}"
    answers = [
        *(client.get(path) for path in (*PAGES, "/static/page.js", "/openapi.json", "/models", job, f"{job}/images/0", f"{job}/events")),
        client.get(f"{job}/images/0", headers={"If-None-Match": "*"}),
        client.post("/generate", json={}),
        client.post("/generate", content=b" " * 70_000),
        client.get("/nothing"),
        client.get("/static/nothing"),
        client.put("/models"),
    ]
    assert {answer.status_code for answer in answers} == {200, 304, 404, 405, 413, 422}
    assert all(has_security_headers(answer.headers) for answer in answers)


def test_an_unexpected_error_has_them_and_the_rate_too(
    on_port: Listen, key_file: Path, bearer: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(self: JobStore) -> None:
        raise RuntimeError("a test")

    monkeypatch.setattr(JobStore, "models", broken)
    headers = bearer(per_minute=100)
    with on_port(api_keys_file=key_file) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/models", headers=headers)
        answer = connection.getresponse()
        assert (answer.status, answer.headers["content-type"]) == (500, "application/problem+json")
        assert has_security_headers(answer.headers) and answer.headers["ratelimit"].startswith('"default";r=99')
        connection.close()


def test_a_refused_key_has_them_too(open_client: Open, key_file: Path, bearer: Callable[..., dict[str, str]]) -> None:
    headers = bearer(per_minute=1)
    with open_client(api_keys_file=key_file) as client:
        answers = [client.get("/models"), client.get("/models", headers=headers), client.get("/models", headers=headers)]
        assert [answer.status_code for answer in answers] == [401, 200, 429]
        assert all(has_security_headers(answer.headers) and policy(answer) for answer in answers)


# --- the policies ------------------------------------------------------------------------------------------------------


def test_the_page_loads_from_here_and_runs_nothing_inline(client: TestClient) -> None:
    told = policy(client.get("/"))
    assert told["default-src"] == "'self'" and told["img-src"] == "'self' blob: data:"
    assert not {"script-src", "style-src", "connect-src"} & set(told)  # default-src holds for them
    assert told["frame-ancestors"] == told["object-src"] == told["base-uri"] == "'none'"


def test_the_documentation_runs_no_inline_script(client: TestClient) -> None:
    told = policy(client.get("/docs"))
    assert told["default-src"] == "'self'" and not {"script-src", "style-src"} & set(told) and told["frame-ancestors"] == "'none'"


def test_what_is_no_page_may_load_nothing(client: TestClient) -> None:
    for path in ("/models", "/nothing", "/openapi.json", "/healthz"):
        assert policy(client.get(path)) == {"default-src": "'none'", "frame-ancestors": "'none'"}


@pytest.mark.parametrize("path", sorted(STATIC.glob("*.html")), ids=lambda path: path.name)
def test_a_page_has_no_script_and_no_style_inside(path: Path) -> None:
    text = path.read_text()
    assert re.findall(r"<script[^>]*>(?!</script>)", text) == [] and "<style" not in text
    assert re.findall(r"""\s(?:style|on\w+)\s*=\s*["']""", text) == [] and "javascript:" not in text


@pytest.mark.parametrize(("path", "shown"), [("/", "#service[data-state=ready]"), ("/docs", ".opblock-summary-path >> nth=0")])
def test_a_browser_has_nothing_to_complain_of(on_port: Listen, redis: Redis, live: Callable[..., None], path: str, shown: str) -> None:
    if not CHROMIUM.exists():
        pytest.fail("install Debian's package chromium")
    complaints: list[str] = []
    redis.persist(protocol.model_key("tiny"))  # a browser may take longer to start than a record lives
    live(ttl_s=600)
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with on_port() as port, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=quiet)
        page = browser.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(f"http://127.0.0.1:{port}{path}")
        page.wait_for_selector(shown, timeout=60_000)
        if path == "/docs":
            page.click("#operations-models-list_models .opblock-summary-control")
            page.click("text=Try it out")
            page.click("text=Execute")
            page.wait_for_selector("text=house cat", timeout=60_000)  # the answer itself, not the description
            page.click("button.authorize")
            page.wait_for_selector(".auth-container input", timeout=60_000)
        assert complaints == []
        page.evaluate("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = true'}))")
        assert page.evaluate("window.ran === undefined") and "Content Security Policy" in " ".join(complaints)  # so a fault would be seen
        browser.close()


# --- CORS --------------------------------------------------------------------------------------------------------------

ORIGIN = "https://example.org"


def asked(client: TestClient, origin: str = ORIGIN, method: str = "POST") -> Any:
    """What a browser asks before it calls from a page elsewhere."""
    wanted = {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": "authorization,content-type"}
    return client.options("/generate", headers={"Origin": origin, **wanted})


def test_pages_elsewhere_may_not_call_unless_that_is_set(client: TestClient) -> None:
    for answer in (client.get("/models", headers={"Origin": ORIGIN}), asked(client)):
        assert not any(name.startswith("access-control") for name in answer.headers)
    assert asked(client).status_code == 405


def test_pages_of_an_origin_that_is_set_may_call(open_client: Open, key_file: Path, bearer: Callable[..., dict[str, str]]) -> None:
    headers = {**bearer(), "Origin": ORIGIN}
    with open_client(cors_origins=f"http://localhost:3000, {ORIGIN}", api_keys_file=key_file) as client:
        leave = asked(client)  # without a key, as browsers ask
        assert leave.status_code == 200 and leave.headers["access-control-allow-origin"] == ORIGIN
        assert "Authorization" in leave.headers["access-control-allow-headers"] and "nosniff" in leave.headers["x-content-type-options"]
        answer = client.get("/models", headers=headers)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, ORIGIN)
        assert "Retry-After" in answer.headers["access-control-expose-headers"] and "access-control-allow-credentials" not in answer.headers
        refused = client.get("/models", headers={"Origin": ORIGIN})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, ORIGIN)  # the page can read why


def test_pages_of_another_origin_may_not(open_client: Open) -> None:
    with open_client(cors_origins=ORIGIN) as client:
        for origin in ("https://example.com", "http://example.org", "https://example.org.evil.test", "null"):
            assert asked(client, origin).status_code == 400
            assert "access-control-allow-origin" not in client.get("/models", headers={"Origin": origin}).headers


def test_a_star_lets_every_page_call(open_client: Open) -> None:
    with open_client(cors_origins="*") as client:
        assert client.get("/models", headers={"Origin": ORIGIN}).headers["access-control-allow-origin"] == "*"


# --- streams -----------------------------------------------------------------------------------------------------------


def test_events_come_as_they_happen_through_all_of_it(
    on_port: Listen, key_file: Path, bearer: Callable[..., dict[str, str]], submit: Callable[..., str], worker: Any
) -> None:
    """The first arrives while the job still runs, with keys, limits, CORS and headers around it."""
    headers = {**bearer(scope="admin", per_minute=100), "Origin": ORIGIN}
    job_id = worker.take(submit())
    with on_port(api_keys_file=key_file, cors_origins=ORIGIN) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", f"/jobs/{job_id}/events", headers=headers)
        answer = connection.getresponse()
        assert answer.status == 200 and answer.headers["ratelimit"] and answer.headers["x-content-type-options"] == "nosniff"
        seen = b""
        while b"event: queued" not in seen:
            seen += answer.readline()
        assert b"event: done" not in seen
        worker.succeed(job_id)
        assert b"event: done" in answer.read()
        connection.close()


def test_a_body_without_an_end_is_refused_while_it_is_sent(on_port: Listen) -> None:
    with on_port() as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.putrequest("POST", "/generate")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders()
        for _ in range(65):
            connection.send(b"400\r\n" + b" " * 1024 + b"\r\n")  # and never the last
        answer = connection.getresponse()
        assert (answer.status, answer.headers["content-type"]) == (413, "application/problem+json")
        connection.close()
