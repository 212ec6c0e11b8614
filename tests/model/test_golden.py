"""The official DiT code's numbers (tests/golden/README.md), to 1e-4 relative in float32."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.config import DiTConfig, ObjectiveConfig
from model.diffusion import GaussianDiffusion
from model.dit import DiT
from model.samplers import build_table
from model.sampling import guide, sample_latents
from model.spacing import paper

GOLDEN = Path(__file__).parent.parent / "golden"
NULL = 10


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "official-tiny-p2.golden.safetensors")


@pytest.fixture(scope="module")
def official_weights() -> dict[str, Tensor]:
    return torch.load(GOLDEN / "official-tiny-p2.pt", weights_only=True)


@pytest.fixture(scope="module")
def dit(official_weights: dict[str, Tensor]) -> DiT:
    model = DiT(DiTConfig(input_size=8, patch_size=2, in_channels=4, hidden_size=64, depth=2, num_heads=4, num_classes=NULL))
    missing, unexpected = model.load_state_dict(official_weights, strict=False)
    assert not missing and unexpected == ["pos_embed"]  # computed here, stored there
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def diffusion() -> GaussianDiffusion:
    return GaussianDiffusion(ObjectiveConfig("diffusion"))


def assert_agrees(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == torch.float32 and actual.shape == expected.shape
    error = float((actual - expected).norm() / expected.norm())
    assert error < 1e-4, f"relative error {error:.2e}"


def test_position_table_equals_the_stored_one(dit: DiT, official_weights: dict[str, Tensor]) -> None:
    assert_agrees(dit.pos_embed, official_weights["pos_embed"])


def test_forward_agrees(dit: DiT, golden: dict[str, Tensor]) -> None:
    assert_agrees(dit(golden["x"], golden["t"], golden["y"]), golden["forward"])


def test_three_channel_guidance_agrees(dit: DiT, golden: dict[str, Tensor]) -> None:
    x = golden["cfg3.x"][:2]
    conditional, unconditional = dit(torch.cat([x, x]), golden["cfg3.t"], golden["cfg3.y"]).chunk(2)
    expected, expected_null = golden["cfg3.scale4"].chunk(2)
    assert_agrees(guide(conditional, unconditional, 4.0, channels=3), expected)
    assert_agrees(guide(conditional, unconditional, 4.0, channels=3)[:, :3], expected_null[:, :3])


def test_q_sample_agrees(diffusion: GaussianDiffusion, golden: dict[str, Tensor]) -> None:
    assert_agrees(diffusion.q_sample(golden["x"], golden["loss.t"], golden["loss.noise"]), golden["q_sample"])


@pytest.mark.parametrize("name", ["mse", "vb", "loss"])
def test_training_losses_agree(dit: DiT, diffusion: GaussianDiffusion, golden: dict[str, Tensor], name: str) -> None:
    x0, t, noise = golden["x"], golden["loss.t"], golden["loss.noise"]
    xt = diffusion.q_sample(x0, t, noise)
    losses = diffusion.losses(dit(xt, t, torch.arange(4)), x0, xt, t, noise)
    assert_agrees(losses[name], golden[f"loss.{name}"])


def test_every_row_of_the_vb_loss_agrees(dit: DiT, diffusion: GaussianDiffusion, golden: dict[str, Tensor]) -> None:
    """Row by row: t = 0 is 100 times t = 300 and would hide it in a norm."""
    x0, t, noise = golden["x"], golden["loss.t"], golden["loss.noise"]
    xt = diffusion.q_sample(x0, t, noise)
    vb = diffusion.losses(dit(xt, t, torch.arange(4)), x0, xt, t, noise)["vb"]
    torch.testing.assert_close(vb, golden["loss.vb"], rtol=1e-4, atol=0)


def test_reverse_step_agrees(dit: DiT, diffusion: GaussianDiffusion, golden: dict[str, Tensor]) -> None:
    xt, t = golden["x"], golden["loss.t"]
    mean, log_variance, x0 = diffusion.p_mean_variance(dit(xt, t, torch.arange(4)), xt, t)
    assert_agrees(mean, golden["p_mean_variance.mean"])
    assert_agrees(log_variance, golden["p_mean_variance.log_variance"])
    assert_agrees(x0, golden["p_mean_variance.pred_xstart"])


def test_twenty_five_timesteps_agree(golden: dict[str, Tensor]) -> None:
    assert paper(ObjectiveConfig("diffusion"), 25) == golden["ddim25.timesteps"].tolist()


@pytest.mark.parametrize(
    ("key", "guidance"),
    [("ddim25.nocfg", {}), ("ddim25.cfg3_scale4", {"guidance_scale": 4.0, "guidance_channels": 3})],
    ids=["unguided", "three-channel guidance"],
)
def test_ddim_of_25_steps_agrees(dit: DiT, golden: dict[str, Tensor], key: str, guidance: dict[str, float]) -> None:
    table = build_table(ObjectiveConfig("diffusion"), "ddim", 25)
    latents = sample_latents(dit, golden["ddim25.z"], golden["ddim25.y"], NULL, table, seeds=torch.zeros(2, dtype=torch.int64), **guidance)
    assert_agrees(latents, golden[key])
