"""Inception Score, kernel distance, precision and recall against what is known in closed form or can be counted by hand."""

from math import exp, log

import pytest
import torch
from torch import Tensor

from training import neighbours
from training.inception_score import inception_score
from training.kernel_distance import kernel_distance, squared_mmd
from training.neighbours import nearest, precision_recall


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_score_is_one_where_nothing_is_known_and_the_number_of_classes_where_all_is_sure() -> None:
    assert inception_score(torch.zeros(12, 5)) == pytest.approx(1, rel=1e-12)
    sure = 1000 * torch.eye(5).repeat(4, 1)
    assert inception_score(sure) == pytest.approx(5, rel=1e-12)
    assert inception_score(sure[:1].expand(7, -1)) == pytest.approx(1, rel=1e-12), "sure, but always of the same class"


def test_the_score_of_two_classes_is_the_closed_form() -> None:
    p = 0.9  # one half of the pictures leans to each class: KL(p ‖ ½) of every picture
    logits = torch.tensor([[log(p), log(1 - p)], [log(1 - p), log(p)]]).repeat(10, 1)
    assert inception_score(logits) == pytest.approx(exp(log(2) + p * log(p) + (1 - p) * log(1 - p)), rel=1e-6)


def test_the_score_is_the_mean_over_splits_in_the_order_given() -> None:
    sure = 1000 * torch.eye(4)
    assert inception_score(sure, split_size=2) == pytest.approx(2, rel=1e-12)
    assert inception_score(torch.cat([sure, sure[:1]]), split_size=4) == pytest.approx((4 + 1) / 2, rel=1e-12)
    with pytest.raises(ValueError, match="finite logits"):
        inception_score(torch.full((3, 2), torch.nan))
    with pytest.raises(ValueError, match="at least one picture"):
        inception_score(torch.zeros(0, 2))


def test_the_kernel_distance_of_constant_sets_is_the_closed_form() -> None:
    a, b = torch.tensor([[1.0, 2.0]]).expand(5, -1), torch.tensor([[3.0, -1.0]]).expand(8, -1)

    def kernel(dot: float) -> float:
        return (dot / 2 + 1) ** 3

    assert kernel_distance(a, b) == pytest.approx(kernel(5) + kernel(10) - 2 * kernel(1), rel=1e-12)


def test_the_kernel_distance_leaves_the_diagonal_out() -> None:
    a, b = draw(4, 3).double(), draw(3, 3, seed=1).double()

    def mean(x: Tensor, y: Tensor, *, all_pairs: bool) -> float:
        pairs = [(i, j) for i in range(len(x)) for j in range(len(y)) if all_pairs or i != j]
        return sum((float(x[i] @ y[j]) / 3 + 1) ** 3 for i, j in pairs) / len(pairs)

    expected = mean(a, a, all_pairs=False) + mean(b, b, all_pairs=False) - 2 * mean(a, b, all_pairs=True)
    assert float(squared_mmd(a, b)) == pytest.approx(expected, rel=1e-12)


def test_the_kernel_distance_is_unbiased_and_the_same_every_time() -> None:
    few = torch.stack([squared_mmd(draw(40, 4, seed=2 * i), draw(40, 4, seed=2 * i + 1)) for i in range(400)])
    assert abs(float(few.mean())) < 4 * float(few.std()) / 20 and (few < 0).any(), "around nothing, as the sets have one law"
    a, b = draw(500, 4), draw(300, 4, seed=1) + 1
    assert kernel_distance(a, b, subset_size=100) == kernel_distance(a, b, subset_size=100) > 0.5
    whole = float(squared_mmd(a.double(), b.double()))
    assert kernel_distance(a, b, subsets=200, subset_size=100) == pytest.approx(whole, rel=0.05)
    with pytest.raises(ValueError, match="at least 2 pictures of each set, got 1 and 300"):
        kernel_distance(a[:1], b)
    with pytest.raises(ValueError, match="4 and 3 dimensions"):
        kernel_distance(a, b[:, :3])


def test_precision_and_recall_counted_by_hand() -> None:
    real = torch.tensor([[0.0], [1.0], [2.1], [10.0]])  # to the second neighbour: 2.1, 1.1, 2.1, 9
    generated = torch.tensor([[0.5], [3.2], [4.3], [40.0], [-2.0], [-2.5]])  # 2.5 at the edge; 2.7, 3.8, 36.8, 2.5, 3
    # Within 9 of 10 lie 1 … 19: 3.2 and 4.3. 0.5 is near 0, -2 too; -2.5 and 40 are near none.
    # 0, 1 and 2.1 are near generated ones; 10 is within 36.8 of 40.
    assert precision_recall(real, generated, k=2) == (4 / 6, 1.0)
    assert precision_recall(real, generated + 1000, k=2) == (0.0, 0.0)
    assert precision_recall(real, real[:3].repeat(2, 1) + 0.01, k=2)[1] == 0.75, "a mode that is missing"


def test_precision_and_recall_of_a_set_and_itself_are_whole() -> None:
    points = draw(200, 16) * 100 + 1e4
    assert precision_recall(points, points) == (1.0, 1.0)
    assert precision_recall(points, points[:50])[0] == 1.0 > precision_recall(points, points[:50])[1]


def test_blocks_do_not_change_precision_and_recall(monkeypatch: pytest.MonkeyPatch) -> None:
    real, generated = draw(150, 8), 1.2 * draw(170, 8, seed=1)
    whole = precision_recall(real, generated)
    monkeypatch.setattr(neighbours, "_BLOCK", 400)  # two rows or three at once
    assert precision_recall(real, generated) == whole and 0 < whole[0] < 1 and 0 < whole[1] < 1
    brute = torch.cdist(real.double(), generated.double())
    reach_real = torch.cdist(real.double(), real.double()).sort(1).values[:, 3]
    reach_generated = torch.cdist(generated.double(), generated.double()).sort(1).values[:, 3]
    assert whole[0] == float((reach_real >= brute.T).any(1).double().mean())
    assert whole[1] == float((brute <= reach_generated).any(1).double().mean())


def test_too_few_pictures_for_precision_and_recall_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 3 pictures of each set, got 10 and 3"):
        precision_recall(draw(10, 2), draw(3, 2))
    with pytest.raises(ValueError, match="2 and 4 dimensions"):
        precision_recall(draw(10, 2), draw(10, 4))


def test_the_nearest_are_found_whatever_the_parts() -> None:
    points, candidates = draw(30, 5), draw(90, 5, seed=1)
    expected = torch.cdist(points, candidates).square().topk(4, dim=1, largest=False)
    for size in (90, 17, 3):  # 3: fewer than are looked for
        distances, indices = nearest(points, candidates.split(size), 4)
        assert torch.equal(indices, expected.indices) and torch.allclose(distances, expected.values, atol=1e-5)
    distances, _ = nearest(points, [candidates[:2]], 4)
    assert distances[:, :2].isfinite().all() and distances[:, 2:].isinf().all()
