"""What pictures are compared with: statistics as ADM writes them, pictures, or both."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from training import reference_files
from training.judgement import Judgement
from training.metrics import frechet_distance, gaussian_distance
from training.reference import reference_of
from training.reference_files import load_reference

FEATURES, SPATIAL = 6, 4


class Pixels:
    """A judge whose features are a picture's six pixels, so that a test need not wait for Inception and its 2048."""

    def judge(self, images: Tensor) -> Judgement:
        flat = images.float().flatten(1)
        return Judgement(flat, flat[:, :SPATIAL], flat)


@pytest.fixture(autouse=True)
def small_features(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"mu": (FEATURES,), "sigma": (FEATURES, FEATURES), "mu_s": (SPATIAL,), "sigma_s": (SPATIAL, SPATIAL)}
    monkeypatch.setattr(reference_files, "_SHAPES", shapes)


def pixels(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 1, 2, 3), np.uint8)


def statistics(images: np.ndarray) -> dict[str, np.ndarray]:
    """As ADM's evaluation computes them."""
    judged = Pixels().judge(torch.from_numpy(images).permute(0, 3, 1, 2))
    return {
        name + suffix: of(values.numpy().astype(np.float64))
        for values, suffix in ((judged.features, ""), (judged.spatial, "_s"))
        for name, of in (("mu", lambda v: v.mean(0)), ("sigma", lambda v: np.cov(v, rowvar=False)))
    }


def test_statistics_without_pictures_allow_the_frechet_distances_and_the_score(tmp_path: Path) -> None:
    real, drawn = pixels(50, 0), Pixels().judge(torch.from_numpy(pixels(40, 1)).permute(0, 3, 1, 2))
    np.savez(tmp_path / "stats.npz", **statistics(real))
    reference = load_reference(tmp_path / "stats.npz", Pixels())
    found = reference.compare(drawn)
    assert found.keys() == {"frechet_distance", "spatial_frechet_distance", "inception_score"}
    judged = Pixels().judge(torch.from_numpy(real).permute(0, 3, 1, 2))
    assert found["frechet_distance"] == pytest.approx(frechet_distance(drawn.features, judged.features), rel=1e-9)
    assert found["spatial_frechet_distance"] == pytest.approx(frechet_distance(drawn.spatial, judged.spatial), rel=1e-9)


def test_adms_file_has_statistics_of_more_pictures_than_it_holds(tmp_path: Path) -> None:
    all_of, some = pixels(60, 0), pixels(60, 0)[:10]
    np.savez(tmp_path / "adm.npz", arr_0=some, **statistics(all_of))
    np.savez(tmp_path / "some.npz", arr_0=some)
    adm, pictures = (load_reference(tmp_path / name, Pixels()) for name in ("adm.npz", "some.npz"))
    whole = reference_of(Pixels().judge(torch.from_numpy(all_of).permute(0, 3, 1, 2)))
    assert gaussian_distance(adm.gaussian, whole.gaussian) == pytest.approx(0, abs=1e-6)
    assert gaussian_distance(pictures.gaussian, whole.gaussian) > 1
    assert adm.features is not None and torch.equal(adm.features, pictures.features) and len(adm.features) == 10
    found = adm.compare(Pixels().judge(torch.from_numpy(pixels(30, 1)).permute(0, 3, 1, 2)))
    names = {"frechet_distance", "spatial_frechet_distance", "kernel_distance", "precision", "recall", "inception_score"}
    assert found.keys() == names


def test_statistics_of_the_pooled_features_alone_are_enough(tmp_path: Path) -> None:
    np.savez(tmp_path / "fid.npz", **{name: value for name, value in statistics(pixels(50, 0)).items() if name in ("mu", "sigma")})
    reference = load_reference(tmp_path / "fid.npz", Pixels())
    assert reference.spatial is None and reference.features is None


def test_statistics_of_another_network_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", mu=np.zeros(64), sigma=np.eye(64))
    with pytest.raises(ValueError, match=r"mu of .*other\.npz has the shape \(64,\); finite numbers of \(6,\) are needed"):
        load_reference(tmp_path / "other.npz", Pixels())
    np.savez(tmp_path / "pickled.npz", mu=np.array([{}], object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        load_reference(tmp_path / "pickled.npz", Pixels())
    np.savez(tmp_path / "neither.npz", labels=np.zeros(3))
    with pytest.raises(ValueError, match="holds no array arr_0"):
        load_reference(tmp_path / "neither.npz", Pixels())
