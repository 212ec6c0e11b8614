"""Inception's weights, from a file that the user brings: they are not ours to give, and a number is a FID with these alone."""

import hashlib
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.inception import Inception

FILE = "weights-inception-2015-12-05-6726825d.pth"
SHA256_PREFIX = "6726825d"
RELEASE = "https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0"
_BENT = (RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError)  # what torch.load raises for bent bytes
_SOURCE = f"{FILE}, from {RELEASE}"


def load_inception(path: Path, device: torch.device) -> Inception:
    """The network with torch-fidelity's weights, which are read as weights alone. ValueError says what is wrong with another file."""
    if not path.is_file():
        raise ValueError(f"no file {path}: Inception's weights are {_SOURCE}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    if not digest.hexdigest().startswith(SHA256_PREFIX):
        raise ValueError(
            f"the sha256 of {path} begins with {digest.hexdigest()[:8]} in place of {SHA256_PREFIX}, so no number would be a FID; "
            f"the weights are {_SOURCE}"
        )
    network = Inception()
    network.load_state_dict(_checked(path, _read(path), network), strict=False)  # what is not strict is checked: counters of batches
    return network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, *_BENT) as error:
        raise ValueError(f"{path} cannot be read as weights: {(str(error).strip() or repr(error)).splitlines()[0]}") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} holds no table of weights")
    return found


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name → shape of what decides a feature: the norms' counters of batches do not."""
    return {name: tuple(value.shape) for name, value in state.items() if not name.endswith("num_batches_tracked")}


def _checked(path: Path, found: dict[str, Any], network: Inception) -> dict[str, Any]:
    expected, there = shapes(network.state_dict()), shapes(found)
    for name in sorted(expected.keys() | there.keys()):
        if expected.get(name) != there.get(name):
            raise ValueError(f"{path}: {name} is {there.get(name, 'missing')}, and {expected.get(name, 'nothing')} in FID's Inception")
    return found
