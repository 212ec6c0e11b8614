"""Inception beside torch-fidelity's on the same random weights, and what is said of a file that does not hold the real ones."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.training.random_inception import random_weights
from training import inception_weights
from training.inception import Inception, resize
from training.inception_weights import load_inception, shapes

GOLDEN = Path(__file__).parents[1] / "golden" / "inception-random.safetensors"
CPU = torch.device("cpu")


def test_names_and_shapes_of_the_weights_are_torch_fidelitys() -> None:
    with safe_open(GOLDEN, "pt") as file:
        theirs = {name: tuple(shape) for name, shape in json.loads(file.metadata()["shapes"]).items()}
    assert shapes(Inception().state_dict()) == theirs and len(theirs) == 472


def test_features_logits_and_spatial_features_are_torch_fidelitys() -> None:
    network, golden = Inception().eval(), load_file(GOLDEN)
    network.load_state_dict(random_weights(), strict=False)
    found = network.judge(golden["images"])
    assert golden["features"].std(0).mean() > 0.05 and golden["spatial"].std(0).mean() > 0.05, "pictures that are told apart"
    for ours, theirs in ((found.features, "features"), (found.spatial, "spatial"), (found.logits, "logits_unbiased")):
        assert torch.allclose(ours, golden[theirs], atol=1e-4, rtol=0), theirs


def test_pictures_are_resized_as_in_tensorflow_1() -> None:
    row = torch.tensor([0.0, 60.0, 120.0]).expand(1, 1, 2, 3)
    assert resize(row, 6)[0, 0, 0].tolist() == [0, 30, 60, 90, 120, 120], "from the left edge on, the last column repeated"
    assert torch.equal(resize(row[..., :2], 2), row[..., :2])
    shrunk = resize(torch.arange(8.0).expand(1, 1, 8, 8), 4)
    assert shrunk[0, 0, 0].tolist() == [0, 2, 4, 6], "no averaging"


def test_a_grey_picture_is_one_with_three_equal_channels() -> None:
    network = Inception().eval()
    network.load_state_dict(random_weights(), strict=False)
    grey = load_file(GOLDEN)["images"][:1, :1]
    assert torch.allclose(network.judge(grey).features, network(grey.expand(-1, 3, -1, -1))[0], atol=1e-5)
    with pytest.raises(ValueError, match=r"uint8 pictures, got torch\.float32"):
        network.judge(grey.float())


def test_a_file_with_the_right_sha256_and_names_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, random_weights(), monkeypatch)
    network = load_inception(path, CPU)
    assert torch.equal(network.fc.weight, random_weights()["fc.weight"]) and not network.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Mixed_7a.branch3x3_1.conv.weight": None}, r"Mixed_7a\.branch3x3_1\.conv\.weight is missing, and \(192, 768, 1, 1\) in"),
        ({"fc.bias": torch.zeros(1000)}, r"fc\.bias is \(1000,\), and \(1008,\) in FID's Inception"),
        ({"AuxLogits.fc.bias": torch.zeros(3)}, r"AuxLogits\.fc\.bias is \(3,\), and nothing in FID's Inception"),
        ({"fc.bias": "text"}, "holds no table of weights"),
    ],
)
def test_weights_of_another_network_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], message: str
) -> None:
    weights = {name: value for name, value in {**random_weights(), **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        load_inception(written(tmp_path, weights, monkeypatch), CPU)


def test_another_file_is_refused_with_the_address_of_the_right_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"no file .*nowhere\.pth: .*weights-inception-2015-12-05-6726825d\.pth.*github\.com/toshas"):
        load_inception(tmp_path / "nowhere.pth", CPU)
    other = tmp_path / "other.pth"
    other.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"begins with [0-9a-f]{8} in place of 6726825d, so no number would be a FID; .*github"):
        load_inception(other, CPU)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"other\.pth cannot be read as weights"):
        patch.setattr(inception_weights, "SHA256_PREFIX", hashlib.sha256(other.read_bytes()).hexdigest()[:8])
        load_inception(other, CPU)


class Command:
    """A pickle that would run when it is loaded."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("ran",)


def test_a_file_that_runs_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_inception(written(tmp_path, {"fc.bias": Command()}, monkeypatch), CPU)
    assert "ran" not in capsys.readouterr().out


def written(folder: Path, weights: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that passes for the real one: its sha256 is made the one that is looked for."""
    path = folder / "weights.pth"
    torch.save(weights, path)
    monkeypatch.setattr(inception_weights, "SHA256_PREFIX", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    return path
