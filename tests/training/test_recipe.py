"""Recipes: one TOML file, refused early and precisely."""

import re
from pathlib import Path

import pytest

from model.config import DiTConfig, ObjectiveConfig
from training.config import RECIPES, OptimiserConfig, load_recipe

BUNDLED = sorted(p.stem for p in RECIPES.glob("*.toml"))


def with_dit(folder: Path, changes: dict[str, str]) -> Path:
    """The bundled recipe with other values, as TOML spells them, for fields of [dit]."""
    head, dit, tail = re.split(r"^(\[dit\]\n.*?)(?=^\[dit\.)", (RECIPES / "fashion-mnist.toml").read_text(), flags=re.DOTALL | re.MULTILINE)
    for name, value in changes.items():
        dit, found = re.subn(rf"^{name} = .*$", f"{name} = {value}", dit, flags=re.MULTILINE)
        dit += "" if found else f"{name} = {value}\n"
    path = folder / "recipe.toml"
    path.write_text(head + dit + tail)
    return path


@pytest.mark.parametrize("name", BUNDLED)
def test_every_bundled_recipe_loads(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name and recipe == load_recipe(str(RECIPES / f"{name}.toml"))


def test_the_fashion_mnist_recipe_says_what_its_file_says() -> None:
    recipe = load_recipe("fashion-mnist")
    assert recipe.data.labels[7] == "Sneaker" and len(recipe.data.labels) == 10 and not recipe.data.horizontal_flip
    assert (recipe.data.image_size, recipe.data.image_channels, recipe.vae.block_out_channels) == (32, 1, (16, 32, 64))
    assert recipe.vae.optimiser != recipe.dit.optimiser and recipe.vae.optimiser.betas == (0.9, 0.99)


def test_an_unknown_recipe_is_answered_with_the_bundled_ones() -> None:
    with pytest.raises(ValueError, match=r"no recipe 'imagenet'.*fashion-mnist"):
        load_recipe("imagenet")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("image_size = 32", "image_sise = 32", r"\[data\] has no field 'image_sise'; it has: image_size"),
        ("image_channels = 1\n", "", r"\[data\].*image_channels"),
        ("[defaults]", "[default]", "must have the sections data, defaults, dit, vae"),
        ("patch_size = 2\n", "", r"\[dit\].*patch_size"),
        ("label_dropout = 0.1", "label_dropout = 1.0", r"\[dit\] label_dropout must be .* got 1.0"),
        ("batch_size = 256", "batch_size = 0", r"\[dit\.optimiser\] batch_size must be at least 1, got 0"),
        ("ema_decay = 0.998", "ema_decay = 1.0", r"\[vae\.optimiser\] ema_decay must be .* got 1.0"),
        ("steps = 3200", "steps = 'many'", r"\[vae\.optimiser\] steps must be a whole number, got 'many'"),
        ("warmup_steps = 100", "warmup_steps = true", r"\[vae\.optimiser\] warmup_steps must be a whole number, got True"),
        ("kl_weight = 1e-3", "kl_weight = nan", r"\[vae\] kl_weight must be a finite number, got nan"),
        ("steps = 3200", "steps = 3200\ngradient_clip = 0.0", r"\[vae\.optimiser\] gradient_clip .* got 0.0"),
        ("[vae]", "vae = 3\n[vaee]", "recipe.toml"),
        ("[data]", "[data", "recipe.toml"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_is_trained(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = (RECIPES / "fashion-mnist.toml").read_text()
    assert old in text
    path = tmp_path / "recipe.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": "'adaln-one'"}, r"block must be one of adaln-zero, adaln, cross-attention, in-context, got 'adaln-one'"),
        ({"qk_norm": "'no'"}, r"qk_norm must be true or false, got 'no'"),
        ({"rope": "1"}, r"rope must be true or false, got 1"),
        ({"rope": "true", "hidden_size": "252", "num_heads": "6"}, r"rope .* 42 a head"),
        ({"num_heads": "7"}, r"hidden_size 256 is not a multiple of num_heads 7"),
        ({"patch_size": "0"}, r"patch_size must be at least 1, got 0"),
        ({"objective": "'gan'"}, r"objective must be 'diffusion' or 'flow', got 'gan'"),
        ({"learn_sigma": "true"}, r"learn_sigma belongs to the objective 'diffusion'"),
        ({"prediction": "'v'"}, r"prediction belongs to the objective 'diffusion'"),
        ({"min_snr_gamma": "5.0"}, r"min_snr_gamma belongs to the objective 'diffusion'"),
        ({"flow_time": "'cosine'"}, r"flow_time must be 'logit-normal' or 'uniform', got 'cosine'"),
        ({"objective": "'diffusion'", "prediction": "'x0'"}, r"prediction must be 'noise' or 'v', got 'x0'"),
        ({"objective": "'diffusion'", "min_snr_gamma": "-1"}, r"min_snr_gamma must be positive, or 0 for none, got -1"),
        ({"objective": "'diffusion'", "min_snr_gamma": "inf"}, r"min_snr_gamma must be a finite number, got inf"),
        ({"objective": "'diffusion'", "flow_time": "'uniform'"}, r"flow_time belongs to the objective 'flow'"),
    ],
)
def test_a_wrong_network_or_objective_is_refused_by_its_field(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=rf"recipe\.toml: \[dit\] {message}"):
        load_recipe(str(with_dit(tmp_path, changes)))


def test_a_recipe_names_the_network_and_the_objective(tmp_path: Path) -> None:
    changes = {"block": "'in-context'", "swiglu": "true", "objective": "'diffusion'", "prediction": "'v'", "min_snr_gamma": "5"}
    dit = load_recipe(str(with_dit(tmp_path, changes))).dit
    assert dit.objective_config() == ObjectiveConfig("diffusion", prediction="v", min_snr_gamma=5.0)
    architecture = dit.architecture(input_size=8, in_channels=4, num_classes=10)
    assert (architecture.block, architecture.swiglu, architecture.rope, architecture.learn_sigma) == ("in-context", True, False, False)
    assert architecture.time_factor == 1.0


def test_the_bundled_recipe_is_the_papers_network_and_logit_normal_flow() -> None:
    dit = load_recipe("fashion-mnist").dit
    assert dit.objective_config() == ObjectiveConfig("flow")
    paper = DiTConfig(8, 2, 4, 256, 8, 4, 10, learn_sigma=False, time_factor=1000.0)
    assert dit.architecture(input_size=8, in_channels=4, num_classes=10) == paper


def test_an_optimiser_needs_at_least_one_step() -> None:
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        OptimiserConfig(steps=0, batch_size=1, learning_rate=1.0, final_learning_rate=0.0, warmup_steps=0)
