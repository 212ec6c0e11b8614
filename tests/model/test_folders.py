"""Two folders take each other's place."""

from pathlib import Path

import pytest

from model import folders
from model.folders import exchange, put, replace_line, staged


@pytest.fixture(params=["at once", "by renames"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "by renames":  # as on a file system that has no exchange
        monkeypatch.setattr(folders, "_exchange_at_once", lambda first, second: False)


def make(folder: Path, content: str) -> Path:
    folder.mkdir()
    (folder / "file").write_text(content)
    return folder


def contents(parent: Path) -> dict[str, str]:
    return {str(path.relative_to(parent)): path.read_text() for path in parent.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("either_way")
def test_two_folders_exchange_their_names(tmp_path: Path) -> None:
    exchange(make(tmp_path / "a", "first"), make(tmp_path / "b", "second"))
    assert contents(tmp_path) == {"a/file": "second", "b/file": "first"}


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("missing", ["a", "b"])
def test_nothing_changes_if_one_is_missing(tmp_path: Path, missing: str) -> None:
    there = make(tmp_path / ("b" if missing == "a" else "a"), "mine")
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "b")
    assert contents(tmp_path) == {f"{there.name}/file": "mine"}


def test_this_machine_exchanges_at_once(tmp_path: Path) -> None:
    """Linux has done so since 3.15; the tests would else prove less than they say."""
    assert folders._exchange_at_once(make(tmp_path / "a", "first"), make(tmp_path / "b", "second"))


def test_a_staged_folder_is_gone_unless_it_was_put_somewhere(tmp_path: Path) -> None:
    for keep in (True, False):
        with staged(tmp_path) as folder:
            (folder / "file").write_text("new")
            if keep:
                put(folder, tmp_path / "kept")
    assert contents(tmp_path) == {"kept/file": "new"} and [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_what_is_put_in_the_place_of_another_removes_it(tmp_path: Path) -> None:
    target = make(tmp_path / "kept", "old")
    with staged(tmp_path) as folder:
        (folder / "file").write_text("new")
        put(folder, target)
    assert contents(tmp_path) == {"kept/file": "new"}


def test_a_line_is_replaced_whole(tmp_path: Path) -> None:
    for line in ("one", "two"):
        replace_line(tmp_path / "latest", line)
        assert contents(tmp_path) == {"latest": f"{line}\n"}
