"""Pictures in a folder: of this machine, or of a file system that all machines mount.

Not by fsspec, whose local files are not forced to the disk: what Redis calls committed must be there after a power cut too.
"""

import errno
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from worker.stores import StoreRefusal, StoreTrouble

_PART_S = 3600  # that no write takes
_PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)  # a full disk, a file server that is away


class FolderStore:
    """An ImageStore."""

    def __init__(self, root: Path) -> None:
        self.root, self.address = root, str(root)

    def prepare(self) -> None:
        with self._told():
            self.root.mkdir(parents=True, exist_ok=True)
            for part in self.root.glob(".*.part"):  # of a worker that was killed; in a job's folder they go with the job
                with suppress(FileNotFoundError):
                    if part.stat().st_mtime < time.time() - _PART_S:
                        part.unlink()

    def put(self, name: str, data: bytes) -> None:
        with self._told(), self._part(name, data) as part:
            os.replace(part, self.root / name)
            self._sync(name)

    def put_new(self, name: str, data: bytes) -> None:
        with self._told(), self._part(name, data) as part:
            try:
                os.link(part, self.root / name)
            except FileExistsError:
                return
            except OSError:  # a file system without hard links: of two at the very same time the second would win
                if not (self.root / name).exists():
                    os.replace(part, self.root / name)
            self._sync(name)

    def get(self, name: str) -> bytes | None:
        with self._told():
            try:
                return (self.root / name).read_bytes()
            except FileNotFoundError:
                os.scandir(self.root).close()  # a folder that is gone has lost everything: that is another answer
                return None

    def remove(self, folder: str) -> None:
        path = self.root / folder
        with self._told():
            with suppress(FileNotFoundError):  # also where another sweeper is quicker in the middle of it
                shutil.rmtree(path)
            with suppress(OSError):  # others are in it
                path.parent.rmdir()

    def folders(self, parent: str = "") -> Iterator[str]:
        with self._told():
            try:
                with os.scandir(self.root / parent) as entries:
                    names = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
            except FileNotFoundError:
                names = []
        yield from names

    def newest(self, folder: str) -> float:
        with self._told():
            try:
                with os.scandir(self.root / folder) as entries:
                    return max((entry.stat(follow_symlinks=False).st_mtime for entry in entries), default=0.0)
            except FileNotFoundError:
                return 0.0

    @contextmanager
    def _part(self, name: str, data: bytes) -> Iterator[Path]:
        """The file under another name, on the disk; it does not stay."""
        folder = self.root
        for inner in Path(name).parent.parts:  # and not what is above: a root that is gone is not there empty
            folder = folder / inner
            folder.mkdir(exist_ok=True)
        part = folder / f".{uuid.uuid4().hex}.part"
        try:
            with part.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield part
        finally:
            part.unlink(missing_ok=True)

    def _sync(self, name: str) -> None:
        """The names too: of the file in its folder, and of that in the ones above."""
        folder = (self.root / name).parent
        while True:
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
            if folder == self.root:
                return
            folder = folder.parent

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kind = StoreTrouble if error.errno in _PASSING else StoreRefusal
            raise kind(f"{self.address}: {error.strerror or error}") from error
