"""The judge of `dit evaluate`: a small convnet trained once on the training split, then kept under a key of the data's content.

It takes uint8 pictures only, so real images, reconstructions and generated pictures reach it in one form. Shapes: B pictures · F features.
"""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from training.data import Dataset, Split, batch_indices, to_float
from training.judgement import Judgement, flattened, joined
from training.randomness import step_generator

CLASSIFIER_WEIGHTS, CLASSIFIER_RECORD = "classifier.safetensors", "classifier.json"
_VERSION = 1  # raised whenever the network or its training changes, so that an older cache is not taken for this one
_SEED = 0


@dataclass(frozen=True)
class ClassifierConfig:
    """Fixed steps, so that the cost is the same for any data: minutes on two CPU cores."""

    widths: tuple[int, ...] = (32, 64, 128)
    features: int = 64
    steps: int = 1400  # six epochs of Fashion-MNIST
    batch_size: int = 256
    learning_rate: float = 5e-3
    weight_decay: float = 0.05

    def __post_init__(self) -> None:
        if len(self.widths) < 2:
            raise ValueError(f"a classifier has at least 2 levels, got the widths {self.widths}")


def _convolution(channels_in: int, channels_out: int, *, stride: int = 1, halve: bool = False) -> nn.Sequential:
    convolution = nn.Conv2d(channels_in, channels_out, kernel_size=stride + 2, stride=stride, padding=1, bias=False)
    # Halving before the norm makes the norm four times cheaper. Rounding up keeps a 1×1 map one, so that no image is too small.
    halving = [nn.MaxPool2d(2, ceil_mode=True)] if halve else []
    return nn.Sequential(convolution, *halving, nn.BatchNorm2d(channels_out), nn.ReLU())


class ConvNet(nn.Module):
    """A convolution, then two to a level, each level halving the size; the mean over positions, F features, one linear to the classes."""

    def __init__(self, config: ClassifierConfig, image_channels: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        channels = config.widths[0]
        stride = max(1, image_size // 32)  # larger images enter at about 32×32, for the same cost
        levels = [_convolution(image_channels, channels, stride=stride, halve=True)]
        for width in config.widths[1:]:
            levels += [_convolution(channels, width), _convolution(width, width, halve=True)]
            channels = width
        self.levels = nn.Sequential(*levels, _convolution(channels, channels))
        self.to_features = nn.Linear(channels, config.features)
        self.head = nn.Linear(config.features, num_classes)

    def judged(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, C, H, W) in [−1, 1] → features (B, F) before the last linear, spatial ones before the last halving, logits."""
        middle = self.levels[:-3](images)
        features = F.relu(self.to_features(self.levels[-3:](middle).mean((2, 3))))
        return features, flattened(middle), self.head(features)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [−1, 1] → logits (B, classes)."""
        return self.judged(images)[2]


@dataclass(frozen=True)
class Classifier:
    """A trained judge, and what is recorded of it."""

    network: ConvNet
    key: str
    test_accuracy: float
    from_cache: bool

    @torch.inference_mode()
    def judge(self, images: Tensor, batch_size: int = 500) -> Judgement:
        """Pictures (B, C, H, W) uint8, any number of them. ValueError for another dtype, which would be another pixel form."""
        if images.dtype != torch.uint8:
            raise ValueError(f"the classifier takes uint8 pictures, got {images.dtype}")
        device = self.network.head.weight.device
        found = [self.network.judged(to_float(part.to(device))) for part in images.split(batch_size)]
        return joined(Judgement(*(value.cpu() for value in part)) for part in found)

    def judge_split(self, split: Split, index: Tensor | None = None) -> Judgement:
        """All pictures of a split in turn, or those of rows `index`."""
        return joined(self.judge(images) for images in split.batches(500, index))


def classifier_key(dataset: Dataset, config: ClassifierConfig) -> str:
    """16 hex digits over the pixels and labels of both splits, the number of classes, and the classifier's own configuration."""
    facts: dict[str, Any] = {"version": _VERSION, "seed": _SEED, "config": asdict(config), "classes": len(dataset.class_names)}
    digest = hashlib.sha256()
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        facts[name] = list(split.images.shape)
        split.hash_into(digest)
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to a sixteenth of its size along both axes, its border repeated. (B, C, H, W) → (B, C, H, W)."""
    count, _, height, width = images.shape
    reach = height // 16
    windows = F.pad(images, (reach,) * 4, mode="replicate").unfold(2, height, 1).unfold(3, width, 1)  # a view (B, C, 2r+1, 2r+1, H, W)
    down, right = torch.randint(2 * reach + 1, (2, count), generator=generator)
    return windows[torch.arange(count), :, down, right]


def _train(network: ConvNet, split: Split, config: ClassifierConfig, device: torch.device) -> None:
    """Cross-entropy with AdamW over one cycle of the learning rate, in place; every random number follows from the seed and the step."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.learning_rate, total_steps=config.steps, pct_start=0.2)
    network.train()
    for step in tqdm(range(config.steps), desc="classifier", unit="step", dynamic_ncols=True):
        index = batch_indices(len(split), config.batch_size, step, _SEED)
        images = _shifted(to_float(split.read(index)), step_generator(_SEED, step))
        with torch.autocast(device.type, torch.bfloat16):
            logits = network(images.to(device).contiguous(memory_format=torch.channels_last))
        F.cross_entropy(logits.float(), split.labels[index].to(device)).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        cycle.step()
    network.eval().requires_grad_(False)


def _keep(folder: Path, network: ConvNet, record: dict[str, Any]) -> None:
    """Write both files under a temporary name and rename; if another process was first, its folder stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
    try:
        save_file({name: value.to("cpu").contiguous() for name, value in network.state_dict().items()}, staged / CLASSIFIER_WEIGHTS)
        (staged / CLASSIFIER_RECORD).write_text(json.dumps(record, indent=2) + "\n")
        staged.chmod(0o755)  # mkdtemp and safetensors write for the owner alone
        (staged / CLASSIFIER_WEIGHTS).chmod(0o644)
        if not folder.exists():
            os.rename(staged, folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def get_classifier(dataset: Dataset, cache: Path, device: torch.device, config: ClassifierConfig | None = None) -> Classifier:
    """The cached classifier of this data, or a new one that is trained and put in `cache/<key>/`."""
    config = config or ClassifierConfig()
    key = classifier_key(dataset, config)
    folder = cache / key
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay what they were
        torch.manual_seed(_SEED)
        channels, size, _ = dataset.train.image_shape
        network = ConvNet(config, channels, size, len(dataset.class_names))
    network = network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    from_cache = (folder / CLASSIFIER_RECORD).is_file()
    if from_cache:
        network.load_state_dict(load_file(folder / CLASSIFIER_WEIGHTS, device=str(device)))
        network.eval().requires_grad_(False)
        return Classifier(network, key, json.loads((folder / CLASSIFIER_RECORD).read_text())["test_accuracy"], from_cache)
    _train(network, dataset.train, config, device)
    accuracy = _accuracy(Classifier(network, key, 0.0, from_cache), dataset.test)
    _keep(folder, network, {"test_accuracy": accuracy, "data": dataset.described, "version": _VERSION, "config": asdict(config)})
    return Classifier(network, key, accuracy, from_cache)


def _accuracy(classifier: Classifier, split: Split) -> float:
    return float((classifier.judge_split(split).predicted == split.labels).double().mean())
