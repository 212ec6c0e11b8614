"""Noise is a function of (seed, evaluation, element), and normal."""

import pytest
import torch

from model.noise import normal, philox

LARGEST_SEED = 2**53 - 1
ONES = 0xFFFFFFFF

# Random123's kat_vectors for philox4x32-10: counter, key → words.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def draw(seeds: list[int], evaluations: list[int], shape: tuple[int, ...] = (4, 8, 8)) -> torch.Tensor:
    return normal(torch.tensor(seeds), torch.tensor(evaluations), shape)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_philox_gives_the_known_answers(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    result = philox(tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key))
    assert tuple(int(w) for w in result) == words


def test_noise_is_standard_normal() -> None:
    z = draw(list(range(64)), [0] * 64, (4, 32, 32)).double()  # 262,144 numbers: standard errors 0.002, 0.003, 0.005, 0.01
    assert abs(float(z.mean())) < 0.01
    assert abs(float(z.var()) - 1) < 0.015
    assert abs(float((z**3).mean())) < 0.03
    assert abs(float((z**4).mean()) - 3) < 0.06
    inside = float((z.abs() < 1.959964).double().mean())
    assert abs(inside - 0.95) < 0.003


def test_seeds_evaluations_and_elements_are_uncorrelated() -> None:
    a, b, c = draw([7, 8, 7], [0, 0, 1], (1, 100, 100)).flatten(1).double()
    for x, y in ((a, b), (a, c), (a[:-1], a[1:]), (a[:-2], a[2:])):
        assert abs(float((x * y).mean())) < 0.05  # standard error 0.01


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 3, LARGEST_SEED])
def test_a_seed_gives_the_same_numbers_alone_and_in_any_batch(seed: int) -> None:
    alone = draw([seed], [3])
    among = draw([5, LARGEST_SEED - 1, seed, 9, 9], [0, 1000, 3, 3, 4])
    assert torch.equal(among[2], alone[0])
    assert not torch.equal(among[3], alone[0])


def test_seeds_that_share_their_low_or_high_word_differ() -> None:
    seeds = [1, 2**32 + 1, 2**33 + 1, 2**32, LARGEST_SEED, LARGEST_SEED - 2**32]
    z = draw(seeds, [0] * len(seeds)).flatten(1)
    assert len({tuple(row[:8].tolist()) for row in z}) == len(seeds)


def test_an_element_does_not_depend_on_how_many_follow_it() -> None:
    assert torch.equal(draw([3], [1], (10,)), draw([3], [1], (4, 8, 8)).flatten(1)[:, :10])


@pytest.mark.parametrize("shape", [(1,), (3,), (1, 3, 3), (3, 7, 5), (4, 8, 8)])
def test_any_shape_is_filled(shape: tuple[int, ...]) -> None:
    z = draw([1, 2], [0, 0], shape)
    assert z.shape == (2, *shape) and z.dtype == torch.float32
    assert bool(torch.isfinite(z).all()) and z.unique().numel() == z.numel()


def test_the_first_numbers_stay_what_they_were() -> None:
    """Pinned: a change here changes every picture of every seed. The words of counter 0, key 0 above, through Box–Muller."""
    u = [(w + 0.5) / 2**32 for w in KNOWN_ANSWERS[0][2]]
    radius = [(-2 * torch.log(torch.tensor(x, dtype=torch.float64))).sqrt() for x in (u[0], u[2])]
    angle = [torch.tensor(2 * torch.pi * x, dtype=torch.float64) for x in (u[1], u[3])]
    expected = [radius[0] * angle[0].cos(), radius[0] * angle[0].sin(), radius[1] * angle[1].cos(), radius[1] * angle[1].sin()]
    assert torch.equal(draw([0], [0], (4,))[0], torch.stack(expected).float())
