"""The checkpoint folder: written whole or not at all, refused when one byte of it has changed."""

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model import checkpoint as module
from model import folders
from model.checkpoint import Checkpoint, CheckpointError, annotate, load, read_config, resolve, save
from model.sampling import sample

FILES = ["dit.safetensors", "vae.safetensors", "README.md", "checkpoint.json"]


@pytest.fixture(params=["flow", "diffusion"])
def objective(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def saved(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(tmp_path / "models")


def rewrite_manifest(folder: Path, change: Callable[[dict], None]) -> None:
    """Change `checkpoint.json` as a careful hand would: with a hash and a checksum that fit."""
    document = json.loads((folder / "checkpoint.json").read_text())
    document.pop("checksum")
    change(document)
    with contextlib.suppress(KeyError):  # what it is made of is missing
        document["hash"] = module._identity(document)
    document["checksum"] = module.hashlib.sha256(module._canonical(document)).hexdigest()
    (folder / "checkpoint.json").write_bytes(module._canonical(document))


# --- round trip --------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_what_is_loaded(tmp_path: Path, build_checkpoint: Callable[..., Checkpoint], objective: str) -> None:
    original = build_checkpoint(objective)
    identity = save(tmp_path / "a", original)
    loaded = load(tmp_path / "a")
    assert loaded.config == original.config and loaded.hash == identity == original.hash and len(identity) == 64
    for mine, theirs in ((original.dit, loaded.dit), (original.vae, loaded.vae)):
        state = theirs.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in mine.state_dict().items())
        assert not theirs.training and not any(p.requires_grad for p in theirs.parameters())
    settings = {"steps": 2, "guidance_scale": 2.0, "sampler": original.config.default_sampler, "seeds": [1, 2]}
    assert torch.equal(sample(loaded, [0, 1], **settings), sample(original, [0, 1], **settings))


def test_a_loaded_checkpoint_has_the_process_of_its_objective(tmp_path: Path, make_checkpoint: Callable[..., Path], objective: str) -> None:
    loaded = load(make_checkpoint(tmp_path, objective))
    assert (loaded.flow is not None, loaded.diffusion is not None) == (objective == "flow", objective == "diffusion")
    assert loaded.labels[0] == ("cat", "house cat") and loaded.device == torch.device("cpu")


def test_loading_leaves_the_callers_random_numbers_alone(saved: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    load(saved)
    assert torch.equal(torch.rand(4), expected)


def test_everything_is_readable_by_others_and_nothing_else_is_left(saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == sorted(FILES)
    assert [p.name for p in saved.parent.iterdir()] == ["tiny"]
    assert saved.stat().st_mode & 0o777 == 0o755
    assert all(p.stat().st_mode & 0o444 == 0o444 for p in saved.iterdir())


def test_a_checkpoint_without_a_vae_loads_without_one(tmp_path: Path, build_checkpoint: Callable[..., Checkpoint]) -> None:
    original = build_checkpoint("flow")
    save(tmp_path / "a", Checkpoint(replace(original.config, vae=None), original.dit, None))
    assert load(tmp_path / "a").vae is None and not (tmp_path / "a" / "vae.safetensors").exists()


def test_a_module_that_the_configuration_does_not_describe_is_not_saved(
    tmp_path: Path, build_checkpoint: Callable[..., Checkpoint], tiny_dit_config: Callable[..., object]
) -> None:
    original = build_checkpoint("flow")
    for wrong in (
        Checkpoint(original.config, original.dit, None),  # the configuration has a VAE
        Checkpoint(replace(original.config, vae=None), original.dit, original.vae),
        Checkpoint(replace(original.config, architecture=tiny_dit_config("flow", depth=3)), original.dit, original.vae),
    ):
        with pytest.raises(ValueError, match="does not match"):
            save(tmp_path / "a", wrong)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("stored", "asked", "dit", "vae"),
    [
        (None, None, torch.float32, torch.float32),
        (torch.bfloat16, None, torch.bfloat16, torch.float32),
        (torch.float16, None, torch.float16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32, torch.float32),
        (None, torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_weights_have_the_stored_type_unless_another_is_asked_for(
    tmp_path: Path,
    build_checkpoint: Callable[..., Checkpoint],
    stored: torch.dtype | None,
    asked: torch.dtype | None,
    dit: torch.dtype,
    vae: torch.dtype,
) -> None:
    save(tmp_path / "a", build_checkpoint("flow"), dtype=stored)
    loaded = load(tmp_path / "a", dtype=asked)
    assert {p.dtype for p in loaded.dit.parameters()} == {dit} and {p.dtype for p in loaded.vae.parameters()} == {vae}
    pictures = sample(loaded, [0, 1], steps=2, guidance_scale=1.0, sampler="euler", seeds=[1, 2])
    assert pictures.shape == (2, 16, 16, 1) and float(pictures.float().std()) > 5


def test_latent_statistics_stay_exact_in_half_precision(saved: Path) -> None:
    vae = load(saved, dtype=torch.bfloat16).vae
    assert vae.latent_std.flatten().tolist() == torch.tensor(vae.config.latent_std).tolist()


# --- hash --------------------------------------------------------------------------------------------------------------


def test_the_hash_is_that_of_the_content(tmp_path: Path, build_checkpoint: Callable[..., Checkpoint]) -> None:
    first, again = (save(tmp_path / name, build_checkpoint("flow")) for name in ("a", "b"))
    assert first == again == read_config(tmp_path / "a")[1]
    assert (tmp_path / "a" / "checkpoint.json").read_bytes() == (tmp_path / "b" / "checkpoint.json").read_bytes()
    assert len({first, save(tmp_path / "c", build_checkpoint("flow", seed=1)), save(tmp_path / "d", build_checkpoint("diffusion"))}) == 3


def test_one_weight_changes_the_hash(tmp_path: Path, build_checkpoint: Callable[..., Checkpoint]) -> None:
    original = build_checkpoint("flow")
    before = save(tmp_path / "a", original)
    original.dit.blocks[1].mlp.fc2.bias[3] += 1e-6
    assert save(tmp_path / "b", original) != before


@pytest.mark.parametrize("change", [{"latent_std": (1.7, 0.9, 1.3, 2.2)}, {"latent_mean": (0.1, -0.2, 0.3, 0.1)}])
def test_latent_statistics_belong_to_the_hash(tmp_path: Path, build_checkpoint: Callable[..., Checkpoint], change: dict) -> None:
    original = build_checkpoint("flow")
    before = save(tmp_path / "a", original)
    vae_config = replace(original.config.vae, **change)
    changed_vae = type(original.vae)(vae_config)
    changed_vae.load_state_dict(original.vae.state_dict())
    assert save(tmp_path / "b", Checkpoint(replace(original.config, vae=vae_config), original.dit, changed_vae)) != before


def test_defaults_and_descriptions_do_not_belong_to_the_hash(tmp_path: Path, build_checkpoint: Callable[..., Checkpoint]) -> None:
    original = build_checkpoint("flow")
    before = save(tmp_path / "a", original, card="one")
    other = replace(original.config, default_steps=9, default_guidance_scale=3.0, metrics={"fid": 1.0}, provenance={"by": "me"})
    assert save(tmp_path / "b", replace(original, config=other), card="two") == before


def test_annotate_adds_metrics_and_files_and_keeps_the_hash(saved: Path) -> None:
    before, weights = load(saved), (saved / "dit.safetensors").read_bytes()
    annotate(saved, metrics={"class_consistency": 0.94}, card="# Evaluated\n", files={"grid.png": b"\x89PNG"})
    after = load(saved)
    assert after.hash == before.hash and (saved / "dit.safetensors").read_bytes() == weights
    assert after.config == replace(before.config, metrics={"class_consistency": 0.94})
    assert (saved / "README.md").read_text() == "# Evaluated\n" and (saved / "grid.png").read_bytes() == b"\x89PNG"
    assert [p.name for p in saved.parent.iterdir()] == ["tiny"]
    (saved / "grid.png").write_bytes(b"\x88PNG")
    with pytest.raises(CheckpointError, match=r"grid\.png"):
        load(saved)


def test_annotate_replaces_defaults_quality_and_tuning_and_keeps_the_hash_and_the_rest(saved: Path) -> None:
    annotate(saved, card="# Evaluated\n", files={"grid.png": b"\x89PNG"}, metrics={"class_consistency": 0.94})
    before = load(saved)
    changes = {
        "default_steps": 8,
        "default_sampler": "ab2",
        "default_guidance_scale": 1.7,
        "default_guidance_interval": (0.15, 0.8),
        "quality": {"best": {"steps": 30, "sampler": "ab2", "guidance_scale": 2.0, "guidance_interval": [0.0, 0.8]}},
        "tuning": {"samples": 12, "table": [{"steps": 8, "frechet_distance": 1.5}]},
    }
    annotate(saved, card="# Tuned\n", files={"tuning.png": b"\x89PNG"}, **changes)
    after = load(saved)
    assert after.hash == before.hash and after.config == replace(before.config, **changes)
    assert after.config.metrics == {"class_consistency": 0.94} and (saved / "grid.png").exists() and (saved / "tuning.png").exists()
    wanted = {"steps": 8, "sampler": "ab2", "guidance_scale": 1.7, "guidance_interval": [0.15, 0.8]}
    assert after.config.defaults == wanted and json.loads((saved / "checkpoint.json").read_text())["defaults"] == wanted


def test_annotate_refuses_to_make_another_checkpoint(saved: Path) -> None:
    before, sound = read_config(saved), (saved / "checkpoint.json").read_bytes()
    architecture = replace(before[0].architecture, frequency_shift=1)
    with pytest.raises(ValueError, match="architecture: this would make another checkpoint"):
        annotate(saved, card="", files={}, architecture=architecture)
    assert (saved / "checkpoint.json").read_bytes() == sound
    assert [p.name for p in saved.parent.iterdir()] == ["tiny"]


def test_a_checkpoint_that_was_never_tuned_says_nothing_of_it(saved: Path) -> None:
    document = json.loads((saved / "checkpoint.json").read_text())
    assert "tuning" not in document and set(document["defaults"]) == {"steps", "guidance_scale", "sampler"}
    config, _ = read_config(saved)
    assert config.default_guidance_interval is None and config.tuning == {}
    assert config.guidance_interval_of(config.default_guidance_scale) == (0.0, 1.0)


def test_the_default_interval_is_for_the_default_scale(saved: Path) -> None:
    config = replace(read_config(saved)[0], default_guidance_interval=(0.1, 0.7))
    assert config.guidance_interval_of(config.default_guidance_scale) == (0.1, 0.7)
    assert config.guidance_interval_of(config.default_guidance_scale + 1) == (0.0, 1.0)


@pytest.mark.parametrize("interval", [[0.8, 0.1], [-0.1, 1], [0, 1.1], [0.5], ["a", "b"], 3])
def test_a_wrong_default_interval_is_refused(saved: Path, interval: Any) -> None:
    rewrite_manifest(saved, lambda document: document["defaults"].update(guidance_interval=interval))
    with pytest.raises(CheckpointError, match=r"checkpoint\.json"):
        load(saved)


def test_annotate_refuses_a_damaged_checkpoint(saved: Path) -> None:
    (saved / "README.md").write_text("edited")
    with pytest.raises(CheckpointError, match=r"README\.md"):
        annotate(saved, metrics={}, card="", files={})
    assert (saved / "README.md").read_text() == "edited"


# --- damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_is_refused_and_its_file_named(saved: Path, name: str) -> None:
    path = saved / name
    sound = path.read_bytes()
    last = len(sound) - 1
    for position in sorted({0, 1, 7, last // 5, last // 3, last // 2, last * 4 // 5, last - 1, last}):
        for bit in (0x01, 0x20, 0x80):
            damaged = bytearray(sound)
            damaged[position] ^= bit
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=str(path)):
                load(saved)
    path.write_bytes(sound)
    load(saved)


def test_the_whole_manifest_is_vouched_for(saved: Path) -> None:
    path = saved / "checkpoint.json"
    sound = path.read_bytes()
    for position in range(0, len(sound), 17):
        damaged = bytearray(sound)
        damaged[position] ^= 0x04
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"checkpoint\.json"):
            read_config(saved)


@pytest.mark.parametrize(
    ("old", "new"), [(b"\n", b"\t"), (b"  ", b" \n"), (b"}\n", b"}\n\n"), (b": 4,", b":  4,"), (b'"depth"', b'"\\u0064epth"')]
)
def test_a_manifest_that_only_reads_the_same_is_refused(saved: Path, old: bytes, new: bytes) -> None:
    path = saved / "checkpoint.json"
    sound = path.read_bytes()
    path.write_bytes(sound.replace(old, new))
    assert json.loads(path.read_bytes()) == json.loads(sound) and path.read_bytes() != sound
    with pytest.raises(CheckpointError, match=r"checkpoint\.json was changed"):
        load(saved)


@pytest.mark.parametrize("name", FILES[:3])
@pytest.mark.parametrize("damage", ["truncated", "extended", "empty", "missing", "folder"])
def test_a_damaged_file_is_refused_and_named(saved: Path, name: str, damage: str) -> None:
    path = saved / name
    sound = path.read_bytes()
    if damage in ("missing", "folder"):
        path.unlink()
        if damage == "folder":
            path.mkdir()
    else:
        path.write_bytes({"truncated": sound[:-1], "extended": sound + b"\0", "empty": b""}[damage])
    with pytest.raises(CheckpointError, match=str(path)):
        load(saved)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"3", b"{}", b"\xff\xfe", b'{"checksum": 3}', b'{"format": 1}'])
def test_a_manifest_that_is_none_is_refused(saved: Path, content: bytes) -> None:
    (saved / "checkpoint.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoint\.json"):
        load(saved)


def test_an_unknown_format_is_refused_with_both_versions(saved: Path) -> None:
    rewrite_manifest(saved, lambda document: document.update(format=2))
    with pytest.raises(CheckpointError, match=r"checkpoint\.json has format 2; this version reads format 1"):
        load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("labels"), "labels"),
        (lambda d: d.pop("objective"), "objective"),
        (lambda d: d.pop("files"), "files"),
        (lambda d: d["files"].pop("dit.safetensors"), r"dit\.safetensors"),
        (lambda d: d["files"].update({"../../secret": {"bytes": 1, "sha256": ""}}), "secret"),
        (lambda d: d["architecture"].pop("depth"), "depth"),
        (lambda d: d["architecture"].update(experts=8), "DiTConfig has no field 'experts'"),
        (lambda d: d["architecture"].update(depth=0), "depth must be at least 1"),
        (lambda d: d["architecture"].update(depth="two"), r"checkpoint\.json"),
        (lambda d: d["architecture"].update(depth=3), r"dit\.safetensors: lacks key 'blocks\.2\."),
        (lambda d: d["architecture"].update(depth=1), r"dit\.safetensors: has an unknown key 'blocks\.1\."),
        (lambda d: d["architecture"].update(hidden_size=64), r"dit\.safetensors.*size"),
        (lambda d: d["vae"].update(latent_channels=8, latent_mean=[], latent_std=[]), "8 channels, the DiT takes 4"),
        (lambda d: d["vae"].update(layers_per_block=2), r"vae\.safetensors: lacks key"),
        (lambda d: d["labels"].pop(), "3 labels for 4 classes"),
        (lambda d: d["labels"].__setitem__(0, []), "at least one name"),
        (lambda d: d.update(image_size=32), "image_size"),
        (lambda d: d["objective"].update(kind="gan"), "'gan'"),
        (lambda d: d["defaults"].pop("steps"), "steps"),
        (lambda d: d["defaults"].update(sampler="ddim"), "ddim"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(saved: Path, change: Callable[[dict], None], message: str) -> None:
    rewrite_manifest(saved, change)
    with pytest.raises(CheckpointError, match=message):
        load(saved)


def test_weights_that_do_not_fit_are_refused_at_every_key(saved: Path) -> None:
    state = load_file(saved / "dit.safetensors")
    del state["final_layer.linear.bias"]
    module.save_file(state, saved / "dit.safetensors")
    content = (saved / "dit.safetensors").read_bytes()
    entry = {"bytes": len(content), "sha256": module.hashlib.sha256(content).hexdigest()}
    rewrite_manifest(saved, lambda document: document["files"].update({"dit.safetensors": entry}))
    with pytest.raises(CheckpointError, match=r"dit\.safetensors: lacks key 'final_layer\.linear\.bias'"):
        load(saved)


# --- writing -----------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("step", ["save_file", "_write_manifest", "_replace_folder", "fsync"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space left")], ids=["interrupted", "disk full"])
def test_an_interrupted_save_leaves_nothing_behind(
    tmp_path: Path, build_checkpoint: Callable[..., Checkpoint], monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(module, step, fail)
    with pytest.raises(BaseException, match=r"no space left|^$"):
        save(tmp_path / "a", build_checkpoint("flow"))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("step", ["save_file", "_write_manifest", "_replace_folder"])
def test_an_interrupted_overwrite_leaves_the_old_checkpoint(
    saved: Path, build_checkpoint: Callable[..., Checkpoint], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    before = contents(saved.parent)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, step, fail)
    with pytest.raises(KeyboardInterrupt):
        save(saved, build_checkpoint("flow", seed=1), overwrite=True)
    assert contents(saved.parent) == before


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_rename_leaves_the_old_checkpoint(
    saved: Path, build_checkpoint: Callable[..., Checkpoint], monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    before, rename, calls = contents(saved.parent), os.rename, []

    def sometimes(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == failing:
            raise OSError("no space left")
        rename(source, target)

    monkeypatch.setattr(folders, "_exchange_at_once", lambda first, second: False)  # a system that has no such thing
    monkeypatch.setattr(os, "rename", sometimes)
    with pytest.raises(OSError, match="no space left"):
        save(saved, build_checkpoint("flow", seed=1), overwrite=True)
    assert contents(saved.parent) == before


def test_a_checkpoint_is_never_written_over_another_unless_told_to(saved: Path, build_checkpoint: Callable[..., Checkpoint]) -> None:
    before = contents(saved)
    with pytest.raises(FileExistsError, match="exists"):
        save(saved, build_checkpoint("flow", seed=1))
    assert contents(saved) == before
    new = save(saved, build_checkpoint("flow", seed=1), overwrite=True)
    assert load(saved).hash == new and contents(saved) != before
    assert [p.name for p in saved.parent.iterdir()] == ["tiny"]


def test_a_folder_that_appears_while_saving_is_not_overwritten(
    tmp_path: Path, build_checkpoint: Callable[..., Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, write = tmp_path / "a", module._write_manifest

    def meanwhile(*arguments: object) -> str:
        target.mkdir()
        (target / "theirs").write_text("precious")
        return write(*arguments)

    monkeypatch.setattr(module, "_write_manifest", meanwhile)
    with pytest.raises(OSError, match=r"not empty|exist"):
        save(target, build_checkpoint("flow"))
    assert contents(tmp_path) == {"a/theirs": b"precious"}


def test_metrics_that_are_not_json_are_refused_and_nothing_is_written(tmp_path: Path, build_checkpoint: Callable[..., Checkpoint]) -> None:
    original = build_checkpoint("flow")
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(tmp_path / "a", replace(original, config=replace(original.config, metrics={"fid": float("nan")})))
    assert not any(tmp_path.iterdir())


# --- registry ----------------------------------------------------------------------------------------------------------


def test_latest_names_the_version_that_is_loaded(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    old, new = make_checkpoint(tmp_path, name="111111111111"), make_checkpoint(tmp_path, name="222222222222", seed=1)
    (tmp_path / "latest").write_text("222222222222\n")
    assert resolve(tmp_path) == new and load(tmp_path).hash == load(new).hash
    (tmp_path / "latest").write_text("111111111111")
    assert load(tmp_path).hash == load(old).hash


@pytest.mark.parametrize("name", ["gone", "..", ".", "", "../other", "/etc"])
def test_latest_must_name_a_version_beside_it(tmp_path: Path, make_checkpoint: Callable[..., Path], name: str) -> None:
    make_checkpoint(tmp_path, name="outer")
    registry = tmp_path / "outer" / "registry"
    make_checkpoint(registry, name="111111111111")
    (registry / "latest").write_text(name)
    with pytest.raises(CheckpointError, match=r"latest.*no checkpoint folder beside it"):
        load(registry)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match=r"is not a checkpoint: it has neither checkpoint\.json nor a file 'latest'"):
            load(folder)


def test_a_default_spacing_belongs_to_the_default_sampler(build_checkpoint: Callable[..., Checkpoint], tmp_path: Path) -> None:
    checkpoint = build_checkpoint("diffusion")
    checkpoint.config = replace(checkpoint.config, default_spacing="leading")
    save(tmp_path / "one", checkpoint)
    loaded = load(tmp_path / "one")
    assert loaded.config == checkpoint.config and loaded.config.defaults["spacing"] == "leading"
    assert [loaded.config.spacing_of(name) for name in ("ddim", "ddpm", "dpm-solver++")] == ["leading", "paper", "log-snr"]
    assert build_checkpoint("flow").config.spacing_of("euler") is None
    settings = {"steps": 5, "guidance_scale": 1.0, "sampler": "ddim", "seeds": [3]}
    assert torch.equal(sample(loaded, [0], **settings), sample(loaded, [0], spacing="leading", **settings))
    assert not torch.equal(sample(loaded, [0], **settings), sample(loaded, [0], spacing="paper", **settings))
    with pytest.raises(ValueError, match=r"default spacing must be one of this model's: paper, .*; got 'sideways'"):
        replace(checkpoint.config, default_spacing="sideways")
