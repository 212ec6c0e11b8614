"""Pictures drawn many at once: the same as the slow loop's, at the cost that is told, through one graph."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor_config

from model.checkpoint import Checkpoint
from model.sampling import sample
from training.draw import Drawer, Setting, asked_labels, default_setting, load_as_served

FLOW = [
    Setting(3, "euler", 1.0),
    Setting(3, "heun", 2.0),
    Setting(5, "ab2", 3.0, (0.3, 0.7)),
    Setting(4, "euler", 2.0, (0.9, 0.95)),
    Setting(5, "ab2", 3.0, (0.3, 0.7), block_cache=2),
]
DIFFUSION = [
    Setting(3, "ddpm", 2.0, spacing="paper"),
    Setting(4, "dpm-solver++", 2.0, (0.1, 0.6), "log-snr"),
    Setting(4, "ddim", 2.0, spacing="trailing"),
]
SIX = torch.arange(6) % 4
EVERY = [("flow", setting) for setting in FLOW] + [("diffusion", setting) for setting in DIFFUSION]


@pytest.mark.parametrize(("objective", "setting"), EVERY)
def test_pictures_are_those_of_the_slow_loop(build_checkpoint: Callable[..., Checkpoint], objective: str, setting: Setting) -> None:
    checkpoint = build_checkpoint(objective)
    batches = list(Drawer(checkpoint, 4, compile=False).pictures(setting, SIX))
    labels, seeds, images = (torch.cat(column) for column in zip(*batches, strict=True))
    assert [len(batch[0]) for batch in batches] == [4, 2]
    assert (labels.tolist(), seeds.tolist()) == ([0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 5])
    wanted = sample(checkpoint, labels.tolist(), seeds=seeds.tolist(), **setting.entry())
    assert images.dtype == torch.uint8 and images.shape == wanted.shape
    assert (images.int() - wanted.int()).abs().max() <= 1  # another number of rows moves the last bits


def test_guidance_moves_the_first_three_channels_where_the_papers_code_is_followed(build_checkpoint: Callable[..., Checkpoint]) -> None:
    checkpoint = build_checkpoint("diffusion")
    drawer, setting = Drawer(checkpoint, 4, compile=False), Setting(4, "ddim", 6.0, guidance_channels="first-three")
    found = drawer.draw(setting, torch.arange(4), torch.arange(4))
    request = setting.entry() | {"guidance_channels": 3}
    wanted = sample(checkpoint, list(range(4)), seeds=list(range(4)), **request)
    on_all = drawer.draw(replace(setting, guidance_channels="all"), torch.arange(4), torch.arange(4))
    assert (found.int() - wanted.int()).abs().max() <= 1 and not torch.equal(found, on_all)
    assert "guidance_channels" not in replace(setting, guidance_channels="all").entry(), "as logs had it before there was a choice"


@pytest.mark.parametrize(("objective", "setting"), EVERY)
def test_the_evaluations_told_are_the_rows_that_the_network_sees(
    build_checkpoint: Callable[..., Checkpoint], objective: str, setting: Setting
) -> None:
    checkpoint = build_checkpoint(objective)
    drawer = Drawer(checkpoint, 4, compile=False)
    rows: list[int] = []
    drawer._network = lambda *row: rows.append(len(row[0])) or checkpoint.dit(*row)
    drawer._cached_network = lambda *row: rows.append(len(row[0])) or checkpoint.dit.cached(*row)
    list(drawer.pictures(setting, SIX))
    assert set(rows) == {4}, "one shape, whatever the steps, the guidance and the last batch"
    assert len(rows) == drawer.forwards(setting, 6)
    rows.clear()
    list(drawer.pictures(setting, torch.arange(8) % 4))
    assert len(rows) == drawer.forwards(setting, 8) == 2 * setting.evaluations(checkpoint.config)


def test_a_guided_evaluation_counts_twice(build_checkpoint: Callable[..., Checkpoint]) -> None:
    config = build_checkpoint().config
    counts = {
        Setting(5, "euler", 1.0): 5,
        Setting(5, "euler", 2.0): 10,
        Setting(5, "heun", 2.0): 18,
        Setting(5, "euler", 2.0, (0.4, 0.8)): 8,  # of 1, 0.8, 0.6, 0.4, 0.2: both ends are in
    }
    assert {setting: setting.evaluations(config) for setting in counts} == counts


def test_settings_whose_intervals_hold_the_same_evaluations_are_one(build_checkpoint: Callable[..., Checkpoint]) -> None:
    config = build_checkpoint().config
    whole, most, some = (Setting(5, "euler", 2.0, interval) for interval in ((0.0, 1.0), (0.15, 1.0), (0.3, 1.0)))
    assert whole.pictures(config) == most.pictures(config) != some.pictures(config)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own, on the way to its compiler
def test_a_compiled_network_has_one_graph_for_all_settings_and_a_block_cache_two(
    build_checkpoint: Callable[..., Checkpoint],
) -> None:
    with inductor_config.patch(compile_threads=1):  # else it starts a pool of processes that each load torch
        drawer = Drawer(build_checkpoint(), 4, compile=True)
        if not drawer.compiled and not os.environ.get("CI"):
            pytest.skip("there is no C++ compiler here")
        list(drawer.pictures(Setting(2, "euler", 1.0, block_cache=2), torch.arange(4)))  # both: with all blocks, and without
    with torch._dynamo.config.patch(error_on_recompile=True):
        for setting in FLOW:
            for _, _, images in drawer.pictures(setting, SIX):
                assert images.shape[1:] == (16, 16, 1)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own, on the way to its compiler
def test_without_a_compiler_the_network_runs_all_the_same(
    build_checkpoint: Callable[..., Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken-compiler"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    with inductor_config.patch({"cpp.cxx": (str(broken),)}):  # undone whole, which setattr on a part of that module is not
        drawer = Drawer(build_checkpoint(), 4, compile=True)
    assert not drawer.compiled
    assert next(drawer.pictures(FLOW[0], torch.arange(2)))[2].shape == (2, 16, 16, 1)


def test_the_default_setting_is_what_a_request_without_wishes_gets(build_checkpoint: Callable[..., Checkpoint]) -> None:
    config = replace(build_checkpoint("diffusion").config, default_spacing="trailing", default_guidance_interval=(0.1, 0.8))
    assert default_setting(config) == Setting(4, "ddim", 2.0, (0.1, 0.8), "trailing")
    assert default_setting(config, 9, 3.0, "dpm-solver++") == Setting(9, "dpm-solver++", 3.0, (0.0, 1.0), "log-snr")


def test_a_checkpoint_is_loaded_in_the_types_it_is_served_in(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = load_as_served(make_checkpoint(tmp_path))
    native = torch.cuda.is_bf16_supported() if torch.cuda.is_available() else torch.cpu._is_avx512_bf16_supported()
    assert next(checkpoint.dit.parameters()).dtype == (torch.bfloat16 if native else torch.float32)
    assert checkpoint.vae is not None
    assert checkpoint.vae.autoencoder.dtype == (torch.float32 if checkpoint.device.type == "cpu" or not native else torch.bfloat16)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"guidance_scale": 0.5}, "between 1 and 20, got 0.5"),
        ({"guidance_scale": float("inf")}, "between 1 and 20, got inf"),
        ({"guidance_interval": (0.8, 0.1)}, "got 0.8-0.1"),
        ({"guidance_interval": (0.0, 1.5)}, "got 0-1.5"),
        ({"block_cache": 0}, "block_cache must be at least 1"),
        ({"guidance_channels": "three"}, "guidance_channels are all or first-three, got 'three'"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Setting(**{"steps": 4, "sampler": "euler", "guidance_scale": 2.0, **wrong})


def test_labels_are_each_in_turn_or_drawn_as_by_the_paper_and_always_the_same_ones() -> None:
    assert asked_labels("balanced", 7, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    drawn = asked_labels("random", 30_000, 3)
    assert torch.equal(drawn, asked_labels("random", 30_000, 3))
    assert (drawn.bincount(minlength=3) / 30_000 - 1 / 3).abs().max() < 0.02 and not torch.equal(drawn, torch.arange(30_000) % 3)
    with pytest.raises(ValueError, match="labels are balanced or random, got 'even'"):
        asked_labels("even", 3, 3)
