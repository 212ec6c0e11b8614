"""HTTP/1.1 over a bare connection: a client that costs little, so that the cores are the service's."""

import asyncio
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Wire:
    """One connection, one request at a time; it is made anew where the server has closed it."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self._address = urlsplit(url)
        self._key = f"Authorization: Bearer {key}\r\n" if key else ""
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._writer:
            self._writer.close()
        self._reader = self._writer = None

    async def send(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
        """Raises OSError where no whole answer comes."""
        try:
            reader = await self._ask(method, path, body, headers or {})
            status, told = await read_head(reader)
            answer = Answer(status, told, await reader.readexactly(int(told.get("content-length", 0))))
        except (OSError, asyncio.IncompleteReadError) as error:
            self.close()
            raise ConnectionError(f"{method} {path}: {error!r}") from error
        if told.get("connection") == "close":
            self.close()
        return answer

    async def stream(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        """A GET whose answer comes in pieces until it ends, well or not; what came is the body. Raises OSError before its head."""
        reader = await self._ask("GET", path, None, headers or {})
        try:
            status, told = await read_head(reader)
            if "content-length" in told:
                return Answer(status, told, await reader.readexactly(int(told["content-length"])))
        except asyncio.IncompleteReadError as error:
            raise ConnectionError(f"GET {path}: {error!r}") from error
        body = bytearray()
        with suppress(OSError, asyncio.IncompleteReadError):
            while size := int(await reader.readuntil(b"\r\n"), 16):
                body += (await reader.readexactly(size + 2))[:-2]
        self.close()
        return Answer(status, told, bytes(body))

    async def _ask(self, method: str, path: str, body: Any, headers: Mapping[str, str]) -> asyncio.StreamReader:
        if self._reader is None or self._writer is None or self._reader.at_eof():
            self.close()
            self._reader, self._writer = await asyncio.open_connection(self._address.hostname, self._address.port)
        data = b"" if body is None else json.dumps(body).encode()
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        sized = f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n" if data else ""
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._address.netloc}\r\n{self._key}{lines}{sized}\r\n"
        self._writer.write(head.encode() + data)
        return self._reader


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers. asyncio.IncompleteReadError where the connection ends before."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    fields = (line.partition(":") for line in lines[1:] if line)
    return int(lines[0].split()[1]), {name.lower(): value.strip() for name, _, value in fields}
