"""`dit cost`: what it lists, what `--json` promises, and one line for a name that there is not."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from app.cli import app
from model.checkpoint import Checkpoint, save
from model.config import PRESETS

EVERY_PART = {"qk_norm": True, "rms_norm": True, "swiglu": True, "rope": True}


def dit(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["cost", *map(str, arguments)])


def counted(*arguments: object) -> list[dict[str, Any]]:
    result = dit(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def sixteen() -> list[dict[str, Any]]:
    return counted()


def test_without_arguments_it_lists_the_papers_sixteen(sixteen: list[dict[str, Any]]) -> None:
    lines = [(c["model"], c["block"], c["image_size"]) for c in sixteen]
    assert lines[:12] == [(name, "adaln-zero", 256) for name in PRESETS] and len(PRESETS) == 12
    assert lines[12] == ("DiT-XL/2", "adaln-zero", 512)
    assert sorted(lines[13:]) == [("DiT-XL/2", block, 256) for block in ("adaln", "cross-attention", "in-context")]


def test_every_object_has_the_promised_fields_of_the_promised_kinds(sixteen: list[dict[str, Any]]) -> None:
    kinds = {"model": str, "block": str, "image_size": int, "parameters": int, "gmacs": float}
    for entry in sixteen:
        assert {name: type(entry[name]) for name in kinds} == kinds
    xl = sixteen[11]
    assert (xl["model"], xl["parameters"]) == ("DiT-XL/2", 675_129_632) and xl["gmacs"] == pytest.approx(118.64, rel=0.001)


def test_named_presets_are_counted_in_the_order_given() -> None:
    assert [c["model"] for c in counted("DiT-S/8", "DiT-S/2", "DiT-S/4")] == ["DiT-S/8", "DiT-S/2", "DiT-S/4"]


def test_the_options_choose_picture_size_block_and_steps() -> None:
    (plain,) = counted("DiT-S/8")
    (other,) = counted("DiT-S/8", "--image-size", 512, "--block", "in-context", "--steps", 7)
    assert (other["image_size"], other["block"], other["steps"]) == (512, "in-context", 7)
    assert (plain["image_size"], plain["block"], plain["steps"]) == (256, "adaln-zero", 250)
    assert other["gmacs"] > 3 * plain["gmacs"]
    assert other["picture_gmacs"] == pytest.approx(14 * other["gmacs"] + other["decoder_gmacs"])


def test_without_json_it_prints_a_table() -> None:
    result = dit("DiT-S/8", "--steps", 10)
    assert result.exit_code == 0
    header, line, *_ = result.stdout.splitlines()
    assert header.startswith("model") and header.endswith("10 steps")
    assert line.split()[:5] == ["DiT-S/8", "adaln-zero", "256", "33,148,160", "0.36"]


@pytest.mark.parametrize("block", ["adaln-zero", "cross-attention"])
def test_a_checkpoint_folder_is_counted_as_it_is_built(tmp_path: Path, make_checkpoint: Callable[..., Path], block: str) -> None:
    folder = make_checkpoint(tmp_path, "diffusion", block=block, **EVERY_PART)
    plain = make_checkpoint(tmp_path, "diffusion", name="plain")
    mine, theirs = counted(folder, plain, "--steps", 3)
    assert (mine["model"], mine["block"], mine["image_size"], mine["steps"]) == (str(folder), block, 16, 3)
    assert mine["parameters"] != theirs["parameters"] and mine["decoder_gmacs"] == theirs["decoder_gmacs"] > 0


def test_a_checkpoint_without_a_vae_has_no_decoder(tmp_path: Path, build_checkpoint: Callable[..., Checkpoint]) -> None:
    original = build_checkpoint("flow")
    save(tmp_path / "a", Checkpoint(replace(original.config, vae=None), original.dit, None))
    (entry,) = counted(tmp_path / "a", "--steps", 5)
    assert entry["decoder_gmacs"] is None and entry["picture_gmacs"] == pytest.approx(10 * entry["gmacs"])
    assert dit(tmp_path / "a").stdout.splitlines()[1].split()[-2] == "none"


def test_a_registry_entry_is_counted_by_its_latest_version(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    make_checkpoint(tmp_path / "entry", name="v1")
    folder = make_checkpoint(tmp_path / "entry", name="v2", block="adaln")
    (tmp_path / "entry" / "latest").write_text("v2\n")
    assert replace_model(counted(tmp_path / "entry")) == replace_model(counted(folder))


def replace_model(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**entry, "model": ""} for entry in entries]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["DiT-XXL/2"], "'DiT-XXL/2' is neither a checkpoint folder nor one of: DiT-S/8, DiT-S/4"),
        (["dit-xl/2"], "DiT-XL/2"),
        (["DiT-S/8", "nowhere"], "'nowhere' is neither"),
        (["DiT-S/8", "--block", "mamba"], "block must be one of adaln-zero, adaln, cross-attention, in-context, got 'mamba'"),
        (["DiT-S/8", "--image-size", "100"], "image_size must be a multiple of 8 up to 2048, got 100"),
        (["DiT-S/8", "--image-size", "0"], "image_size must be a multiple of 8 up to 2048, got 0"),
        (["DiT-S/8", "--image-size", "32"], "input_size 4 is not a multiple of patch_size 8"),
        ([Path(__file__).parent], "is not a checkpoint"),
        ([__file__], "is not a checkpoint"),
    ],
)
def test_what_cannot_be_counted_gives_one_line_and_exit_code_one(arguments: list[object], message: str) -> None:
    result = dit(*arguments)
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("dit: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


def test_a_damaged_checkpoint_gives_one_line_that_names_the_file(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint(tmp_path)
    (folder / "dit.safetensors").write_bytes(b"short")
    result = dit(folder)
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert f"{folder / 'dit.safetensors'} was changed" in result.stderr


def test_no_steps_at_all_are_refused() -> None:
    assert dit("DiT-S/8", "--steps", 0).exit_code == 2


@pytest.mark.parametrize("arguments", [(), ("checkpoints/fashion-mnist",)], ids=["the paper's", "a checkpoint"])
def test_options_of_a_preset_are_not_ignored_elsewhere(arguments: tuple[str, ...]) -> None:
    result = dit(*arguments, "--block", "in-context")
    assert result.exit_code == 1 and "--block goes with a preset" in result.output
