"""What pictures are compared with: statistics and features of real ones. From files: training/reference_files.py."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor
from tqdm import tqdm

from training.inception_score import inception_score
from training.judgement import Judge, Judgement, joined
from training.kernel_distance import kernel_distance
from training.metrics import Gaussian, fit_gaussian, gaussian_distance
from training.neighbours import precision_recall


@dataclass(frozen=True)
class Reference:
    """Real pictures as the measures need them. ADM's files hold Gaussians of the whole training set and 10,000 of its pictures."""

    gaussian: Gaussian
    spatial: Gaussian | None
    features: Tensor | None  # (M, F) of single pictures

    def compare(self, pictures: Judgement) -> dict[str, float]:
        """Every measure that this reference allows, by name."""
        found = {"frechet_distance": gaussian_distance(fit_gaussian(pictures.features), self.gaussian)}
        if self.spatial:
            found["spatial_frechet_distance"] = gaussian_distance(fit_gaussian(pictures.spatial), self.spatial)
        if self.features is not None:
            found["kernel_distance"] = kernel_distance(self.features, pictures.features)
            found["precision"], found["recall"] = precision_recall(self.features, pictures.features)
        return found | {"inception_score": inception_score(pictures.logits)}


def reference_of(judged: Judgement) -> Reference:
    return Reference(fit_gaussian(judged.features), fit_gaussian(judged.spatial), judged.features)


def judge_all(judge: Judge, batches: Iterable[Tensor], title: str, pictures: int) -> Judgement:
    """Judge batches (B, C, H, W) uint8 of so many pictures together."""
    parts = []
    with tqdm(total=pictures, desc=title, unit="picture", dynamic_ncols=True) as bar:
        for batch in batches:
            parts.append(judge.judge(batch))
            bar.update(len(batch))
    return joined(parts)
