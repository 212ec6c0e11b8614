"""Where pictures lie that are not kept in Redis: what an image store does, and what a picture is called there. Shared with app/.

One file per kind, imported only where it is chosen: folder.py, s3.py. Redis is no such store: there a picture is written in the same
transaction that commits it (worker/results.py), and expires by itself. Elsewhere it is written first, under a name that holds its
execution, and committed in Redis afterwards: a worker that has lost its job writes what nobody reads. worker/sweep.py removes what has
expired.
"""

import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol
from urllib.parse import unquote, urlsplit

Kind = Literal["redis", "folder", "s3"]
REDIS: Kind = "redis"
ROOM_BYTES: dict[Kind, int] = {"redis": 1 << 30, "folder": 10 << 30, "s3": 1 << 40}  # that pictures may take, unless a setting says so

MARK = "dit-store"  # a file of the store, by which the API and every worker see that they have the same one
_PROBE, PROBE_BYTES = "dit-probe", 1 << 16  # what is written to see whether the store takes it: about a picture
_MARKS = re.compile(r"(folder|s3)-[0-9a-f]{32}")
_PART_OF_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")
_SHARD_DIGITS = 6  # of a job's id, a UUIDv7: all jobs of about 4.7 hours
_SHARD = re.compile(f"[0-9a-f]{{{_SHARD_DIGITS}}}")
_SHARD_BITS = 48 - 4 * _SHARD_DIGITS
_BUCKET_AND_PREFIX = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9._-]+)*/?")
_ADDRESSES = "'redis', a folder by its whole path (/pictures or file:///pictures), or s3://bucket/prefix"


class StoreTrouble(Exception):
    """What a store did not do, in words for people; it may do it later."""


class StoreRefusal(StoreTrouble):
    """The store answered, and will not do it before somebody changes something."""


class ImageStore(Protocol):
    """Files by name, each written whole or not at all. Every call may raise StoreTrouble; for several threads."""

    address: str  # for people, without secrets

    def prepare(self) -> None:
        """Make what files are put into, where that can be made."""

    def put(self, name: str, data: bytes) -> None:
        """When this returns, the file is there, whatever dies. An old one of the name is replaced."""

    def put_new(self, name: str, data: bytes) -> None:
        """The same, unless the name is taken: then nothing."""

    def get(self, name: str) -> bytes | None:
        """None where there is no such file. StoreRefusal where there is not even a store."""

    def remove(self, folder: str) -> None:
        """All files whose names begin with this and a slash."""

    def folders(self, parent: str = "") -> Iterator[str]:
        """The parts of names, in order, that stand behind the parent and before a slash."""

    def newest(self, folder: str) -> float:
        """Unix seconds at which the youngest file in it was written; 0 where there is none."""


def kind(address: str) -> Kind:
    """What DIT_IMAGE_STORE names. ValueError for what is no address of a store."""
    if address == REDIS:
        return REDIS
    if address.startswith("/"):
        return "folder"
    parts = urlsplit(address)
    if parts.scheme == "file" and parts.path.startswith("/") and parts.netloc in ("", "localhost") and not parts.query + parts.fragment:
        return "folder"
    if "@" in parts.netloc:
        raise ValueError("credentials do not belong into an address; AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile, give them")
    if _BUCKET_AND_PREFIX.fullmatch(address):
        return "s3"
    raise ValueError(f"must be {_ADDRESSES}")


def open_store(address: str) -> ImageStore | None:
    """None for Redis. ValueError for no address, and for a kind whose package is not installed; whether it answers is not asked."""
    chosen = kind(address)
    if chosen == "folder":
        from worker.stores.folder import FolderStore

        return FolderStore(Path(address if address.startswith("/") else unquote(urlsplit(address).path)))
    if chosen == "s3":
        try:
            from worker.stores.s3 import S3Store
        except ModuleNotFoundError as error:
            raise ValueError(f"DIT_IMAGE_STORE={address} needs the package s3fs: pip install 'dit[s3]'") from error
        return S3Store(urlsplit(address).netloc, urlsplit(address).path.strip("/"))
    return None


def read_mark(store: ImageStore) -> str | None:
    """By which the store is known; None where no worker has opened it yet."""
    found = store.get(MARK)
    if found is None:
        return None
    text = found.decode(errors="replace").strip()
    if not _MARKS.fullmatch(text):
        raise StoreRefusal(f"{store.address}: the file {MARK} is not ours, or is damaged")
    return text


def open_to_write(store: ImageStore) -> str:
    """Try it, and return its mark, which whoever is first makes."""
    store.prepare()
    try_to_write(store)
    if read_mark(store) is None:
        store.put_new(MARK, f"{kind(store.address)}-{uuid.uuid4().hex}\n".encode())
    mark = read_mark(store)
    if mark is None:
        raise StoreTrouble(f"{store.address}: what was written cannot be read")
    return mark


def try_to_write(store: ImageStore, size: int = PROBE_BYTES) -> None:
    """So many bytes, always under the same name."""
    store.put(_PROBE, bytes(size))


def job_folder(job_id: str) -> str:
    """Of a job's pictures, of every execution. ValueError for what could lead elsewhere."""
    if not _PART_OF_NAME.fullmatch(job_id):
        raise ValueError(f"no id of a job: {job_id[:60]!a}")
    return f"{job_id[:_SHARD_DIGITS]}/{job_id}"


def picture_name(job_id: str, execution: str, index: int) -> str:
    """A picture's. ValueError for what could lead elsewhere."""
    if not _PART_OF_NAME.fullmatch(execution):
        raise ValueError(f"no id of an execution: {execution[:60]!a}")
    return f"{job_folder(job_id)}/{execution}-{index:d}.png"


def jobs_before(store: ImageStore, before: float) -> Iterator[str]:
    """Ids of jobs that were submitted before this time (Unix seconds), and whose files are there, about the oldest first."""
    for shard in store.folders():
        if _SHARD.fullmatch(shard) and ((int(shard, 16) + 1) << _SHARD_BITS) / 1000 <= before:
            yield from store.folders(shard)
