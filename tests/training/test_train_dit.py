"""Stage two end to end on tiny data: latents are cached, a run resumes exactly, and what comes out is a checkpoint that samples."""

import functools
import json
import os
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model import checkpoint as checkpoints
from model.checkpoint import Checkpoint
from model.config import BLOCKS, DiTConfig, ObjectiveConfig
from model.dit import DiT
from model.flow import RectifiedFlow
from model.sampling import sample
from training import train_dit as stage_two
from training.config import Execution, Recipe
from training.data import load_dataset
from training.latents import cached_latents
from training.stopping import Interrupted
from training.train_dit import build_process, dit_losses, train_dit
from training.train_vae import train_vae

RecipeMaker = Callable[..., Recipe]


@pytest.fixture
def idx_folder(make_idx_folder: Callable[..., Path], tmp_path: Path) -> Path:
    return make_idx_folder(tmp_path / "data")


@pytest.fixture
def trained_vae(tiny_recipe: RecipeMaker, idx_folder: Path, tmp_path: Path) -> Path:
    return train_vae(tiny_recipe(), idx_folder, tmp_path / "vae")


@pytest.mark.parametrize(
    ("objective", "changes", "said"),
    [
        ("flow", {}, "with adaLN-Zero blocks on"),
        ("diffusion", {}, "trained as Gaussian diffusion with the paper's loss."),
        ("diffusion", {"prediction": "v", "block": "in-context", "rope": True, "swiglu": True}, "in-context blocks (SwiGLU, 2-D RoPE) on"),
        ("diffusion", {"learn_sigma": False, "min_snr_gamma": 5.0, "block": "adaln", "rms_norm": True}, "adaLN blocks (RMSNorm) on"),
        ("flow", {"flow_time": "uniform", "block": "cross-attention", "qk_norm": True}, "trained as rectified flow with uniform times."),
    ],
    ids=["flow", "hybrid", "v in-context", "min-SNR adaLN", "uniform cross-attention"],
)
def test_a_run_ends_in_a_checkpoint_that_loads_and_samples(
    tiny_recipe: RecipeMaker, idx_folder: Path, trained_vae: Path, tmp_path: Path, objective: str, changes: dict[str, Any], said: str
) -> None:
    recipe = tiny_recipe(objective)
    recipe = replace(recipe, dit=replace(recipe.dit, **changes))
    sampler = recipe.defaults.sampler
    folder = train_dit(recipe, idx_folder, trained_vae, tmp_path / "dit")
    loaded = checkpoints.load(folder)
    assert loaded.config.objective == recipe.dit.objective_config()
    stored = asdict(loaded.config.architecture) | asdict(loaded.config.objective)
    assert {name: stored[name] for name in changes} == changes
    assert said in (folder / "README.md").read_text()
    assert loaded.config.provenance["dit"]["steps"] == recipe.dit.optimiser.steps
    assert loaded.config.provenance["vae"]["steps"] == recipe.vae.optimiser.steps
    images = sample(loaded, [0, None], steps=3, guidance_scale=2.0, sampler=sampler, seeds=[1, 2])
    assert images.shape == (2, recipe.data.image_size, recipe.data.image_size, recipe.data.image_channels)
    assert (tmp_path / "dit" / f"samples-{recipe.dit.optimiser.steps:06d}.png").is_file()


def test_an_interrupted_run_resumes_to_the_same_weights(
    tiny_recipe: RecipeMaker, idx_folder: Path, trained_vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe()
    straight = checkpoints.load(train_dit(recipe, idx_folder, trained_vae, tmp_path / "straight"))
    calls = 0
    real = stage_two.dit_losses

    def interrupting(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(stage_two, "dit_losses", interrupting)
    with pytest.raises(Interrupted, match="go on with --resume"):
        train_dit(recipe, idx_folder, trained_vae, tmp_path / "stopped")
    resumed = checkpoints.load(train_dit(recipe, idx_folder, trained_vae, tmp_path / "stopped", resume=True))
    assert resumed.hash == straight.hash  # the same weights to the last bit


def test_a_run_traced_for_the_compiler_has_the_losses_of_one_that_is_not(
    tiny_recipe: RecipeMaker, idx_folder: Path, trained_vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of torch.compile but its code generator, which takes a minute here and is tried in test_compiling.py."""
    recipe = tiny_recipe(steps=10, precision="float32")
    recipe = replace(recipe, dit=replace(recipe.dit, depth=1))
    train_dit(recipe, idx_folder, trained_vae, tmp_path / "eager")
    execution = Execution(micro_batch_size=4, compile=True, activation_checkpointing=True, tensorboard=False)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    train_dit(recipe, idx_folder, trained_vae, tmp_path / "compiled", execution=execution)
    torch._dynamo.reset()
    assert logged(tmp_path / "compiled") == pytest.approx(logged(tmp_path / "eager"), rel=1e-5)


def logged(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_latents_of_another_vae_end_a_run_before_it_begins_unless_they_are_made_anew(
    tiny_recipe: RecipeMaker, build_checkpoint: Callable[..., Checkpoint], idx_folder: Path, trained_vae: Path, tmp_path: Path
) -> None:
    recipe, other = tiny_recipe(), build_checkpoint().vae
    assert other is not None
    cached_latents(other, load_dataset(idx_folder, recipe.data).train, tmp_path / "dit", flips=True)
    with pytest.raises(ValueError, match=r"latents of another VAE .*--new-latents encodes them anew"):
        train_dit(recipe, idx_folder, trained_vae, tmp_path / "dit")
    assert train_dit(recipe, idx_folder, trained_vae, tmp_path / "dit", new_latents=True).is_dir()
    assert (tmp_path / "dit" / "data.png").is_file()


@pytest.mark.parametrize(
    "objective",
    [ObjectiveConfig("flow"), ObjectiveConfig("flow", flow_time="uniform"), ObjectiveConfig("diffusion", prediction="v")],
    ids=["logit-normal", "uniform", "v"],
)
def test_a_network_that_knows_the_clean_latents_has_no_loss(objective: ObjectiveConfig) -> None:
    x0 = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    process = build_process(objective, torch.device("cpu"))

    def exact(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if isinstance(process, RectifiedFlow):
            return (x - x0) / t.view(-1, 1, 1, 1)  # x_t = (1−t)·x₀ + t·ε, so ε − x₀ = (x_t − x₀)/t
        alpha, sigma = (values[t].float().view(-1, 1, 1, 1) for values in (process.alpha, process.sigma))
        return (alpha * x - x0) / sigma  # √ᾱ·x_t − √(1−ᾱ)·v = x₀

    generator = torch.Generator().manual_seed(1)
    t, noise = process.times(torch.rand(8, dtype=torch.float64, generator=generator)), torch.randn(x0.shape, generator=generator)
    losses = dit_losses(exact, process, x0, torch.zeros(8, dtype=torch.int64), t, noise)
    assert losses["loss"] < 1e-9


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("parts", [(), ("qk_norm", "swiglu", "rope"), ("qk_norm", "rms_norm")], ids=["paper", "q-swiglu-rope", "q-rms"])
def test_training_in_bf16_reaches_every_parameter(tiny_dit_config: Callable[..., DiTConfig], block: str, parts: tuple[str, ...]) -> None:
    """Gates and the last linear start at zero and hold back what lies before them for a step or two."""
    torch.manual_seed(0)
    dit = DiT(tiny_dit_config("diffusion", block=block, **dict.fromkeys(parts, True)))
    process = build_process(ObjectiveConfig("diffusion", prediction="v"), torch.device("cpu"))
    x0, y = torch.randn(8, 4, 8, 8), torch.arange(8) % (dit.config.num_classes + 1)
    optimiser = torch.optim.AdamW(dit.parameters(), lr=1e-3, weight_decay=0.0)
    before = {name: value.detach().clone() for name, value in dit.named_parameters()}
    for step in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            t = process.times(torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(step)))
            loss = dit_losses(dit, process, x0, y, t, torch.randn(x0.shape, generator=torch.Generator().manual_seed(step)))["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        assert loss.isfinite()
    still = [name for name, value in dit.named_parameters() if torch.equal(value, before[name])]
    still = [name for name in still if not name.endswith("k_norm.bias")]  # a softmax does not see what every key has in common
    assert not still and any("q_norm" in name for name in before) == ("qk_norm" in parts)


def test_a_recipe_that_cannot_work_is_refused_before_the_first_step(
    tiny_recipe: RecipeMaker, idx_folder: Path, trained_vae: Path, tmp_path: Path
) -> None:
    recipe, plain = tiny_recipe(), tiny_recipe("diffusion")
    plain = replace(plain, defaults=replace(plain.defaults, sampler="ddpm"))  # which needs the covariance
    for wrong, message in (
        (replace(recipe, defaults=replace(recipe.defaults, sampler="dpm")), "dpm"),
        (replace(plain, dit=replace(plain.dit, learn_sigma=False)), "'ddpm' does not fit"),
        (replace(recipe, defaults=replace(recipe.defaults, dtype="int8")), "int8"),
    ):
        with pytest.raises(ValueError, match=message):
            train_dit(wrong, idx_folder, trained_vae, tmp_path / "never")
        assert not (tmp_path / "never").exists()
    with pytest.raises(ValueError, match="dit train vae"):
        train_dit(recipe, idx_folder, tmp_path / "no-vae", tmp_path / "never")
