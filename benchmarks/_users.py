"""What users of a service do, as a benchmark plays them: each way is a session over HTTP, with a key, and says what it expects."""

import asyncio
import json
import random
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from _jobs import Books
from _wire import Answer, Wire

POLL_S = 0.5
WAIT_S = 30


@dataclass
class Users:
    """All of them: `await users.session()` is one, drawn by WEIGHTS."""

    url: str
    keys: dict[str, str]  # name → key
    books: Books
    draw: random.Random
    answers: Counter[str] = field(default_factory=Counter)  # "POST /generate 202" → how often
    played: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    async def session(self) -> None:
        way = self.draw.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        async with Wire(self.url, self.keys[self.draw.choice(("ann", "bob"))]) as wire:
            self.played[way.__name__] += 1
            try:
                await way(self, wire)
            except (OSError, KeyError, ValueError) as error:
                self.failures.append(f"{way.__name__}: {error!r}")

    async def call(
        self,
        wire: Wire,
        method: str,
        path: str,
        *expected: int,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        route: str = "",
    ) -> Answer:
        """An answer of another status than those expected is noted as a failure."""
        answer = await wire.send(method, path, body, headers)
        self.note(answer, method, route or path, expected)
        return answer

    def note(self, answer: Answer, method: str, route: str, expected: tuple[int, ...]) -> None:
        self.answers[f"{method} {route} {answer.status}"] += 1
        asked_back = answer.status not in (429, 503) or answer.headers.get("retry-after", "").isdigit()
        if answer.status not in expected or not asked_back:
            self.failures.append(f"{method} {route}: {answer.status} {answer.body[:300]!r}")

    def request(self, most: int = 4) -> dict[str, Any]:
        return {
            "class_label": self.draw.randrange(10),
            "steps": self.draw.randint(5, 30),
            "guidance_scale": round(self.draw.uniform(1, 4), 1),
            "num_images": self.draw.randint(1, most),
            "seed": self.draw.randrange(2**32),
        }

    async def submit(self, wire: Wire, query: str = "", **changes: Any) -> str:
        """The id of a job; empty where the key has too many, which it is told."""
        answer = await self.call(wire, "POST", f"/generate{query}", 202, 429, body={**self.request(), **changes}, route="/generate")
        if answer.status == 429:
            return ""
        job_id = str(answer.json()["id"])
        self.books.accept(job_id)
        return job_id

    async def pictures(self, wire: Wire, job_id: str) -> None:
        """Each fetched, and asked for again by one who has it; and the sheet of all."""
        job = (await self.call(wire, "GET", f"/jobs/{job_id}", 200, route="/jobs/{id}")).json()
        for image in job["images"]:
            answer = await self.call(wire, "GET", image["url"], 200, route="/jobs/{id}/images/{i}")
            tag = {"If-None-Match": answer.headers["etag"]}
            await self.call(wire, "GET", image["url"], 304, headers=tag, route="/jobs/{id}/images/{i}")
        await self.call(wire, "GET", f"{job['links']['grid']}", 200, route="/jobs/{id}/grid")


async def wait_for_a_picture(users: Users, wire: Wire) -> None:
    body = {**users.request(1), "num_images": 1}
    headers = {"Prefer": f"wait={WAIT_S}", "Accept": "image/png"}
    answer = await users.call(wire, "POST", "/generate", 200, 202, 429, body=body, headers=headers)
    if answer.status != 429:
        users.books.accept(answer.headers["location"].removeprefix("/jobs/"))


async def watch_previews(users: Users, wire: Wire) -> None:
    if not (job_id := await users.submit(wire, "?previews=true")):
        return
    last: dict[str, str] = {}
    names: list[str] = []
    while "done" not in names:
        answer = await wire.stream(f"/jobs/{job_id}/events", last)
        users.note(answer, "GET", "/jobs/{id}/events", (200,))
        lines = [line.partition(": ") for line in answer.body.decode().splitlines()]
        names += [value for name, _, value in lines if name == "event"]
        last = {"Last-Event-ID": next((value for name, _, value in reversed(lines) if name == "id"), "0")}
    await users.pictures(wire, job_id)


async def poll(users: Users, wire: Wire) -> None:
    if not (job_id := await users.submit(wire)):
        return
    while (await users.call(wire, "GET", f"/jobs/{job_id}", 200, route="/jobs/{id}")).json()["status"] in ("queued", "running"):
        await asyncio.sleep(POLL_S)
    await users.pictures(wire, job_id)


async def cancel(users: Users, wire: Wire) -> None:
    if job_id := await users.submit(wire, steps=50, num_images=4):
        await asyncio.sleep(users.draw.uniform(0, 1))
        await users.call(wire, "DELETE", f"/jobs/{job_id}", 200, 202, 409, route="/jobs/{id}")


async def submit_twice(users: Users, wire: Wire) -> None:
    body, headers = users.request(), {"Idempotency-Key": str(uuid.uuid4())}
    answers = [await users.call(wire, "POST", "/generate", 202, 429, body=body, headers=headers) for _ in range(2)]
    ids = {answer.json()["id"] for answer in answers if answer.status == 202}
    if len(ids) > 1:
        users.failures.append(f"an Idempotency-Key made {ids}")
    for job_id in ids:
        users.books.accept(job_id)


async def break_off(users: Users, wire: Wire) -> None:
    if job_id := await users.submit(wire, steps=50):
        with suppress(TimeoutError):
            await asyncio.wait_for(wire.stream(f"/jobs/{job_id}/events"), 0.3)


async def err(users: Users, wire: Wire) -> None:
    await users.call(wire, "POST", "/generate", 422, body={"class_label": "Snaeker", "steps": 0})
    await users.call(wire, "GET", "/jobs/none", 404, route="/jobs/{id}")
    async with Wire(users.url) as stranger:
        await users.call(stranger, "GET", "/jobs", 401)


async def look_around(users: Users, wire: Wire) -> None:
    path = "/jobs?limit=50"
    for _ in range(5):
        told = json.loads((await users.call(wire, "GET", path, 200, route="/jobs")).body)
        if not told["next"]:
            break
        path = f"/jobs?limit=50&cursor={told['next']}"
    for path in ("/models", "/", "/static/page.js", "/openapi.json", "/healthz"):
        await users.call(wire, "GET", path, 200)


WEIGHTS: dict[Callable[[Users, Wire], Awaitable[None]], int] = {
    wait_for_a_picture: 30,
    watch_previews: 25,
    poll: 10,
    cancel: 10,
    submit_twice: 5,
    break_off: 5,
    err: 5,
    look_around: 10,
}
