"""Recipes: one TOML file, refused early and precisely."""

from pathlib import Path

import pytest

from training.config import RECIPES, OptimiserConfig, load_recipe

BUNDLED = sorted(p.stem for p in RECIPES.glob("*.toml"))


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
        ("steps = 3200", "steps = 'many'", r"\[vae\.optimiser\]"),
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


def test_an_optimiser_needs_at_least_one_step() -> None:
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        OptimiserConfig(steps=0, batch_size=1, learning_rate=1.0, final_learning_rate=0.0, warmup_steps=0)
