"""Folders that appear, change and go in one step for those who read them, and are on the disk when that is said."""

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

STAGED = ".new-"  # prefix of a folder that is being made, or unmade
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def fsync(path: Path) -> None:
    """Of a file its content; of a folder the names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One writer at a time; the kernel frees the lock however a writer ends. Over NFS it holds between the writers of one machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def staged(parent: Path) -> Iterator[Path]:
    """A hidden folder, removed at the end with whatever is in it by then, unless it was put somewhere."""
    folder = Path(tempfile.mkdtemp(prefix=STAGED, dir=parent))
    folder.chmod(0o755)  # what becomes of it is read by other users too
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put(folder: Path, target: Path) -> None:
    """Give a folder of files its name. A folder that has the name already gets this one's, so that a reader always finds one of them."""
    for path in (*folder.iterdir(), folder):
        fsync(path)
    if target.exists():
        exchange(folder, target)
    else:
        os.rename(folder, target)
    fsync(target.parent)


def replace_line(path: Path, line: str) -> None:
    """Write a file of one line anew: a reader finds the old line or the new one. For one writer at a time."""
    written = path.with_name(f".{path.name}")
    written.write_text(f"{line}\n")
    fsync(written)
    os.replace(written, path)
    fsync(path.parent)


def exchange(first: Path, second: Path) -> None:
    """Two folders of one file system take each other's name: on Linux at once, elsewhere by renames, between which `second` is missing.

    OSError if that fails; nothing has changed then.
    """
    if _exchange_at_once(first, second):
        return
    aside = second.with_name(f".{second.name}.old-{os.getpid()}")
    os.rename(second, aside)
    try:
        os.rename(first, second)
    except BaseException:
        os.rename(aside, second)
        raise
    os.rename(aside, first)


def _exchange_at_once(first: Path, second: Path) -> bool:
    """renameat2(2) with RENAME_EXCHANGE; False where the system or the file system has no such thing."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))
