"""The network: its initialisation, its size, and the parts that have an obvious twin."""

from collections.abc import Callable

import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_timestep_embedding
from torch.nn.functional import conv2d

from model.config import DiTConfig
from model.dit import DiT, PatchEmbed
from model.layers import Attention, CrossAttention, Mlp, TimestepEmbedder, attend, position_embedding


@pytest.fixture
def fresh(tiny_dit_config: Callable[..., DiTConfig]) -> DiT:
    """A larger width than the other tests', so that measured standard deviations mean something."""
    torch.manual_seed(0)
    return DiT(tiny_dit_config("diffusion", hidden_size=128, num_classes=200))


def inputs(rows: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 4, 8, 8, generator=generator), torch.arange(rows) * 300, torch.arange(rows)


def test_a_fresh_network_predicts_zero(fresh: DiT) -> None:
    out = fresh(*inputs())
    assert out.shape == (3, 8, 8, 8) and torch.equal(out, torch.zeros_like(out))


def test_a_fresh_block_is_the_identity(fresh: DiT) -> None:
    h, condition = torch.randn(3, 16, 128), torch.randn(3, 128)
    for block in fresh.blocks:
        assert torch.equal(block(h, block.adaLN_modulation(condition), None), h)


def test_a_fresh_network_still_learns(fresh: DiT) -> None:
    fresh(*inputs()).sum().backward()
    assert fresh.final_layer.linear.weight.grad.abs().max() > 0


def test_initial_spreads_are_the_papers(fresh: DiT) -> None:
    fresh.requires_grad_(False)
    for weight in (fresh.y_embedder.embedding_table.weight, fresh.t_embedder.mlp[0].weight, fresh.t_embedder.mlp[2].weight):
        assert abs(float(weight.std()) - 0.02) < 0.001
    for linear in (fresh.blocks[0].attn.qkv, fresh.blocks[1].mlp.fc1):  # Xavier: variance 2/(in + out)
        expected = (2 / (linear.in_features + linear.out_features)) ** 0.5
        assert float(linear.weight.std()) == pytest.approx(expected, rel=0.03)
    patch = fresh.x_embedder.proj.weight  # as a linear of 16 inputs and 128 outputs
    assert float(patch.std()) == pytest.approx((2 / (16 + 128)) ** 0.5, rel=0.05)
    assert float(patch.abs().max()) <= (6 / (16 + 128)) ** 0.5


def test_every_bias_starts_at_zero(fresh: DiT) -> None:
    biases = [p for name, p in fresh.named_parameters() if name.endswith("bias")]
    assert len(biases) > 10 and all(torch.count_nonzero(b) == 0 for b in biases)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_unpatchify_inverts_patchify(tiny_dit_config: Callable[..., DiTConfig], patch: int) -> None:
    dit = DiT(tiny_dit_config("flow", patch_size=patch))
    x = torch.randn(3, 4, 8, 8)
    # As in FACTS.md: n h w p q c → n c (h p) (w q), so a token's values are ordered row, column, channel.
    tokens = x.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 4, 5, 1).reshape(3, dit.config.num_tokens, -1)
    assert torch.equal(dit.unpatchify(tokens), x)


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_patch_embedding_equals_the_convolution(tiny_dit_config: Callable[..., DiTConfig], patch: int) -> None:
    embed = PatchEmbed(tiny_dit_config("flow", patch_size=patch))
    x = torch.randn(3, 4, 8, 8)
    convolved = conv2d(x, embed.proj.weight, embed.proj.bias, stride=patch).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(x), convolved)
    torch.testing.assert_close(embed(x.to(memory_format=torch.channels_last)), convolved)


def test_position_table_is_that_of_diffusers() -> None:
    theirs = get_2d_sincos_pos_embed(32, 4, base_size=4, output_type="pt").float()
    torch.testing.assert_close(position_embedding(4, 32), theirs, rtol=0, atol=1e-6)


def test_position_table_tells_columns_in_its_first_half() -> None:
    table = position_embedding(4, 32).view(4, 4, 32)  # row, column, channel
    assert torch.equal(table[0, :, :16], table[3, :, :16]) and torch.equal(table[:, 0, 16:], table[:, 3, 16:])
    assert not torch.equal(table[0, 0, :16], table[0, 1, :16])


@pytest.mark.parametrize("shift", [0, 1], ids=["official", "diffusers"])
def test_time_features_follow_their_convention(shift: int) -> None:
    t = torch.tensor([0, 1, 500, 999])
    features = TimestepEmbedder(32, 1.0, shift).features(t)
    theirs = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=shift)
    torch.testing.assert_close(features, theirs, rtol=0, atol=1e-4)


def test_the_two_time_conventions_differ_at_999() -> None:
    official, diffusers = (TimestepEmbedder(32, 1.0, shift).features(torch.tensor([999])) for shift in (0, 1))
    assert float((official - diffusers).abs().max()) > 1.8  # FACTS.md §2, trap 1


def test_time_factor_scales_time_before_its_features() -> None:
    flow, steps = TimestepEmbedder(32, 1000.0, 0), TimestepEmbedder(32, 1.0, 0)
    torch.testing.assert_close(flow.features(torch.tensor([0.25])), steps.features(torch.tensor([250.0])))


def test_bfloat16_weights_still_tell_neighbouring_timesteps_apart() -> None:
    embedder = TimestepEmbedder(32, 1.0, 0).bfloat16()
    t = torch.tensor([996, 997, 998, 999])  # bfloat16 holds only 996 and 1000
    assert embedder.features(t).dtype == torch.float32
    assert len({tuple(row.tolist()) for row in embedder(t).float()}) == 4


def test_attention_equals_its_formula() -> None:
    torch.manual_seed(0)
    attention = Attention(32, 4)
    x = torch.randn(2, 5, 32)
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    heads = []
    for h in range(4):
        part = slice(8 * h, 8 * h + 8)
        weights = torch.softmax(q[..., part] @ k[..., part].mT / 8**0.5, dim=-1)
        heads.append(weights @ v[..., part])
    torch.testing.assert_close(attention(x), attention.proj(torch.cat(heads, dim=-1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [16, 64, 1024])
def test_attention_as_it_is_compiled_equals_the_plain_one(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tokens: int) -> None:
    """The compiler is shown other lines for short sequences in bfloat16; here they run as they stand."""
    torch.manual_seed(0)
    attention, across = Attention(32, 4).requires_grad_(False), CrossAttention(32, 4).requires_grad_(False)
    x, context = torch.randn(2, tokens, 32), torch.randn(2, 2, 32)
    expected = attention(x), across(x, context)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    actual = attention.to(dtype)(x.to(dtype)), across.to(dtype)(x.to(dtype), context.to(dtype))
    for ours, plain in zip(actual, expected, strict=True):
        assert ours.dtype == dtype
        assert float((ours.float() - plain).norm() / plain.norm()) < (1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_activation_is_gelu_in_its_tanh_form(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    """The exact form differs by up to 5e-4, which a golden value of random weights hides. Compiled, it is written in another way."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiled)
    mlp, x = Mlp(8, 2.0), torch.linspace(-4, 4, 64).view(8, 8)
    h = mlp.fc1(x)
    activated = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
    torch.testing.assert_close(mlp(x), mlp.fc2(activated), rtol=0, atol=1e-6)


def test_class_and_time_change_the_output(build_checkpoint: Callable[..., object]) -> None:
    dit = build_checkpoint("flow").dit
    x, t = inputs()[0][:1], torch.tensor([0.5])
    out = dit(x, t, torch.tensor([0]))
    for other in (dit(x, t, torch.tensor([1])), dit(x, t, torch.tensor([4])), dit(x, torch.tensor([0.6]), torch.tensor([0]))):
        assert float((out - other).norm() / out.norm()) > 1e-3


def test_half_precision_weights_answer_in_the_type_of_the_latents(build_checkpoint: Callable[..., object]) -> None:
    dit = build_checkpoint("flow").dit
    x, _, y = inputs()
    t = torch.tensor([0.1, 0.5, 0.9])
    full = dit(x, t, y)
    half = dit.bfloat16()(x, t, y)
    assert half.dtype == torch.float32
    assert float((half - full).norm() / full.norm()) < 0.05


@pytest.mark.parametrize(("tokens", "spread", "allowed"), [(256, 1.0, 0.006), (256, 8.0, 0.02), (16, 1.0, 0.002), (16, 8.0, 0.002)])
def test_attention_as_it_is_compiled_stays_near_at_large_scores(
    monkeypatch: pytest.MonkeyPatch, tokens: int, spread: float, allowed: float
) -> None:
    """Scores of short sequences are rounded to bfloat16 there, those of tiny ones are not: docs/architecture.md tells the price."""
    q, k, v = torch.randn(3, 2, 4, tokens, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    q = (q * spread).bfloat16()
    exact = attend(q.float(), k.float(), v.float())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert float((attend(q, k, v).float() - exact).norm() / exact.norm()) < allowed
