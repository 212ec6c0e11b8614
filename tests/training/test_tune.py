"""`dit tune` on synthetic data and a tiny random checkpoint: what is measured, chosen, kept, and not measured again."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from app.cli import app
from model.checkpoint import read_config
from training import measure
from training.card import model_card
from training.card_metrics import setting_in_words
from training.classifier import ClassifierConfig
from training.draw import Setting
from training.evaluate import evaluate
from training.measure import Measured, MeasureLog
from training.tune import Tuned, tune
from training.tuning_plot import plot

TINY_CLASSIFIER = ClassifierConfig(widths=(8, 8), features=6, steps=60, batch_size=32)
SMALL = {"steps": (2, 4), "samplers": ("ab2", "euler"), "guidance_scales": (1.0, 2.0), "intervals": ((0.0, 1.0), (0.0, 0.6))}


@pytest.fixture
def data(make_idx_folder: Callable[..., Path], tmp_path: Path) -> Path:
    return make_idx_folder(tmp_path / "data")


@pytest.fixture
def path(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "models")


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data is the same in all tests, so its classifier is trained once."""
    return tmp_path_factory.mktemp("classifiers")


@pytest.fixture
def run(path: Path, data: Path, classifiers: Path, tmp_path: Path) -> Callable[..., Tuned]:
    """`run(**changes)`: a small grid, 8 pictures a setting and 16 in the finals."""

    def run(checkpoint: Path = path, **changes: Any) -> Tuned:
        options: dict[str, Any] = {"cache": classifiers, "classifier_config": TINY_CLASSIFIER}
        options |= {"samples": 8, "final_samples": 16, "batch_size": 8, "log": tmp_path / "log.jsonl", "compile": False, **SMALL, **changes}
        return tune(checkpoint, data, **options)

    return run


class Drawn(list[tuple[Setting, int]]):
    """Settings and numbers of pictures, in the order in which they were drawn."""

    ctrl_c_after: int | None = None


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    seen, real = Drawn(), measure.Meter._measure

    def counted(self: measure.Meter, setting: Setting, samples: int, advance: Callable[[int], Any]) -> Measured:
        if len(seen) == seen.ctrl_c_after:
            raise KeyboardInterrupt
        seen.append((setting, samples))
        return real(self, setting, samples, advance)

    monkeypatch.setattr(measure.Meter, "_measure", counted)
    return seen


def test_what_was_measured_and_chosen_is_kept_in_the_checkpoint(run: Callable[..., Tuned], path: Path) -> None:
    (_, before), weights, lines = read_config(path), (path / "dit.safetensors").read_bytes(), list[str]()
    tuned = run(show=lines.append)
    config, after = read_config(path)  # verifies every file
    assert after == before and (path / "dit.safetensors").read_bytes() == weights
    assert config.quality == {name: m.entry() for name, m in tuned.chosen.items()} and set(config.quality) == {"draft", "standard", "best"}
    standard = config.quality["standard"]
    assert config.defaults == {name: standard[name] for name in ("steps", "sampler", "guidance_scale", "guidance_interval")}
    table = config.tuning["table"]
    assert len(table) == len(tuned.tried) + len(tuned.finals) and {row["samples"] for row in table} == {8, 16}
    assert all(entry in table and entry["samples"] == 16 for entry in config.quality.values()), "only finals decide"
    assert (config.tuning["samples"], config.tuning["final_samples"], config.tuning["dtype"]) == (8, 16, lines[0].split(" on ")[0])
    assert "forwards of 8 rows ahead" in lines[1] and f"{standard['frechet_distance']:.3f}" in "\n".join(lines)
    with Image.open(io.BytesIO((path / "tuning.png").read_bytes())) as picture:
        assert np.asarray(picture.convert("L")).std() > 5
    card = (path / "README.md").read_text()
    assert "![distance over evaluations](tuning.png)" in card and f"{standard['frechet_distance']:.3f}" in card


def test_the_checkpoints_own_setting_and_every_way_to_guide_is_tried(run: Callable[..., Tuned], path: Path) -> None:
    own = Setting(4, "euler", 2.0)
    tried = {m.setting for m in run(samplers=("ab2",), save=False).tried}
    assert own in tried and {s.guidance_scale for s in tried} == {1.0, 2.0}
    assert {s.steps for s in tried if s.sampler == "ab2"} == {2, 4}


def test_the_same_run_again_takes_everything_from_the_log(run: Callable[..., Tuned], drawn: Drawn, path: Path) -> None:
    first, count = run(), len(drawn)
    card = (path / "README.md").read_text()
    lines: list[str] = []
    second = run(show=lines.append)  # the checkpoint's defaults are others now, and were measured as well
    assert len(drawn) == count
    assert [m.entry() for m in second.finals] == [m.entry() for m in first.finals] and second.chosen.keys() == first.chosen.keys()
    assert "in the log; 0 forwards" in "\n".join(lines)
    assert (path / "README.md").read_text().splitlines()[0] == card.splitlines()[0]


def test_ctrl_c_loses_nothing_that_was_measured(run: Callable[..., Tuned], drawn: Drawn, tmp_path: Path) -> None:
    drawn.ctrl_c_after = 3
    with pytest.raises(KeyboardInterrupt):
        run()
    log = tmp_path / "log.jsonl"
    assert len(log.read_text().splitlines()) == len(drawn) == 3
    log.write_text(log.read_text() + '{"checkpoint": "torn by a ki')
    drawn.ctrl_c_after = None
    measured = run().measured
    assert len(set(drawn)) == len(drawn) == len(measured), "each once, whatever was interrupted"
    assert len([json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]) == len(measured)


def test_another_checkpoint_or_number_of_pictures_is_measured_anew(
    run: Callable[..., Tuned], drawn: Drawn, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    run(save=False)
    count = len(drawn)
    run(make_checkpoint(tmp_path / "others", seed=1), save=False)
    assert len(drawn) >= 2 * count - 8
    anew = len(drawn)
    run(samples=12, save=False)
    assert {samples for _, samples in drawn[anew:]} <= {12, 16} and any(samples == 12 for _, samples in drawn[anew:])


def test_both_stages_may_have_the_same_pictures(run: Callable[..., Tuned], drawn: Drawn) -> None:
    tuned = run(samples=16, save=False)
    assert len(drawn) == len(tuned.tried) == len(tuned.measured)


def test_a_block_cache_is_measured_and_told_but_never_chosen(run: Callable[..., Tuned], path: Path) -> None:
    lines: list[str] = []
    tuned = run(block_caches=(1, 2), show=lines.append)
    assert {m.setting for m in tuned.cached} == {replace(m.setting, block_cache=2) for m in tuned.chosen.values()}
    assert all(m.samples == 16 for m in tuned.cached)
    config, _ = read_config(path)
    assert [row for row in config.tuning["table"] if row.get("block_cache") == 2]
    assert not any("block_cache" in entry for entry in [config.defaults, *config.quality.values()])
    assert "block cache 2" in lines[-2] and "block cache 2 |" in (path / "README.md").read_text()


def test_without_saving_the_checkpoint_stays_as_it_was(run: Callable[..., Tuned], path: Path) -> None:
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    run(save=False)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_a_diffusion_checkpoint_keeps_the_spacing_that_was_chosen(
    run: Callable[..., Tuned], make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    diffusion = make_checkpoint(tmp_path / "models", "diffusion", name="diffusion")
    tuned = run(diffusion, samplers=("dpm-solver++", "ddim"))
    config, _ = read_config(diffusion)
    assert config.default_spacing == tuned.chosen["standard"].setting.spacing is not None
    assert all(entry["spacing"] in ("paper", "leading", "trailing", "log-snr") for entry in config.quality.values())


def test_an_evaluation_after_it_draws_the_tuned_defaults_and_keeps_what_was_tuned(
    run: Callable[..., Tuned], path: Path, data: Path, classifiers: Path
) -> None:
    run(guidance_scales=(2.0,), intervals=((0.0, 0.6),))
    tuned, _ = read_config(path)
    options: dict[str, Any] = {"batch_size": 8, "cache": classifiers, "classifier_config": TINY_CLASSIFIER}
    metrics = evaluate(path, data, samples=16, **options)
    config, _ = read_config(path)
    assert config == replace(tuned, metrics=metrics)
    assert {name: metrics[name] for name in tuned.defaults} == tuned.defaults
    assert "tuning.png" in (path / "README.md").read_text() and (path / "tuning.png").exists()
    assert evaluate(path, data, samples=16, guidance_scale=3.0, save=False, **options)["guidance_interval"] == [0.0, 1.0]


def test_settings_that_cannot_be_are_refused_before_any_work(run: Callable[..., Tuned], tmp_path: Path) -> None:
    for wrong, message in {
        "samples": ({"samples": 3}, "at least the number of classes, 4, got 3"),
        "finals": ({"final_samples": 7}, "at least as many pictures as the first stage, 8, got 7"),
        "sampler": ({"samplers": ("ddim",)}, "which has: euler, heun, ab2"),
        "cache": ({"block_caches": (0,)}, "block_cache must be at least 1"),
    }.values():
        with pytest.raises(ValueError, match=message):
            run(cache=tmp_path / "classifiers", **wrong)
    assert not (tmp_path / "classifiers").exists() and not (tmp_path / "log.jsonl").exists()


def test_a_line_of_the_log_counts_for_its_subject_alone(tmp_path: Path) -> None:
    setting = Setting(4, "euler", 2.0, (0.0, 0.5))
    found = Measured(setting, 100, 6, 1.25, 0.875, 3.0)
    log = MeasureLog(tmp_path / "runs" / "log.jsonl", {"checkpoint": "a", "dtype": "float32"})
    assert log.find(setting, 100) is None
    log.add(found)
    again = MeasureLog(log.path, {"checkpoint": "a", "dtype": "float32"})
    assert log.find(setting, 100) == again.find(setting, 100) == found
    assert again.find(setting, 200) is None and again.find(replace(setting, steps=5), 100) is None
    assert MeasureLog(log.path, {"checkpoint": "b", "dtype": "float32"}).find(setting, 100) is None


def test_the_plot_shows_every_sampler_and_choice() -> None:
    tried = [Measured(Setting(n, s, 2.0), 10, 2 * n, 5 / n + (s == "euler"), 0.9, 1.0) for n in (4, 8, 64) for s in ("ab2", "euler")]
    finals = [replace(m, samples=100) for m in tried[::2]]
    one = plot(tried, finals, {"draft": finals[0], "standard": finals[1], "best": finals[2]})
    other = plot(tried, finals, {"draft": finals[0], "standard": finals[0], "best": finals[0]})
    assert one.startswith(b"\x89PNG") and one != other


def test_a_setting_in_words_leaves_out_what_is_no_choice() -> None:
    assert setting_in_words(Setting(8, "ab2", 1.7).entry()) == "ab2, 8 steps, guidance 1.7"
    told = Setting(8, "ddim", 2.0, (0.1, 0.8), "trailing").entry()
    assert setting_in_words(told) == "ddim, 8 steps, guidance 2 in t/T 0.1–0.8, trailing spacing"
    assert setting_in_words({}) == "?, ? steps, guidance ?"


def test_the_card_of_an_untuned_checkpoint_has_no_section_of_it(path: Path) -> None:
    assert "Quality and speed" not in model_card(read_config(path)[0], {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "5,x"], "--steps takes values with commas between them, got '5,x'"),
        (["--intervals", "0.8-0.1"], "low-high with 0 ≤ low ≤ high ≤ 1, got 0.8-0.1"),
        (["--guidance-scales", "0.5"], "between 1 and 20, got 0.5"),
        (["--samplers", "ddpm"], "which has: euler, heun, ab2"),
        (["--block-cache", "0"], "block_cache must be at least 1"),
        (["--samples", "2"], "at least the number of classes, 4, got 2"),
    ],
)
def test_the_command_refuses_in_one_line(path: Path, data: Path, options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["tune", str(path), "--data", str(data), *options])
    assert result.exit_code == 1 and result.stderr.startswith("dit: ") and message in result.stderr and result.stderr.count("\n") == 1


def test_the_command_stopped_by_ctrl_c_says_how_to_go_on(path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("training.tune.get_classifier", stopped)
    result = CliRunner().invoke(app, ["tune", str(path), "--data", str(data)])
    assert result.exit_code == 130 and "the same command goes on" in result.stderr
