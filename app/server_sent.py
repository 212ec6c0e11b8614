"""An entry of a job's stream in Redis → a server-sent event."""

import json
import re
from collections.abc import Mapping


def read_event(entry: Mapping[bytes, bytes]) -> tuple[str, str]:
    """Name and data, which is a JSON object on one line. ValueError for an entry that no worker wrote."""
    try:
        name, data = entry[b"event"].decode(), entry[b"data"].decode()
        document = json.loads(data)
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"not an event of a job: {ascii(error)[:200]}") from error
    if not re.fullmatch("[a-z][a-z-]{0,39}", name) or not isinstance(document, dict):
        raise ValueError("not an event of a job: its name is no word, or its data no object")
    return name, data if len(data.splitlines()) == 1 else json.dumps(document)


def server_sent(stream_id: str, name: str, data: str) -> str:
    return f"id: {stream_id}\nevent: {name}\ndata: {data}\n\n"
