"""benchmarks/train.py, which is a script and in no package: both sides train, and its figures are what they say."""

import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def train() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("train")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """So small a batch is no quicker on two, and far slower where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_both_sides_train_the_same_network_on_the_same_objective(train: ModuleType, tmp_path: Path) -> None:
    case = train.Case("bundled", 4, torch.device("cpu"))
    plain, ours = train.plain(case, 3), train.ours(case, 20, tmp_path, compile=False)
    assert plain["images_per_s"] > 0 and ours["images_per_s"] > 0 and 0 < plain["encoding_share"] < 1
    assert plain["loss"] == pytest.approx(ours["loss"], rel=0.5), "near 1 at the first steps: a network that knows nothing yet"
    assert min(plain["peak_mib"], ours["peak_mib"]) > 100


def test_presets_train_as_the_public_code_does(train: ModuleType) -> None:
    dit, vae = train.Case("DiT-S/2", 8, torch.device("cpu")).shapes()
    assert (dit.hidden_size, dit.depth, dit.learn_sigma, dit.num_classes) == (384, 12, True, 1000)
    assert dit.input_size == vae.latent_size == 32 and vae.image_size == 256
    recipe = train.Case("DiT-S/2", 8, torch.device("cpu")).recipe(10)
    trained = recipe.dit.architecture(input_size=32, in_channels=4, num_classes=1000)
    assert trained == dit and recipe.dit.optimiser.batch_size == 8 and recipe.dit.objective == "diffusion"


def test_a_share_of_the_peak_counts_three_forwards(train: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"images_per_s": 2.0, "encoding_share": 0.9, "peak_mib": 10.0}, {"images_per_s": 10.0, "peak_mib": 20.0}
    monkeypatch.setattr(train, "in_a_process", lambda case, side, processes=1: dict(figures[side == "ours"]))
    monkeypatch.setattr(train, "matrix_peak", lambda device, dtype: 1818.0)
    result = train.measure(train.Case("DiT-S/2", 8, torch.device("cpu")), [1, 2])
    assert result["sides"]["ours, 2 processes"]["times_plain"] == 5.0
    assert math.isclose(result["sides"]["ours, 1 process"]["share_of_peak"], 10 * 3 * 6.06 / 1818, rel_tol=0.01)
    assert "5.00×" in train.lines(result)[2] and "90 % of the time" in train.lines(result)[1]
