"""`model.cost` against the paper's figures (FACTS.md §1), and against products counted by hand."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from model.config import BLOCKS, PRESETS, DiTConfig, VAEConfig
from model.cost import Cost, cost, decoder_gmacs, dit_cost, paper_costs, preset_cost, table

# Preset → parameters exactly, GMACs as the paper rounds them.
PAPER = {
    "DiT-S/8": (33_148_160, 0.36),
    "DiT-S/4": (32_945_024, 1.41),
    "DiT-S/2": (32_963_360, 6.06),
    "DiT-B/8": (130_881_536, 1.42),
    "DiT-B/4": (130_475_648, 5.56),
    "DiT-B/2": (130_512_416, 23.01),
    "DiT-L/8": (458_594_816, 5.01),
    "DiT-L/4": (458_053_760, 19.70),
    "DiT-L/2": (458_102_816, 80.71),
    "DiT-XL/8": (675_683_072, 7.39),
    "DiT-XL/4": (675_074_432, 29.05),
    "DiT-XL/2": (675_129_632, 118.64),
}
VARIANTS = {"adaln": (600.7, 118.56), "cross-attention": (598, 137.62), "in-context": (449, 119.37)}  # at XL/2; millions, GMACs


@pytest.fixture(scope="module")
def sixteen() -> list[Cost]:
    return paper_costs()


def near(gmacs: float) -> object:
    return pytest.approx(gmacs, abs=0.03, rel=0.001)


def test_the_sixteen_lines_are_the_presets_the_larger_picture_and_the_other_blocks(sixteen: list[Cost]) -> None:
    lines = [(c.model, c.block, c.image_size) for c in sixteen]
    assert lines[:12] == [(name, "adaln-zero", 256) for name in PAPER]
    assert lines[12:] == [("DiT-XL/2", "adaln-zero", 512), *(("DiT-XL/2", block, 256) for block in VARIANTS)]


def test_the_twelve_presets_have_the_papers_parameters_and_gmacs(sixteen: list[Cost]) -> None:
    assert {c.model: c.parameters for c in sixteen[:12]} == {name: parameters for name, (parameters, _) in PAPER.items()}
    assert {c.model: c.gmacs for c in sixteen[:12]} == {name: near(gmacs) for name, (_, gmacs) in PAPER.items()}


def test_xl_2_at_512_has_the_papers_gmacs(sixteen: list[Cost]) -> None:
    larger, smaller = sixteen[12], sixteen[11]
    assert larger.gmacs == near(524.60)
    assert larger.parameters - smaller.parameters == (1024 - 256) * 1152, "its position table is longer"


def test_the_other_blocks_have_the_papers_parameters_and_gmacs(sixteen: list[Cost]) -> None:
    for line in sixteen[13:]:
        millions, gmacs = VARIANTS[line.block]
        assert line.gmacs == near(gmacs), line.block
        assert round(line.parameters / 1e6, 1 if isinstance(millions, float) else None) == millions, line.block


def test_the_decoder_is_that_of_stable_diffusions_autoencoder(sixteen: list[Cost]) -> None:
    assert {c.decoder_gmacs for c in sixteen if c.image_size == 256} == {sixteen[0].decoder_gmacs}
    assert 300 < sixteen[0].decoder_gmacs < 320
    assert 5.4 < sixteen[12].decoder_gmacs / sixteen[0].decoder_gmacs < 5.8, "four times the pixels, in tiles that overlap"


def test_a_picture_is_guided_steps_and_the_decoder(sixteen: list[Cost]) -> None:
    for c in sixteen:
        assert c.steps == 250 and c.guided_gmacs == 2 * c.gmacs
        assert c.picture_gmacs == pytest.approx(250 * c.guided_gmacs + c.decoder_gmacs)


def test_a_picture_of_fewer_steps_costs_less() -> None:
    c = preset_cost("DiT-S/8", steps=4)
    assert c.steps == 4 and c.picture_gmacs == pytest.approx(8 * c.gmacs + c.decoder_gmacs)


# --- the counts are those of what is built -----------------------------------------------------------------------------


def by_hand(config: DiTConfig) -> int:
    """Multiply-accumulates of one row: inputs · outputs · tokens of every product."""
    d, out = config.hidden_size, config.patch_size**2 * config.out_channels
    tokens = config.num_tokens
    inner = tokens + 2 * (config.block == "in-context")
    mlp = 3 * -(-int(d * config.mlp_ratio * 2 / 3) // 8) * 8 if config.swiglu else 2 * int(d * config.mlp_ratio)
    block = inner * d * (3 * d + d) + 2 * inner * inner * d + inner * d * mlp
    block += {"adaln-zero": 6 * d * d, "adaln": 4 * d * d, "in-context": 0}.get(
        config.block, tokens * d * 2 * d + 2 * d * 2 * d + 2 * tokens * 2 * d
    )
    final = tokens * d * out + (2 * d * d if config.block.startswith("adaln") else 0)
    return tokens * config.in_channels * config.patch_size**2 * d + 256 * d + d * d + config.depth * block + final


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    "change",
    [{}, {"swiglu": True}, {"patch_size": 4}, {"input_size": 16}, {"depth": 3}, {"learn_sigma": False}, {"mlp_ratio": 2.0}],
    ids=lambda change: next(iter(change), "plain"),
)
def test_multiply_accumulates_are_those_counted_by_hand(
    tiny_dit_config: Callable[..., DiTConfig], block: str, change: dict[str, Any]
) -> None:
    config = tiny_dit_config("diffusion", block=block, hidden_size=48, **change)
    assert dit_cost(config)[1] * 1e9 == pytest.approx(by_hand(config), rel=1e-12)


@pytest.mark.parametrize("block", BLOCKS)
def test_norms_and_rotary_positions_are_not_counted_but_their_weights_are(tiny_dit_config: Callable[..., DiTConfig], block: str) -> None:
    plain = tiny_dit_config("flow", block=block)
    attentions = 2 if block == "cross-attention" else 1
    for parts, added in [({"rope": True}, 0), ({"qk_norm": True}, 2 * attentions * 2 * 16 * 2)]:  # blocks, q and k, 16 channels, affine
        changed = replace(plain, **parts)
        assert dit_cost(changed)[1] == dit_cost(plain)[1], parts
        assert dit_cost(changed)[0] - dit_cost(plain)[0] == added, parts


def test_biases_of_affine_norms_are_saved_by_the_root_mean_square(tiny_dit_config: Callable[..., DiTConfig]) -> None:
    for block, norms in [("adaln-zero", 0), ("adaln", 0), ("in-context", 5), ("cross-attention", 7)]:
        plain, rms = (tiny_dit_config("flow", block=block, rms_norm=on) for on in (False, True))
        assert dit_cost(plain)[0] - dit_cost(rms)[0] == norms * 32, block


def test_a_model_without_a_vae_has_no_decoder_to_count(tiny_dit_config: Callable[..., DiTConfig]) -> None:
    config = tiny_dit_config("flow")
    c = cost("tiny", config, None, 64, steps=10)
    assert (c.model, c.block, c.image_size, c.decoder_gmacs) == ("tiny", "adaln-zero", 64, None)
    assert c.gmacs == dit_cost(config)[1] and c.picture_gmacs == pytest.approx(20 * c.gmacs)


def test_the_decoder_counted_is_the_models_own(
    tiny_dit_config: Callable[..., DiTConfig], tiny_vae_config: Callable[..., VAEConfig]
) -> None:
    grey, colour = tiny_vae_config(), tiny_vae_config(image_channels=3)
    # The last convolution: 3×3 over 8 channels at 16×16, for two channels more.
    assert (decoder_gmacs(colour) - decoder_gmacs(grey)) * 1e9 == pytest.approx(2 * 9 * 8 * 16 * 16)
    c = cost("tiny", tiny_dit_config("flow"), grey, 16, steps=3)
    assert c.decoder_gmacs == decoder_gmacs(grey) and c.picture_gmacs == pytest.approx(6 * c.gmacs + decoder_gmacs(grey))


def test_counting_leaves_the_models_weights_unmade(tiny_dit_config: Callable[..., DiTConfig]) -> None:
    """Nothing of this size fits in memory: 2 TB of weights."""
    config = tiny_dit_config("flow", hidden_size=65536, num_heads=512, depth=10)
    assert dit_cost(config)[0] > 5e11 and dit_cost(config)[1] > 5e3


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("DiT-XXL/2", {}, "no preset 'DiT-XXL/2'; there is: DiT-S/8, .*DiT-XL/2"),
        ("DiT-S/2", {"block": "mamba"}, "block must be one of adaln-zero, adaln, cross-attention, in-context, got 'mamba'"),
        ("DiT-S/2", {"image_size": 100}, "image_size must be a multiple of 8 up to 2048, got 100"),
    ],
)
def test_what_there_is_not_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preset_cost(name, **changes)


# --- the lines that are printed ----------------------------------------------------------------------------------------


def test_the_table_has_a_line_a_model_in_columns(sixteen: list[Cost]) -> None:
    lines = table(sixteen)
    assert len(lines) == 1 + 16 + 1 and len({len(line) for line in lines[:-1]}) == 1
    assert lines[0].split() == ["model", "block", "pixels", "parameters", "GMACs", "guided", "decoder", "250", "steps"]
    assert [line.split()[:3] for line in lines[1:-1]] == [[c.model, c.block, str(c.image_size)] for c in sixteen]
    xl = lines[1 + list(PRESETS).index("DiT-XL/2")].split()
    assert xl[3] == "675,129,632" and float(xl[4]) == near(118.64) and float(xl[5]) == near(237.28)


def test_the_table_says_where_there_is_no_decoder(tiny_dit_config: Callable[..., DiTConfig]) -> None:
    assert " none " in table([cost("tiny", tiny_dit_config("flow"), None, 64, steps=1)])[1]
