"""`dit key`: makes and revokes keys in the key file, which app/auth.py reads."""

import contextlib
import fcntl
import os
import secrets
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from app.auth import ApiKey, check_together, digest, dump_keys, read_keys

Keys = tuple[ApiKey, ...]


def create_key(path: Path, name: str, scope: str, *, per_minute: int | None = None, in_flight: int | None = None) -> tuple[ApiKey, str]:
    """The new entry, and the key itself, which is kept nowhere. Makes the file where there is none. ValueError, OSError."""
    identity = secrets.token_hex(4)
    key = f"dit_{identity}_{secrets.token_hex(32)}"
    now = datetime.now(UTC).isoformat(timespec="seconds")
    entry = ApiKey(identity, name, digest(key.encode()), scope, now, per_minute, in_flight)
    _change(path, lambda keys: (*keys, entry))
    return entry, key


def revoke_key(path: Path, identity: str) -> ApiKey:
    """Disable a key; its entry stays, so that one knows whose it was, and its name is free again. ValueError, OSError."""

    def disable(keys: Keys) -> Keys:
        entry = next((key for key in keys if key.id == identity), None)
        if entry is None:
            raise ValueError(f"there is no key {identity[:60]!a}; there is: {', '.join(key.id for key in keys) or 'none'}")
        if entry.disabled:
            raise ValueError(f"key {identity} of {entry.name} was revoked already")
        return tuple(replace(key, disabled=True) if key is entry else key for key in keys)

    return next(key for key in _change(path, disable) if key.id == identity)


def _change(path: Path, change: Callable[[Keys], Keys]) -> Keys:
    """One at a time: of two commands the second sees what the first wrote. Nothing is written if the change is refused."""
    path = path.resolve()  # a link stays, and what it names is replaced
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        keys = change(read_keys(path) if path.exists() else ())
        check_together(keys)
        _replace(path, dump_keys(keys))
        os.fsync(folder)
        return keys
    finally:
        os.close(folder)


def _replace(path: Path, data: bytes) -> None:
    """Atomically, with mode 0600. A file that is another account's stays its own, so that an API of that account can read it."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # has that mode, whatever the umask
    try:
        with os.fdopen(handle, "wb") as file:
            if path.exists() and (owner := path.stat()).st_uid != os.geteuid():
                os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
