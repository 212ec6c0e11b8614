"""What an image store and its files are called: no id leads elsewhere, and a bad address is told what is allowed."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker import stores
from worker.stores import job_folder, kind, open_store, picture_name

JOB = "019a0000-0000-7000-8000-000000000001"


@given(st.text(), st.text())
def test_no_id_leads_out_of_the_store(job: str, execution: str) -> None:
    try:
        name = picture_name(job, execution, 0)
    except ValueError:
        return
    shard, folder, file = name.split("/")
    assert (shard, folder, file) == (job[:6], job, f"{execution}-0.png") and not {".", ".."} & {shard, folder}


@pytest.mark.parametrize("bad", ["", "..", "../../etc", "a/b", "/etc", "a\\b", "a\0", "a\n", "é", "a" * 101, ".hidden"])
def test_what_is_no_id_is_refused(bad: str) -> None:
    with pytest.raises(ValueError):
        picture_name(bad, "execution", 0)
    with pytest.raises(ValueError):
        picture_name(JOB, bad, 0)
    with pytest.raises(ValueError):
        job_folder(bad)


@pytest.mark.parametrize(
    ("address", "what"),
    [
        ("redis", "redis"),
        ("/pictures", "folder"),
        ("/with space/and #", "folder"),
        ("file:///pictures", "folder"),
        ("file://localhost/with%20space", "folder"),
        ("s3://bucket", "s3"),
        ("s3://my.bucket-1/a/prefix/", "s3"),
    ],
)
def test_an_address_tells_its_kind(address: str, what: str) -> None:
    assert kind(address) == what


@pytest.mark.parametrize(
    "address",
    [
        "",
        "Redis",
        "pictures",
        "./pictures",
        "~/pictures",
        "file:pictures",
        "file://host/pictures",
        "s3:bucket",
        "s3://",
        "s3://b",
        "s3://Bucket",
        "s3://bucket/a?x=1",
        "s3://bucket#a",
        "s3://bucket//a",
        "gs://bucket",
        "http://host/pictures",
        "s3://bucket/a b",
    ],
)
def test_any_other_address_is_refused_with_those_there_are(address: str) -> None:
    with pytest.raises(ValueError, match=r"must be 'redis', a folder by its whole path .*, or s3://bucket/prefix"):
        kind(address)


def test_credentials_in_an_address_are_refused_and_not_repeated() -> None:
    with pytest.raises(ValueError, match="AWS_ACCESS_KEY_ID") as told:
        kind("s3://key:top-secret@bucket/pictures")
    assert "top-secret" not in str(told.value)


def test_an_address_of_a_folder_is_read_in_both_ways(tmp_path: Path) -> None:
    for address in (f"{tmp_path}/with space", f"file://{tmp_path}/with%20space"):
        store = open_store(address)
        assert store and store.address == f"{tmp_path}/with space"


def test_s3_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "worker.stores.s3", raising=False)
    monkeypatch.delattr(stores, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ValueError, match=r"needs the package s3fs: pip install 'dit\[s3\]'"):
        open_store("s3://bucket")


def test_a_kind_that_was_not_chosen_is_not_imported(tmp_path: Path) -> None:
    code = f"import sys, app.main; from worker.stores import open_store; open_store({str(tmp_path)!r})"
    code += "; print([name for name in ('s3fs', 'fsspec', 'botocore') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
