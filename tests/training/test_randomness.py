"""Every draw belongs to a sample's number."""

import pytest
import torch

from training.randomness import Draw, normal, sample_numbers, uniform


def test_a_sample_has_the_same_draws_in_any_batch() -> None:
    whole = sample_numbers(5, 8, slice(0, 8))
    assert whole.tolist() == list(range(40, 48))
    parts = [sample_numbers(5, 8, slice(0, 4)), sample_numbers(5, 8, slice(4, 7)), sample_numbers(5, 8, slice(7, 8))]
    for draw in Draw:
        assert torch.equal(torch.cat([uniform(part, draw) for part in parts]), uniform(whole, draw))
        assert torch.equal(torch.cat([normal(part, draw, (2, 3)) for part in parts]), normal(whole, draw, (2, 3)))


def test_samples_and_what_is_drawn_for_them_have_nothing_in_common() -> None:
    numbers = sample_numbers(0, 4000, slice(None))
    draws = torch.stack([uniform(numbers, draw) for draw in Draw])
    assert len(set(draws.flatten().tolist())) == draws.numel()
    assert float((torch.corrcoef(draws) - torch.eye(len(Draw), dtype=torch.float64)).abs().max()) < 0.06  # 4 of its deviations


def test_draws_are_uniform_and_normal() -> None:
    numbers = sample_numbers(3, 50_000, slice(None))
    u, z = uniform(numbers, Draw.TIME), normal(numbers, Draw.NOISE, (4,))
    assert float(u.min()) > 0 and float(u.max()) < 1
    at = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    assert torch.quantile(u, at).tolist() == pytest.approx(at.tolist(), abs=0.01)
    assert float(z.mean()) == pytest.approx(0, abs=0.01) and float(z.std()) == pytest.approx(1, abs=0.01)
    assert z.dtype == torch.float32 and z.shape == (50_000, 4)


def test_numbers_of_a_long_run_do_not_repeat_their_draws() -> None:
    """Batch 4096 for ten million steps is beyond 32 bits."""
    early, late = sample_numbers(0, 4096, slice(None)), sample_numbers(2**20, 4096, slice(None))
    assert int(late[0]) == 2**32 and not bool((uniform(early, Draw.NOISE) == uniform(late, Draw.NOISE)).any())
