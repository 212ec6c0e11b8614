"""What each kind of image store does: the same tests for a folder and for S3, against a real server."""

import errno
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from worker.stores import (
    MARK,
    ImageStore,
    StoreRefusal,
    StoreTrouble,
    job_folder,
    jobs_before,
    kind,
    open_store,
    open_to_write,
    picture_name,
    read_mark,
)

PNG = b"\x89PNG\r\n\x1a\n of a test"
JOB, OTHER = "019a0000-0000-7000-8000-000000000001", "019a0000-0000-7000-8000-000000000002"


@pytest.fixture(params=["folder", "s3"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a store that nobody has opened yet."""
    return str(tmp_path / "pictures") if request.param == "folder" else f"s3://{request.getfixturevalue('bucket')}/pictures"


@pytest.fixture
def store(address: str) -> ImageStore:
    opened = open_store(address)
    assert opened
    opened.prepare()
    return opened


def test_what_was_put_is_there_byte_by_byte_and_the_last_one_counts(store: ImageStore, address: str) -> None:
    name = picture_name(JOB, "execution", 3)
    assert store.get(name) is None
    store.put(name, PNG)
    assert store.get(name) == PNG
    store.put(name, b"other" * 100_000)
    again = open_store(address)
    assert again and again.get(name) == b"other" * 100_000
    store.put(name, b"")
    assert store.get(name) == b""


def test_a_name_that_is_taken_stays_as_it_is(store: ImageStore) -> None:
    store.put_new("name", b"first")
    store.put_new("name", b"second")
    assert store.get("name") == b"first"


def test_all_pictures_of_a_job_go_and_no_others(store: ImageStore) -> None:
    names = [picture_name(JOB, execution, index) for execution in ("one", "two") for index in range(3)]
    others = [picture_name(OTHER, "one", 0), picture_name(f"{JOB}0", "one", 0)]
    for name in (*names, *others):
        store.put(name, PNG)
    store.remove(job_folder(JOB))
    store.remove(job_folder(JOB))
    assert [store.get(name) for name in names] == [None] * 6 and [store.get(name) for name in others] == [PNG, PNG]


def test_a_job_can_have_pictures_again_after_all_of_its_time_went(store: ImageStore) -> None:
    name = picture_name(JOB, "one", 0)
    store.put(name, PNG)
    store.remove(job_folder(JOB))
    store.put(name, PNG)
    assert store.get(name) == PNG


def test_jobs_are_told_by_the_time_in_their_ids_the_oldest_first(store: ImageStore) -> None:
    """A UUIDv7 begins with 48 bits of milliseconds."""
    now, hour = time.time(), 3600

    def job(seconds: float, end: int) -> str:
        return f"{int(seconds * 1000):012x}-7000-8000-{end:012d}"

    ages = {1: 1000 * hour, 2: 1000 * hour, 3: 30 * hour, 4: 0}
    jobs = {end: job(now - age, end) for end, age in ages.items()}
    for end in (4, 2, 3, 1):
        store.put(picture_name(jobs[end], "execution", 0), PNG)
    open_to_write(store)
    store.put("somebody/elses.txt", PNG)
    assert list(jobs_before(store, now)) == [jobs[1], jobs[2], jobs[3]], "and not one whose time may not have come"
    assert list(jobs_before(store, now - 100 * hour)) == [jobs[1], jobs[2]]
    assert list(jobs_before(store, now - 2000 * hour)) == []


def test_the_youngest_picture_tells_how_old_a_job_is(store: ImageStore) -> None:
    assert store.newest(job_folder(JOB)) == 0
    before = time.time() - 2  # S3 tells whole seconds
    store.put(picture_name(JOB, "one", 0), PNG)
    assert before <= store.newest(job_folder(JOB)) <= time.time() + 2


# --- the mark ----------------------------------------------------------------------------------------------------------


def test_the_first_who_opens_a_store_marks_it_and_all_others_read_that(store: ImageStore, address: str) -> None:
    assert read_mark(store) is None
    together = threading.Barrier(8)

    def open_it(_: int) -> str:
        mine = open_store(address)
        assert mine
        together.wait()
        return open_to_write(mine)

    with ThreadPoolExecutor(8) as pool:
        marks = set(pool.map(open_it, range(8)))
    assert marks == {read_mark(store)} and marks.pop().startswith(f"{kind(address)}-")


def test_a_mark_that_is_not_ours_is_refused(store: ImageStore) -> None:
    store.put(MARK, b"\xff somebody else's file")
    with pytest.raises(StoreRefusal, match="the file dit-store is not ours, or is damaged"):
        open_to_write(store)


def test_where_there_are_no_hard_links_a_mark_is_made_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    store = open_store(str(tmp_path))
    assert store and open_to_write(store) == open_to_write(store) == read_mark(store)


# --- trouble -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def take_away(address: str, request: pytest.FixtureRequest) -> Iterator[tuple[Callable[[], Any], Callable[[], Any]]]:
    """What makes the store go away, and what brings it back as it was."""
    if kind(address) == "folder":
        folder, elsewhere = Path(address), Path(address).with_name("elsewhere")
        yield lambda: folder.rename(elsewhere), lambda: elsewhere.rename(folder)
    else:
        server = request.getfixturevalue("s3_server")
        yield server.leave, server.come_back


def test_a_store_that_is_away_is_trouble_and_has_everything_when_it_is_back(
    store: ImageStore, take_away: tuple[Callable[[], Any], Callable[[], Any]]
) -> None:
    name = picture_name(JOB, "one", 0)
    store.put(name, PNG)
    leave, come_back = take_away
    leave()
    try:
        for work in (lambda: store.get(name), lambda: store.put(name, b"other"), lambda: store.get("what was never there")):
            with pytest.raises(StoreTrouble) as told:
                work()
            assert str(told.value).startswith(f"{store.address}: ") and "top-secret" not in str(told.value)
    finally:
        come_back()
    assert store.get(name) == PNG


def test_what_a_killed_worker_left_beside_the_folders_of_jobs_goes_at_the_next_start(tmp_path: Path) -> None:
    old, young = tmp_path / ".old.part", tmp_path / ".young.part"
    for part in (old, young):
        part.write_bytes(PNG)
    two_hours_ago = time.time() - 7200
    os.utime(old, (two_hours_ago, two_hours_ago))
    store = open_store(str(tmp_path))
    assert store
    open_to_write(store)
    assert not old.exists() and young.exists(), "another worker may be writing it"


def test_a_full_disk_is_told_and_leaves_no_half_a_picture(tmp_path: Path) -> None:
    """By a limit on the size of files, which a write runs into as into a full disk."""
    code = f"""
import resource
from worker.stores import StoreRefusal, open_store
store = open_store({str(tmp_path)!r})
store.put("a/b/one.png", bytes(1000))
resource.setrlimit(resource.RLIMIT_FSIZE, (999, resource.RLIM_INFINITY))
try:
    store.put("a/b/two.png", bytes(1000))
except StoreRefusal as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
store.put("a/b/three.png", bytes(1000))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == f"{tmp_path}: File too large\n"
    assert sorted(path.name for path in (tmp_path / "a/b").iterdir()) == ["one.png", "three.png"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY, "of another process"


def test_a_full_disk_may_pass_and_what_is_no_folder_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = open_store(str(tmp_path / "pictures"))
    assert store
    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        with pytest.raises(StoreTrouble, match="No space left on device") as told:
            open_to_write(store)
    assert not isinstance(told.value, StoreRefusal)
    (tmp_path / "file").touch()
    no_folder = open_store(str(tmp_path / "file"))
    assert no_folder
    with pytest.raises(StoreRefusal, match="File exists"):
        open_to_write(no_folder)


def test_in_a_folder_a_picture_is_on_the_disk_before_it_has_its_name_and_then_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, happened = open_store(str(tmp_path)), list[str]()
    sync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        happened.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        sync(handle)

    def replaced(source: Path, target: Path) -> None:
        happened.append("named")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    assert store
    store.put("shard/job/one.png", PNG)
    part, *rest = happened
    assert part.endswith(".part") and rest == ["named", "job", "shard", tmp_path.name]


def test_a_bucket_that_is_not_there_and_missing_credentials_are_refusals(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = open_store("s3://nobody-has-this-bucket/pictures")
    assert gone
    for work in (lambda: open_to_write(gone), lambda: read_mark(gone)):
        with pytest.raises(StoreRefusal, match="s3://nobody-has-this-bucket/pictures: "):
            work()
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    nobody = open_store(f"s3://{bucket}")
    assert nobody
    with pytest.raises(StoreRefusal, match="Unable to locate credentials"):
        open_to_write(nobody)
