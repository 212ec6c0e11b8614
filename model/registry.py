"""The registry of models: `DIT_CHECKPOINTS/<model>/` is a checkpoint folder (one version), or `<hash12>/` folders and a file `latest`.

For a reader each change is one step: a version appears whole or not at all, `latest` names the old or the new one, and a plain folder stays
one until all else is in place. Those who write take turns.
"""

import contextlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.checkpoint import resolve, verify
from model.folders import STAGED, fsync, locked, put, replace_line, staged
from model.manifest import LATEST, MANIFEST, CheckpointError, file_entries, read_latest, read_manifest

_RETIRED = f".{MANIFEST}"  # of a plain folder that has become a version: names the files that are left of it


@dataclass(frozen=True)
class Version:
    """One checkpoint of a model."""

    hash: str  # "" where `checkpoint.json` cannot be read
    name: str  # of its folder; "" for an entry that is a checkpoint folder itself
    path: Path
    is_latest: bool
    published_at: float | None  # Unix seconds; None without a `checkpoint.json`
    size_bytes: int
    error: str | None = None  # why it cannot be loaded, as far as it was looked at


# Reading.


def models(registry: Path) -> dict[str, Path]:
    """Model id → its entry."""
    return {entry.name: entry for entry in _folders(registry) if _latest(entry) is not None or any(map(_is_checkpoint, _folders(entry)))}


def versions(entry: Path, *, thorough: bool = False) -> list[Version]:
    """Every version, the newest first, broken ones too. `thorough` reads every byte; else the manifest and the files' sizes must do."""
    while True:
        latest = _latest(entry)
        found = _look(entry, latest, thorough)
        if _latest(entry) == latest:  # else what was the latest may have moved while it was looked at
            return sorted(found, key=lambda version: version.published_at or 0.0, reverse=True)


def _look(entry: Path, latest: str | None, thorough: bool) -> list[Version]:
    names = [*([""] if latest == "" else []), *(folder.name for folder in _folders(entry))]
    found = [_version(entry, name, latest, thorough) for name in names]
    if latest is not None and latest not in names:
        found.append(Version("", latest, entry / latest, True, None, 0, f"the file {LATEST!r} names it, but there is no such folder"))
    return found


def find(entry: Path, hash: str) -> Path | None:
    """The folder of the version with this full hash."""
    return next((version.path for version in versions(entry) if version.hash == hash), None)


def choose(entry: Path, prefix: str) -> Version:
    """The one version whose hash, or folder's name, starts so. ValueError lists what there is if it is none or several."""
    found = _versioned(entry)
    matching = [version for version in found if prefix and (version.hash.startswith(prefix) or version.name.startswith(prefix))]
    if len(matching) != 1:
        raise ValueError(f"{prefix!r} stands for {len(matching)} versions, not for one; there is: {_names(found)}")
    return matching[0]


def signature(entry: Path) -> str:
    """A token that changes with whatever `resolve(entry)` leads to: another version, or one file of it written anew.

    It costs a few looks at the folder. Take it before loading, so that a change meanwhile is seen at the next look.
    """
    try:
        stats = {path: path.stat() for path in sorted(resolve(entry).iterdir()) if path.is_file()}
    except (CheckpointError, OSError) as error:
        return f"nothing to load: {error}"
    return "\n".join(f"{path} {stat.st_ino} {stat.st_size} {stat.st_ctime_ns}" for path, stat in stats.items())


def _folders(parent: Path) -> list[Path]:
    """Its sub-folders by name, without hidden ones: those are still being written."""
    return sorted(p for p in parent.iterdir() if p.is_dir() and not p.name.startswith(".")) if parent.is_dir() else []


def _is_checkpoint(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def _latest(entry: Path) -> str | None:
    """The name of the latest version as `resolve` sees it: "" if the entry is a checkpoint itself, None if nothing names one."""
    if _is_checkpoint(entry):
        return ""
    if not (entry / LATEST).is_file():
        return None
    return read_latest(entry / LATEST) or "?"  # an empty file names nothing that is there


def _version(entry: Path, name: str, latest: str | None, thorough: bool) -> Version:
    folder, published_at, error = entry / name, None, None
    identity, sizes = "", dict[str, int]()
    try:
        published_at = (folder / MANIFEST).stat().st_mtime
        identity, sizes = _manifest(folder / MANIFEST)
        if thorough:
            verify(folder)
        else:
            _check_sizes(folder, sizes)
    except (CheckpointError, OSError) as problem:
        error = str(problem)
    return Version(identity, name, folder, name == latest, published_at, sum(sizes.values()), error)


def _manifest(path: Path) -> tuple[str, dict[str, int]]:
    """Hash and bytes per file, checked for their form only. Raises CheckpointError or OSError."""
    _, document = read_manifest(path)
    identity = document.get("hash")
    if not isinstance(identity, str) or not re.fullmatch(r"[0-9a-f]{64}", identity):
        raise CheckpointError(f"{path} cannot be read: its hash is none")
    return identity, {name: entry.bytes for name, entry in file_entries(document, path).items()}


def _check_sizes(folder: Path, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        there = (folder / name).stat().st_size
        if there != size:
            raise CheckpointError(f"{folder / name} has {there} bytes, and {size} when it was written")


def _versioned(entry: Path) -> list[Version]:
    found = versions(entry)
    if any(version.name == "" for version in found):
        raise ValueError(f"{entry} is a checkpoint folder itself and has no versions to choose from; publish another first")
    return found


def _names(found: list[Version]) -> str:
    return ", ".join(version.name for version in found) or "none"


# Writing.


def publish(registry: Path, model: str, source: str | Path) -> str:
    """Copy a checkpoint into the registry as the model's latest version; returns its hash.

    Published again, it becomes the latest again, with its new metrics and defaults if those have changed. An entry that is a checkpoint
    folder gets versions, and what it held is one of them. ValueError if the new one cannot be served, OSError if it cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", model):
        raise ValueError(f"a model's name has letters, digits, '.', '_' and '-', and does not start with a dot, unlike {model!r}")
    folder = resolve(source)
    document = _servable(folder)
    entry = registry / model
    registry.mkdir(parents=True, exist_ok=True)
    with locked(registry):
        try:
            entry.mkdir(exist_ok=True)
            _sweep(entry)
            _keep_plain(entry)
            replace_line(entry / LATEST, _add(entry, folder, document))
            _retire_plain(entry)
        finally:
            with contextlib.suppress(OSError):
                entry.rmdir()  # only if it is empty: a first version that could not be written
    return str(document["hash"])


def roll_back(entry: Path, to: str | None = None) -> str:
    """Make an older version the latest: the one whose hash starts with `to`, or the one published before the current; returns its hash.

    ValueError lists what there is if that is none or several; CheckpointError or OSError tells what is broken in it.
    """
    with locked(entry.parent):
        target = _before_latest(_versioned(entry)) if to is None else choose(entry, to)
        document = _servable(target.path)
        replace_line(entry / LATEST, target.name)
    return str(document["hash"])


def remove(entry: Path, hash_prefix: str) -> str:
    """Delete a version, never the latest; returns the name of its folder. ValueError as for `roll_back`."""
    with locked(entry.parent):
        target = choose(entry, hash_prefix)
        if target.is_latest:
            raise ValueError(f"{target.name} is the latest version of {entry.name}; publish another or roll back first")
        _sweep(entry)
        with staged(entry) as hidden:  # gone at once for a reader, then from the disk
            os.rename(target.path, hidden / target.name)
            fsync(entry)
    return target.name


def _servable(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, after a look at every byte. ValueError if it has no VAE."""
    document = verify(folder)
    if not document.get("vae"):
        raise ValueError(f"{folder} has no VAE, so it cannot be served")
    return document


def _add(entry: Path, source: Path, document: dict[str, Any]) -> str:
    """The name of the version's folder, which from now on holds this and nothing else."""
    target = entry / document["hash"][:12]
    if _holds(target, document):
        if _latest(entry) != target.name:
            os.utime(target / MANIFEST)  # published anew: a roll back from it leads to what was served before
        return target.name
    with staged(entry) as copy:
        for name in (*document["files"], MANIFEST):
            shutil.copyfile(source / name, copy / name)
        if verify(copy) != document:
            raise CheckpointError(f"{source} was changed while it was copied")
        put(copy, target)
    return target.name


def _holds(target: Path, document: dict[str, Any]) -> bool:
    try:
        return verify(target) == document
    except (CheckpointError, OSError):
        return False


def _keep_plain(entry: Path) -> None:
    """What is a checkpoint folder itself gets a folder of its own inside, by links where the file system has them."""
    if not _is_checkpoint(entry):
        return
    identity, sizes = _manifest(entry / MANIFEST)
    if (entry / identity[:12]).exists():
        return
    with staged(entry) as version:
        for name in (*sizes, MANIFEST):
            if (entry / name).is_file():  # a broken one is kept as it is; a better one is about to take its place
                _link(entry / name, version / name)
        put(version, entry / identity[:12])


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)  # with its time, which tells when it was published


def _retire_plain(entry: Path) -> None:
    """The step from checkpoint folder to versions: without a manifest a reader takes `latest`. One that has begun still finds the files."""
    if _is_checkpoint(entry):
        os.rename(entry / MANIFEST, entry / _RETIRED)
        fsync(entry)


def _sweep(entry: Path) -> None:
    """Away with what earlier changes left: copies never finished, and the files of a plain folder whose readers are long done."""
    for stale in entry.glob(f"{STAGED}*"):
        shutil.rmtree(stale)
    retired = entry / _RETIRED
    if retired.is_file():
        if not _is_checkpoint(entry):  # else someone has put a plain folder there again
            for name in _manifest(retired)[1]:
                (entry / name).unlink(missing_ok=True)
        retired.unlink()


def _before_latest(found: list[Version]) -> Version:
    """The versions come newest first."""
    latest = next((index for index, version in enumerate(found) if version.is_latest), len(found))
    if latest + 1 >= len(found):
        raise ValueError(f"no version was published before the latest; there is: {_names(found)}")
    return found[latest + 1]
