"""The log: a line of text, or of JSON, per record, on standard error; with the ids of request and job, where they are known."""

import json
import logging
import re
import uuid
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

LogFormat = Literal["text", "json"]
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")  # of the HTTP request that is being answered
_ACCEPTED_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_FIELDS = ("job_id", "key_id", "method", "path", "status", "seconds")  # that a record may carry besides, by `extra`


def accepted_id(given: str) -> str:
    """An X-Request-Id that a log can hold as it is; a new one in place of none, and of any other."""
    return given if _ACCEPTED_ID.fullmatch(given) else uuid.uuid4().hex


class JsonFormatter(logging.Formatter):
    """time (RFC 3339, UTC), level, logger, message; request_id, job_id and an exception where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        known = vars(record)
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := known.get("request_id") or REQUEST_ID.get():
            entry["request_id"] = request_id
        entry |= {name: known[name] for name in _FIELDS if known.get(name) not in (None, "")}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def log_to_stderr(log_format: LogFormat) -> None:
    """From now on, all that this process says at INFO and above."""
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    handler.setFormatter(JsonFormatter() if log_format == "json" else text)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
