"""Rectified flow: the straight path, its velocity and the times it is trained at."""

import pytest
import torch

from model.config import ObjectiveConfig
from model.flow import RectifiedFlow


@pytest.fixture
def flow() -> RectifiedFlow:
    return RectifiedFlow(ObjectiveConfig("flow"))


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5)


def test_a_flow_needs_the_flow_objective() -> None:
    with pytest.raises(ValueError, match="'flow', got 'diffusion'"):
        RectifiedFlow(ObjectiveConfig("diffusion"))


def test_the_path_runs_from_data_to_noise(flow: RectifiedFlow) -> None:
    x0, noise = pair()
    xt = flow.q_sample(x0, torch.tensor([0.0, 1.0, 0.25]), noise)
    assert torch.equal(xt[0], x0[0]) and torch.equal(xt[1], noise[1])
    torch.testing.assert_close(xt[2], 0.75 * x0[2] + 0.25 * noise[2])


def test_the_exact_velocity_has_no_loss(flow: RectifiedFlow) -> None:
    x0, noise = pair()
    t = torch.full((3,), 0.5, requires_grad=True)
    derivative = torch.autograd.functional.jvp(lambda s: flow.q_sample(x0, s, noise), t.detach(), torch.ones(3))[1]
    losses = flow.losses(derivative, x0, flow.q_sample(x0, t.detach(), noise), t, noise)
    assert losses["loss"].shape == (3,) and float(losses["loss"].max()) < 1e-12


def test_the_loss_is_the_mean_squared_error_of_each_row(flow: RectifiedFlow) -> None:
    x0, noise = pair()
    wrong = noise - x0 + torch.tensor([0.0, 1.0, -3.0]).view(3, 1, 1, 1)
    t = torch.tensor([0.1, 0.5, 1.0])
    torch.testing.assert_close(flow.losses(wrong, x0, flow.q_sample(x0, t, noise), t, noise)["loss"], torch.tensor([0.0, 1.0, 9.0]))


def test_times_are_logit_normal() -> None:
    flow = RectifiedFlow(ObjectiveConfig("flow", logit_normal_mean=-0.4, logit_normal_std=1.2))
    t = flow.times(torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).double()
    assert float(t.min()) > 0 and float(t.max()) < 1
    logit = torch.log(t / (1 - t))
    assert float(logit.mean()) == pytest.approx(-0.4, abs=0.02) and float(logit.std()) == pytest.approx(1.2, abs=0.02)
    # E[t] and E[t²] by quadrature over the normal.
    grid = torch.linspace(-10, 10, 20_001, dtype=torch.float64)
    weight = torch.softmax(-(grid**2) / 2, dim=0)
    value = torch.sigmoid(-0.4 + 1.2 * grid)
    assert float(t.mean()) == pytest.approx(float((weight * value).sum()), abs=0.003)
    assert float((t**2).mean()) == pytest.approx(float((weight * value**2).sum()), abs=0.003)
