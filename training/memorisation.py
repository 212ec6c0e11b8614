"""Does a model repeat its training images? Pictures beside the training images nearest to them, pixel by pixel.

How near is too near is read from images that were never trained on: the VAE's reconstructions of the test images, which are as smooth as
the pictures are. Shapes: N pictures · M test images · P pixels of a thumbnail.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from training.data import Split
from training.neighbours import nearest

SIDE = 32  # pixels of a thumbnail at most: copies are alike at any size, and 60,000 images are compared in seconds
NEIGHBOURS = 5  # kept of each picture, to be shown
RARE = 0.01  # of the test images are nearer to a training image than the limit


@dataclass(frozen=True)
class Memorisation:
    distances: Tensor  # (N, 5) root mean square difference in grey levels of the nearest training images
    indices: Tensor  # (N, 5) of the training split
    limit: float  # grey levels

    @property
    def near_copies(self) -> float:
        """Share of pictures that are nearer to a training image than all but 1 % of the test images; 0.01 is what chance gives."""
        return float((self.distances[:, 0] < self.limit).double().mean())


def thumbnails(images: Tensor) -> Tensor:
    """Pictures (B, C, H, W) uint8 → (B, P) uint8, at most 32 pixels a side."""
    height, width = (min(SIDE, length) for length in images.shape[-2:])
    return F.adaptive_avg_pool2d(images.float(), (height, width)).round().to(torch.uint8).flatten(1)


def find_copies(pictures: Tensor, held_out: Tensor, train: Split, device: torch.device) -> Memorisation:
    """Thumbnails (N, P) of pictures and (M, P) of reconstructed test images against the whole training split."""
    points = torch.cat([pictures, held_out]).to(device).float()
    batches = tqdm(train.batches(2000), desc="nearest training images", unit="batch", total=-(-len(train) // 2000), dynamic_ncols=True)
    squares, indices = nearest(points, (thumbnails(images).to(device).float() for images in batches), NEIGHBOURS)
    distances = (squares / points.shape[1]).sqrt().cpu()
    limit = float(distances[len(pictures) :, 0].quantile(RARE))
    return Memorisation(distances[: len(pictures)], indices[: len(pictures)].cpu(), limit)
