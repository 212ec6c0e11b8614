"""API keys: who calls and what they may. A JSON file that `dit key` writes (app/keys.py) and the API reads again when it changes.

    {"keys": [{"id": "3f9c2a10", "name": "alice", "sha256": "…", "scope": "generate", "created_at": "2026-11-25T04:18:36+00:00",
               "per_minute": 60, "in_flight": 4, "disabled": true}]}

A key reads `dit_<id>_<secret>`. Its secret is 256 random bits, which nobody guesses, so a plain SHA-256 of the key is all that is kept: a
slow hash would protect nothing and cost every call.
"""

import hashlib
import hmac
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

log = logging.getLogger("dit.api")

GENERATE, TRAIN, ADMIN = "generate", "train", "admin"
SCOPES = (GENERATE, TRAIN, ADMIN)
MAX_LIMIT = 1_000_000


@dataclass(frozen=True)
class Caller:
    """Who makes this call. What it owns (jobs, a rate) goes by the key's id: the name may be another key's one day."""

    id: str
    name: str
    scope: str
    per_minute: int | None  # calls; None: without a limit
    in_flight: int | None  # jobs that have not ended; None: without a limit

    @property
    def is_admin(self) -> bool:
        return self.scope == ADMIN

    @property
    def sees(self) -> str | None:
        """The owner whose jobs it may see; None: everybody's."""
        return None if self.is_admin else self.id

    def may(self, scope: str) -> bool:
        return self.is_admin or self.scope == scope


OPEN = Caller(id="", name="", scope=ADMIN, per_minute=None, in_flight=None)  # everybody, where there is no key file


def _text(pattern: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _is_limit(value: Any) -> bool:
    return value is None or (type(value) is int and 1 <= value <= MAX_LIMIT)


_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "id": (_text("[0-9a-f]{8}"), "8 hexadecimal digits"),
    "name": (_text(r"[A-Za-z0-9._@-]{1,64}"), "1 to 64 of A-Z a-z 0-9 . _ @ -"),
    "sha256": (_text("[0-9a-f]{64}"), "64 hexadecimal digits"),
    "scope": (lambda value: value in SCOPES, f"one of {', '.join(SCOPES)}"),
    "created_at": (_text(r"[0-9]{4}(-[0-9]{2}){2}T[0-9]{2}(:[0-9]{2}){2}(Z|[+-][0-9]{2}:[0-9]{2})"), "as 2026-11-25T04:18:36+00:00"),
    "per_minute": (_is_limit, f"a whole number from 1 to {MAX_LIMIT}, or absent"),
    "in_flight": (_is_limit, f"a whole number from 1 to {MAX_LIMIT}, or absent"),
    "disabled": (lambda value: type(value) is bool, "true, false or absent"),
}


@dataclass(frozen=True)
class ApiKey:
    """One entry of the file. ValueError for a value that is not allowed; the message does not repeat it, it may be a secret."""

    id: str
    name: str
    sha256: str  # of the whole key
    scope: str
    created_at: str
    per_minute: int | None = None
    in_flight: int | None = None
    disabled: bool = False

    def __post_init__(self) -> None:
        for field, (is_allowed, words) in _ALLOWED.items():
            if not is_allowed(getattr(self, field)):
                raise ValueError(f"{field} must be {words}")

    @property
    def caller(self) -> Caller:
        return Caller(self.id, self.name, self.scope, self.per_minute, self.in_flight)


_REQUIRED = [field.name for field in fields(ApiKey) if field.default is MISSING]


def digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


def parse_keys(data: bytes) -> tuple[ApiKey, ...]:
    """ValueError for anything that is not a key file, with the place and what is allowed there."""
    try:
        document = json.loads(data, object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"must be JSON: {error}") from error
    if not isinstance(document, dict) or list(document) != ["keys"] or not isinstance(document["keys"], list):
        raise ValueError('must be an object with one field, "keys", that is a list')
    keys = tuple(_parse(number, entry) for number, entry in enumerate(document["keys"], 1))
    check_together(keys)
    return keys


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A key that is disabled and, further down, is not: one of the two was meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {max(names, key=names.count)[:40]!a} is there twice")
    return found


def _parse(number: int, entry: Any) -> ApiKey:
    if not isinstance(entry, dict):
        raise ValueError(f"key {number} must be an object")
    unknown = [name for name in entry if name not in _ALLOWED]
    if unknown:  # a limit whose name is misspelt must not become no limit
        raise ValueError(f"key {number} has a field {unknown[0][:40]!a}; there is {', '.join(_ALLOWED)}")
    missing = [name for name in _REQUIRED if name not in entry]
    if missing:
        raise ValueError(f"key {number} lacks {missing[0]}")
    try:
        return ApiKey(**entry)
    except ValueError as error:
        raise ValueError(f"key {number}: {error}") from error


def check_together(keys: Sequence[ApiKey]) -> None:
    """ValueError if two keys have one id or hash, or two that are not disabled one name."""
    by_id: dict[str, ApiKey] = {}
    by_hash: dict[str, ApiKey] = {}
    by_name: dict[str, ApiKey] = {}
    for key in keys:
        if by_id.setdefault(key.id, key) is not key:
            raise ValueError(f"two keys have the id {key.id}")
        if by_hash.setdefault(key.sha256, key) is not key:
            raise ValueError(f"keys {by_hash[key.sha256].id} and {key.id} are the same")
        if not key.disabled and by_name.setdefault(key.name, key) is not key:
            raise ValueError(f"the name {key.name} belongs to key {by_name[key.name].id}; revoke that one, or choose another name")


def dump_keys(keys: Sequence[ApiKey]) -> bytes:
    entries = [{name: value for name, value in asdict(key).items() if value is not None and value is not False} for key in keys]
    return json.dumps({"keys": entries}, indent=2).encode() + b"\n"


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """ValueError if it cannot be read or is no key file; the message begins with the path."""
    try:
        return parse_keys(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class KeyFile:
    """The keys of a file as it is now. A new file that is broken changes nothing, and is told once."""

    def __init__(self, path: Path) -> None:
        """ValueError if there is no key file."""
        self.path = path
        self._seen = _state(path)  # before it is read: a change in between is read next time
        self._keys = read_keys(path)
        self._by_id = {key.id: key for key in self._keys}

    def find(self, key: bytes) -> ApiKey | None:
        """The entry of this key, unless it is disabled. All are compared, in constant time: the time tells nothing."""
        self._refresh()
        wanted, found = digest(key), None
        for entry in self._keys:
            if hmac.compare_digest(entry.sha256, wanted):
                found = entry
        return None if found is None or found.disabled else found

    def holds(self, entry: ApiKey) -> bool:
        """Whether this still is a key, and of the same scope: for what outlives a call, such as a stream."""
        self._refresh()
        now = self._by_id.get(entry.id)
        return now is not None and (now.sha256, now.scope, now.disabled) == (entry.sha256, entry.scope, False)

    def _refresh(self) -> None:
        seen = _state(self.path)  # a few µs a call, and so a revoked key is refused at once
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._keys = read_keys(self.path)
            self._by_id = {key.id: key for key in self._keys}
            log.info("%s was read again: %d keys", self.path, len(self._keys))
        except ValueError as error:
            log.error("the changed key file is refused, and the keys from before stay: %s", error)


def _state(path: Path) -> tuple[int, ...] | None:
    """What changes when the file does, or None where there is none. The ctime tells of its mode and owner too: either may be mended."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
