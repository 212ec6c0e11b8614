"""The registry: versions come, go and take over in one step, whatever happens to the process that changes them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from model import registry as module
from model.checkpoint import Checkpoint, CheckpointError, annotate, load, read_config, resolve, save
from model.registry import choose, find, models, publish, remove, roll_back, signature, versions

Sources = dict[str, Path]


@pytest.fixture
def sources(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> Sources:
    """Three checkpoints of other weights, by hash, in the order in which the tests publish them."""
    folders = [make_checkpoint(tmp_path / "runs", name=f"run-{seed}", seed=seed) for seed in range(3)]
    return {read_config(folder)[1]: folder for folder in folders}


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    return tmp_path / "registry"


@pytest.fixture
def entry(registry: Path, sources: Sources) -> Path:
    """Three versions of one model, the last of which is the latest."""
    for folder in sources.values():
        publish(registry, "tiny", folder)
    return registry / "tiny"


@pytest.fixture
def plain(registry: Path, sources: Sources) -> Path:
    """An entry that is a checkpoint folder itself."""
    shutil.copytree(next(iter(sources.values())), registry / "tiny")
    return registry / "tiny"


def latest(entry: Path) -> str:
    return load(entry).hash


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- publishing --------------------------------------------------------------------------------------------------------


def test_a_published_checkpoint_is_a_copy_under_its_hash(registry: Path, sources: Sources) -> None:
    identity, source = next(iter(sources.items()))
    assert publish(registry, "tiny", source) == identity
    assert resolve(registry / "tiny") == registry / "tiny" / identity[:12]
    expected = {f"{identity[:12]}/{name}": content for name, content in contents(source).items()}
    assert contents(registry) == {f"tiny/{name}": content for name, content in expected.items()} | {
        "tiny/latest": f"{identity[:12]}\n".encode()
    }
    shutil.rmtree(source)
    assert latest(registry / "tiny") == identity


def test_the_newest_version_comes_first_and_is_the_latest(entry: Path, sources: Sources) -> None:
    found = versions(entry)
    assert [version.hash for version in found] == [*reversed(sources)]
    assert [version.is_latest for version in found] == [True, False, False]
    assert [(version.name, version.path) for version in found] == [(h[:12], entry / h[:12]) for h in reversed(sources)]
    sizes = [sum(p.stat().st_size for p in version.path.iterdir() if p.name != "checkpoint.json") for version in found]
    assert [version.size_bytes for version in found] == sizes and all(version.error is None for version in found)
    times = [version.published_at or 0.0 for version in found]
    assert times == sorted(times, reverse=True) and latest(entry) == found[0].hash


def test_published_again_it_stays_the_same_files_and_becomes_the_latest(registry: Path, entry: Path, sources: Sources) -> None:
    first, second, third = sources
    before = {path: path.stat().st_ino for path in entry.rglob("*") if path.is_file() and path.name != "latest"}
    assert publish(registry, "tiny", sources[first]) == first == latest(entry)
    assert {path: path.stat().st_ino for path in entry.rglob("*") if path.is_file() and path.name != "latest"} == before
    assert [version.hash for version in versions(entry)] == [first, third, second]
    assert roll_back(entry) == third  # what was served before


def test_publishing_the_latest_again_is_no_news(registry: Path, entry: Path, sources: Sources) -> None:
    before = signature(entry)
    publish(registry, "tiny", list(sources.values())[-1])
    assert signature(entry) == before


def test_new_metrics_of_the_same_weights_are_published(registry: Path, entry: Path, sources: Sources) -> None:
    identity, source = list(sources.items())[-1]
    before = signature(entry)
    annotate(source, metrics={"class_consistency": 0.97}, card="# Evaluated\n", files={"grid.png": b"\x89PNG"})
    assert publish(registry, "tiny", source) == identity == latest(entry)
    assert contents(resolve(entry)) == contents(source) and signature(entry) != before
    assert sorted(path.name for path in entry.iterdir()) == sorted([*(h[:12] for h in sources), "latest"])


def test_a_damaged_version_is_mended_by_publishing_it_again(registry: Path, entry: Path, sources: Sources) -> None:
    for name in ("dit.safetensors", "checkpoint.json"):
        (resolve(entry) / name).write_bytes(b"damaged")
        publish(registry, "tiny", list(sources.values())[-1])
        assert latest(entry) == [*sources][-1]


def test_a_version_is_published_on_from_another_entry(registry: Path, entry: Path, sources: Sources) -> None:
    assert publish(registry, "other", entry) == [*sources][-1] == latest(registry / "other")
    assert [*models(registry)] == ["other", "tiny"]


@pytest.mark.parametrize("name", ["checkpoint.json", "dit.safetensors", "vae.safetensors", "README.md"])
def test_a_damaged_checkpoint_is_not_published(registry: Path, entry: Path, make_checkpoint: Callable[..., Path], name: str) -> None:
    before, source = contents(registry), make_checkpoint(registry.parent, name="damaged", seed=9)
    content = bytearray((source / name).read_bytes())
    content[len(content) // 2] ^= 1
    (source / name).write_bytes(content)
    for model in ("tiny", "new"):
        with pytest.raises(CheckpointError, match=str(source / name)):
            publish(registry, model, source)
    assert contents(registry) == before and [*models(registry)] == ["tiny"]


def test_a_checkpoint_without_a_vae_is_not_published(registry: Path, build_checkpoint: Callable[..., Checkpoint]) -> None:
    original, source = build_checkpoint("flow"), registry.parent / "no-vae"
    save(source, Checkpoint(replace(original.config, vae=None), original.dit, None))
    with pytest.raises(ValueError, match="no-vae has no VAE, so it cannot be served"):
        publish(registry, "tiny", source)
    assert not registry.exists()


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "/a", "a b", "é", "a\n", "a:b", "../a"])
def test_a_name_that_is_none_is_refused(registry: Path, sources: Sources, name: str) -> None:
    with pytest.raises(ValueError, match="does not start with a dot, unlike"):
        publish(registry, name, next(iter(sources.values())))
    assert not registry.exists()


@pytest.mark.parametrize("name", ["a", "7", "-", "_x", "DiT-XL.2_b"])
def test_letters_digits_dots_and_dashes_make_a_name(registry: Path, sources: Sources, name: str) -> None:
    publish(registry, name, next(iter(sources.values())))
    assert [*models(registry)] == [name]


# --- a plain folder ----------------------------------------------------------------------------------------------------


def test_a_plain_folder_is_one_version(plain: Path, sources: Sources) -> None:
    (version,) = versions(plain)
    assert (version.hash, version.name, version.path, version.is_latest, version.error) == (next(iter(sources)), "", plain, True, None)
    assert find(plain, version.hash) == plain and models(plain.parent) == {"tiny": plain}
    for change in (lambda: roll_back(plain), lambda: roll_back(plain, version.hash), lambda: remove(plain, version.hash)):
        with pytest.raises(ValueError, match="is a checkpoint folder itself"):
            change()


def test_a_plain_folder_becomes_one_of_the_versions(registry: Path, plain: Path, sources: Sources) -> None:
    (old, new, _), published_at = sources, versions(plain)[0].published_at
    assert publish(registry, "tiny", sources[new]) == new == latest(plain)
    assert [version.hash for version in versions(plain, thorough=True) if version.error is None] == [new, old]
    assert versions(plain)[1].published_at == published_at
    folder = find(plain, old)
    assert folder == plain / old[:12] and contents(folder) == contents(sources[old])
    assert roll_back(plain) == old == latest(plain)


def test_a_plain_folder_published_into_its_own_entry_gets_its_hash(registry: Path, plain: Path, sources: Sources) -> None:
    identity = publish(registry, "tiny", plain)
    assert resolve(plain) == plain / identity[:12] and [version.hash for version in versions(plain)] == [identity]
    annotate(sources[identity], metrics={"fid": 3.0}, card="", files={})
    publish(registry, "tiny", sources[identity])
    assert load(plain).config.metrics == {"fid": 3.0}


def test_who_has_begun_to_read_a_plain_folder_finds_its_files_until_the_next_change(registry: Path, plain: Path, sources: Sources) -> None:
    _, second, third = sources
    weights = (plain / "dit.safetensors").read_bytes()
    publish(registry, "tiny", sources[second])
    assert (plain / "dit.safetensors").read_bytes() == weights
    publish(registry, "tiny", sources[third])
    assert sorted(path.name for path in plain.iterdir()) == sorted([*(h[:12] for h in sources), "latest"])


def test_a_plain_folder_put_over_versions_is_not_swept_away(registry: Path, entry: Path, plain_over: Callable[[], str]) -> None:
    put_there = plain_over()
    assert latest(entry) == put_there
    publish(registry, "tiny", entry)
    assert latest(entry) == put_there and find(entry, put_there) == entry / put_there[:12]


@pytest.fixture
def plain_over(entry: Path, make_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[[], str]:
    """Copy another checkpoint into the entry, as `cp` does, though a conversion has left its list of files there."""

    def copy() -> str:
        other = make_checkpoint(tmp_path / "runs", name="by-hand", seed=7)
        shutil.copy(other / "checkpoint.json", entry / ".checkpoint.json")
        shutil.copytree(other, entry, dirs_exist_ok=True)
        return read_config(other)[1]

    return copy


def test_a_broken_plain_folder_gives_way_to_a_sound_version(registry: Path, plain: Path, sources: Sources) -> None:
    (plain / "vae.safetensors").unlink()
    new = publish(registry, "tiny", list(sources.values())[1])
    assert latest(plain) == new
    assert [version.error is None for version in versions(plain)] == [True, False]


def test_links_are_not_needed_to_keep_a_plain_folder(
    registry: Path, plain: Path, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError("this file system has no links")

    monkeypatch.setattr(os, "link", unsupported)
    old, new, _ = sources
    published_at = versions(plain)[0].published_at
    publish(registry, "tiny", sources[new])
    assert contents(plain / old[:12]) == contents(sources[old])
    assert versions(plain)[1].published_at == pytest.approx(published_at, abs=1e-3)


# --- interruptions -----------------------------------------------------------------------------------------------------


@contextmanager
def interrupted(monkeypatch: pytest.MonkeyPatch, step: str, call: int = 1) -> Iterator[None]:
    """The process ends (its Ctrl-C is not caught) at this call of a step."""
    count, original = [0], getattr(module, step)

    def sometimes(*arguments: object, **options: object) -> object:
        count[0] += 1
        if count[0] == call:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, step, sometimes)
        yield


@pytest.mark.parametrize("step", ["_add", "put", "replace_line"])
def test_an_interrupted_first_publication_is_begun_anew(
    registry: Path, sources: Sources, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    source = next(iter(sources.values()))
    with interrupted(monkeypatch, step):
        publish(registry, "tiny", source)
    assert step == "replace_line" or not any(registry.iterdir())
    assert latest(publish(registry, "tiny", source) and registry / "tiny") == next(iter(sources))


@pytest.mark.parametrize(
    ("step", "call"), [("_keep_plain", 1), ("put", 1), ("_add", 1), ("put", 2), ("replace_line", 1), ("_retire_plain", 1)]
)
def test_a_plain_folder_is_served_until_all_else_is_in_place(
    registry: Path, plain: Path, sources: Sources, monkeypatch: pytest.MonkeyPatch, step: str, call: int
) -> None:
    old, new, _ = sources
    with interrupted(monkeypatch, step, call):
        publish(registry, "tiny", sources[new])
    assert latest(plain) == old and find(plain, old) is not None
    with pytest.raises(ValueError, match="is a checkpoint folder itself"):
        roll_back(plain, new)
    assert publish(registry, "tiny", sources[new]) == new == latest(plain)
    assert {version.hash for version in versions(plain)} == {old, new} and load(plain / old[:12]).hash == old


@pytest.mark.parametrize("step", ["_add", "put", "replace_line"])
def test_an_interrupted_publication_leaves_the_latest(
    registry: Path, entry: Path, make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    before, source = latest(entry), make_checkpoint(registry.parent, name="next", seed=5)
    with interrupted(monkeypatch, step):
        publish(registry, "tiny", source)
    assert latest(entry) == before and not list(entry.glob(".*"))


def test_what_a_killed_publication_left_is_swept_away(registry: Path, entry: Path, sources: Sources) -> None:
    (entry / ".new-killed").mkdir()
    (entry / ".new-killed" / "dit.safetensors").write_bytes(b"half")
    assert [version.name for version in versions(entry)] == [h[:12] for h in reversed(sources)]
    publish(registry, "tiny", next(iter(sources.values())))
    assert not list(entry.glob(".*"))


def test_a_source_that_changes_while_it_is_copied_is_refused(
    registry: Path, sources: Sources, make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training writes its checkpoint anew meanwhile: each file is sound, but they are of two checkpoints."""
    first, second, _ = sources.values()
    original = shutil.copyfile

    def meanwhile(source: Path, target: Path) -> None:
        original(source if source.name == "dit.safetensors" else second / source.name, target)

    monkeypatch.setattr(shutil, "copyfile", meanwhile)
    with pytest.raises(CheckpointError, match=r"dit\.safetensors was changed"):
        publish(registry, "tiny", first)
    monkeypatch.setattr(shutil, "copyfile", lambda source, target: original(second / source.name, target))
    with pytest.raises(CheckpointError, match=r"run-0 was changed while it was copied"):
        publish(registry, "tiny", first)
    assert not any(registry.iterdir())


# --- at the same time --------------------------------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
from model.registry import publish, roll_back
registry, *sources = map(Path, sys.argv[1:])
print("ready", flush=True)
sys.stdin.readline()
for source in sources:
    publish(registry, "tiny", source)
    roll_back(registry / "tiny")
    publish(registry, "tiny", source)
"""


def while_another_process_publishes(registry: Path, make_checkpoint: Callable[..., Path], read: Callable[[], str]) -> tuple[set[str], int]:
    """What `read()` gave, again and again while twelve checkpoints were published and rolled back, and how often it was called."""
    sources = [make_checkpoint(registry.parent / "runs", name=f"next-{seed}", seed=seed) for seed in range(10, 22)]
    command = [sys.executable, "-c", WRITER, str(registry), *map(str, sources)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdin and writer.stdout and writer.stdout.readline() == "ready\n"
        writer.stdin.write("go\n")
        writer.stdin.close()
        seen, reads = set(), 0
        while writer.poll() is None:
            seen.add(read())
            reads += 1
    assert writer.returncode == 0
    return seen, reads


def test_a_reader_never_fails_while_a_plain_folder_gets_versions(registry: Path, plain: Path, make_checkpoint: Callable[..., Path]) -> None:
    def read() -> str:
        assert not any(version.is_latest and version.error for version in versions(plain))
        assert signature(plain)
        return resolve(plain).name

    seen, reads = while_another_process_publishes(registry, make_checkpoint, read)
    assert reads > len(seen) > 1
    assert seen <= {"tiny", *(version.name for version in versions(plain))} and not list(plain.glob(".new-*"))


def test_every_byte_fits_for_a_reader_while_versions_come_and_go(registry: Path, entry: Path, make_checkpoint: Callable[..., Path]) -> None:
    seen, reads = while_another_process_publishes(registry, make_checkpoint, lambda: read_config(entry)[1])
    assert reads > len(seen) > 1 and seen <= {version.hash for version in versions(entry)}


def test_those_who_publish_at_once_take_turns(registry: Path, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folders = [make_checkpoint(tmp_path / "runs", name=str(seed), seed=seed) for seed in range(6)]
    with ThreadPoolExecutor(len(folders)) as pool:
        hashes = list(pool.map(lambda folder: publish(registry, "tiny", folder), folders))
    found = versions(registry / "tiny", thorough=True)
    assert {version.hash for version in found} == set(hashes) and not any(version.error for version in found)
    assert latest(registry / "tiny") in hashes and not list((registry / "tiny").glob(".*"))


# --- rolling back and removing -----------------------------------------------------------------------------------------


def test_rolling_back_goes_one_version_back_each_time(entry: Path, sources: Sources) -> None:
    first, second, _ = sources
    assert roll_back(entry) == second == latest(entry)
    assert roll_back(entry) == first == latest(entry)
    with pytest.raises(ValueError, match=rf"no version was published before the latest; there is: .*{first[:12]}"):
        roll_back(entry)
    assert latest(entry) == first


def test_rolling_back_to_a_version_is_told_by_the_beginning_of_its_hash(entry: Path, sources: Sources) -> None:
    for identity in sources:
        for length in (6, 12, 64):
            assert roll_back(entry, identity[:length]) == identity == latest(entry)


@pytest.mark.parametrize("prefix", ["", "0123456789ab" * 2, "latest", "..", "*"])
def test_a_prefix_that_stands_for_nothing_is_refused_with_what_there_is(entry: Path, sources: Sources, prefix: str) -> None:
    before = contents(entry)
    for change in (roll_back, remove, choose):
        with pytest.raises(
            ValueError, match=f"stands for 0 versions, not for one; there is: {', '.join(h[:12] for h in reversed(sources))}"
        ):
            change(entry, prefix)
    assert contents(entry) == before


def test_an_ambiguous_prefix_is_refused(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    for name in ("run-1", "run-2"):
        make_checkpoint(tmp_path / "tiny", name=name, seed=int(name[-1]))
    (tmp_path / "tiny" / "latest").write_text("run-1\n")
    with pytest.raises(ValueError, match=r"'run-' stands for 2 versions, not for one; there is: run-\d, run-\d"):
        roll_back(tmp_path / "tiny", "run-")
    assert roll_back(tmp_path / "tiny", "run-2") == load(tmp_path / "tiny" / "run-2").hash == latest(tmp_path / "tiny")


def test_a_broken_version_is_not_rolled_back_to(entry: Path, sources: Sources) -> None:
    first, second, third = sources
    weights = bytearray((entry / second[:12] / "dit.safetensors").read_bytes())
    weights[-1] ^= 1
    (entry / second[:12] / "dit.safetensors").write_bytes(weights)
    for to in (None, second):
        with pytest.raises(CheckpointError, match=r"dit\.safetensors was changed"):
            roll_back(entry, to)
    (entry / first[:12] / "checkpoint.json").unlink()
    with pytest.raises(OSError, match=r"checkpoint\.json"):
        roll_back(entry, first[:12])
    assert latest(entry) == third


def test_a_removed_version_is_gone_and_the_others_stay(entry: Path, sources: Sources) -> None:
    first, second, third = sources
    assert remove(entry, second[:8]) == second[:12]
    assert [version.hash for version in versions(entry, thorough=True)] == [third, first]
    assert sorted(path.name for path in entry.iterdir()) == sorted([first[:12], third[:12], "latest"])
    assert find(entry, second) is None and find(entry, first) == entry / first[:12]


def test_the_latest_version_is_never_removed(entry: Path, sources: Sources) -> None:
    *_, third = sources
    with pytest.raises(ValueError, match=f"{third[:12]} is the latest version of tiny"):
        remove(entry, third)
    assert latest(entry) == third


def test_a_broken_version_can_be_removed(entry: Path, sources: Sources) -> None:
    first = next(iter(sources))
    (entry / first[:12] / "checkpoint.json").write_text("{}")
    assert remove(entry, first[:12]) == first[:12]
    assert len(versions(entry)) == 2


# --- looking -----------------------------------------------------------------------------------------------------------


def test_only_folders_of_checkpoints_are_models(registry: Path, entry: Path, make_checkpoint: Callable[..., Path]) -> None:
    make_checkpoint(registry, name="plain")
    make_checkpoint(registry / "unfinished", name="v1")
    make_checkpoint(registry, name=".hidden")
    (registry / "empty").mkdir()
    (registry / "notes.txt").write_text("not a folder")
    assert models(registry) == {name: registry / name for name in ("plain", "tiny", "unfinished")}
    assert models(registry / "nowhere") == {} and versions(registry / "nowhere") == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"hash": "../..", "files": {}}', b'{"hash": 3, "files": {}}'])
def test_a_version_that_cannot_be_read_is_listed_with_the_reason(entry: Path, sources: Sources, content: bytes) -> None:
    path = entry / next(iter(sources))[:12] / "checkpoint.json"
    path.write_bytes(content)
    broken = [version for version in versions(entry) if version.error]
    assert [(version.hash, version.name) for version in broken] == [("", path.parent.name)]
    assert str(path) in str(broken[0].error)


def test_a_missing_or_shortened_file_is_seen_without_reading_it(entry: Path, sources: Sources) -> None:
    first, second, third = sources
    (entry / first[:12] / "vae.safetensors").unlink()
    with (entry / second[:12] / "dit.safetensors").open("r+b") as file:
        file.truncate(100)
    errors = {version.hash: version.error for version in versions(entry)}
    assert errors[third] is None
    assert "vae.safetensors" in str(errors[first]) and "dit.safetensors has 100 bytes, and " in str(errors[second])


def test_a_changed_byte_is_seen_when_every_byte_is_read(entry: Path, sources: Sources) -> None:
    path = entry / next(iter(sources))[:12] / "vae.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert not any(version.error for version in versions(entry))
    assert [version.error for version in versions(entry, thorough=True) if version.error] == [
        f"{path} was changed after it was written: its sha256 does not fit"
    ]


@pytest.mark.parametrize("name", ["gone", "..", "", "/etc", "\xff"])
def test_a_latest_that_names_nothing_is_listed_as_broken(entry: Path, sources: Sources, name: str) -> None:
    (entry / "latest").write_bytes(name.encode("latin-1"))
    *others, last = versions(entry)
    assert last.is_latest and "no such folder" in str(last.error) and {version.hash for version in others} == set(sources)
    assert not any(version.is_latest for version in others)
    assert roll_back(entry, others[0].hash) == others[0].hash == latest(entry)


def test_a_version_is_found_by_its_full_hash_only(entry: Path, sources: Sources) -> None:
    for identity in sources:
        assert find(entry, identity) == entry / identity[:12]
        assert find(entry, identity[:12]) is None
    assert find(entry, "") is None and find(entry.parent / "nowhere", next(iter(sources))) is None


# --- signature ---------------------------------------------------------------------------------------------------------


def test_the_signature_stays_while_nothing_changes_what_is_loaded(registry: Path, entry: Path, sources: Sources) -> None:
    before = signature(entry)
    load(entry)
    remove(entry, next(iter(sources)))
    publish(registry, "other", entry)
    assert signature(entry) == before


def test_the_signature_changes_with_the_version(entry: Path, sources: Sources) -> None:
    tokens = [signature(entry)]
    for identity in list(sources)[:2]:
        roll_back(entry, identity)
        tokens.append(signature(entry))
    assert len(set(tokens)) == 3


@pytest.mark.parametrize("name", ["checkpoint.json", "dit.safetensors", "vae.safetensors"])
def test_the_signature_changes_with_each_file(entry: Path, name: str) -> None:
    """The same size and the same time of modification, in the same inode, do not hide it."""
    path, tokens = resolve(entry) / name, [signature(entry)]
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    tokens.append(signature(entry))
    path.unlink()
    tokens.append(signature(entry))
    assert len(set(tokens)) == 3


def test_the_signature_of_nothing_is_a_token_too(entry: Path, plain_over: Callable[[], str]) -> None:
    tokens = [signature(entry)]
    (entry / "latest").write_text("gone")
    tokens.append(signature(entry))
    plain_over()
    tokens.append(signature(entry))
    shutil.rmtree(entry)
    tokens.append(signature(entry))
    assert len(set(tokens)) == 4
