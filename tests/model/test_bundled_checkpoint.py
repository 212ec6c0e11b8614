"""The checkpoint that `make run` serves: sound, small, and it draws what it is asked for."""

from pathlib import Path

import pytest

from model.checkpoint import Checkpoint, load
from model.sampling import sample

FOLDER = Path(__file__).parents[2] / "checkpoints" / "fashion-mnist"
SNEAKER = 7
MOST_BYTES = 25_000_000


@pytest.fixture(scope="module")
def bundled() -> Checkpoint:
    return load(FOLDER)


def test_it_is_small_and_says_how_it_was_made_and_how_good_it_is(bundled: Checkpoint) -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= MOST_BYTES
    for stage in ("vae", "dit"):
        made = bundled.config.provenance[stage]
        assert made["command"].startswith(f"dit train {stage} ") and made["minutes"] > 0 and made["hardware"]
    metrics = bundled.config.metrics
    assert metrics["class_consistency"] > 0.9 and metrics["samples"] == 10_000
    assert (FOLDER / "grid.png").is_file() and "grid.png" in (FOLDER / "README.md").read_text()


def test_a_sneaker_lies_low_and_wide_inside_a_black_border(bundled: Checkpoint) -> None:
    assert bundled.labels[SNEAKER] == ("Sneaker",)
    picture = sample(bundled, [SNEAKER], steps=10, guidance_scale=2.0, sampler="euler", seeds=[7])[0, :, :, 0].float()
    assert picture.shape == (32, 32)
    border = picture.clone()
    border[2:-2, 2:-2] = 0
    assert border.max() <= 8  # black, give or take the decoder's last grey levels
    bright = picture > 60
    height, width = bright.any(1).sum(), bright.any(0).sum()
    assert width >= 20 and height <= 20
