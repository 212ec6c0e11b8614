"""The four blocks against their formulas, written here a second time with plain matrix products in float64.

`network` is the whole of FACTS.md §1, and of the optional parts, on a state dict: no module of ours computes anything in it. The norms'
epsilons are large and differ (`EPS`), so that a norm with another's shows.
"""

import math
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from model.blocks import BLOCKS as CLASSES
from model.blocks import FinalLayer, Modulation
from model.checkpoint import Checkpoint
from model.config import ADAPTIVE, BLOCKS, DiTConfig
from model.dit import DiT

State = dict[str, Tensor]
PARTS = ("qk_norm", "rms_norm", "swiglu", "rope")
EVERY_PART = dict.fromkeys(PARTS, True)
EPS = {"norm_eps": 0.05, "mlp_norm_eps": 0.3}
GOLDEN = Path(__file__).parent.parent / "golden" / "official-tiny-p2.pt"

each_block = pytest.mark.parametrize("block", BLOCKS)
with_and_without_parts = pytest.mark.parametrize("parts", [{}, EVERY_PART], ids=["plain", "every part"])


# --- the formulas ------------------------------------------------------------------------------------------------------


def under(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def linear(x: Tensor, state: State, name: str) -> Tensor:
    return x @ state[f"{name}.weight"].mT + state[f"{name}.bias"]


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def norm(x: Tensor, config: DiTConfig, eps: float, state: State, name: str) -> Tensor:
    """Affine where the state dict has a weight of that name."""
    if not config.rms_norm:
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x * state.get(f"{name}.weight", 1.0) + state.get(f"{name}.bias", 0.0)


def turned(x: Tensor, config: DiTConfig) -> Tensor:
    """2-D rotary positions of one head (B, N, d), as complex numbers: channel i is the real part, i + d/2 the imaginary one."""
    side, half = config.input_size // config.patch_size, x.shape[-1] // 2
    place = torch.arange(side * side)
    frequency = torch.tensor([10000.0 ** (-i / (half // 2)) for i in range(half // 2)], dtype=torch.float64)
    angle = torch.cat([(place % side)[:, None] * frequency, (place // side)[:, None] * frequency], dim=1)
    tokens = torch.cat([torch.zeros(x.shape[1] - side * side, half), angle])  # time and class have no place
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(tokens), tokens)
    return torch.cat([z.real, z.imag], dim=-1)


def heads(q: Tensor, k: Tensor, v: Tensor, config: DiTConfig, state: State, *, rope: bool) -> Tensor:
    d = config.hidden_size // config.num_heads
    results = []
    for h in range(config.num_heads):
        part = slice(d * h, d * h + d)
        q_h, k_h = q[..., part], k[..., part]
        if config.qk_norm:
            q_h, k_h = norm(q_h, config, config.norm_eps, state, "q_norm"), norm(k_h, config, config.norm_eps, state, "k_norm")
        if rope:
            q_h, k_h = turned(q_h, config), turned(k_h, config)
        results.append(torch.softmax(q_h @ k_h.mT / math.sqrt(d), dim=-1) @ v[..., part])
    return linear(torch.cat(results, dim=-1), state, "proj")


def self_attention(x: Tensor, config: DiTConfig, state: State) -> Tensor:
    d = config.hidden_size
    qkv = linear(x, state, "qkv")
    return heads(qkv[..., :d], qkv[..., d : 2 * d], qkv[..., 2 * d :], config, state, rope=config.rope)


def cross_attention(x: Tensor, context: Tensor, config: DiTConfig, state: State) -> Tensor:
    kv = linear(context, state, "kv")
    return heads(linear(x, state, "q"), kv[..., : config.hidden_size], kv[..., config.hidden_size :], config, state, rope=False)


def mlp(x: Tensor, config: DiTConfig, state: State) -> Tensor:
    h = linear(x, state, "fc1")
    if config.swiglu:
        gate, value = h[..., : h.shape[-1] // 2], h[..., h.shape[-1] // 2 :]
        return linear(silu(gate) * value, state, "fc2")
    return linear(0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))), state, "fc2")


def block_formula(x: Tensor, condition: Tensor, config: DiTConfig, state: State) -> Tensor:
    """x (B, N, D); condition SiLU(t + y) (B, D) for the adaptive blocks, else [t, y] (B, 2, D)."""

    def attend(h: Tensor) -> Tensor:
        return self_attention(h, config, under(state, "attn."))

    def feed(h: Tensor) -> Tensor:
        return mlp(h, config, under(state, "mlp."))

    def normed(name: str, h: Tensor) -> Tensor:
        return norm(h, config, config.mlp_norm_eps if name == "norm2" else config.norm_eps, state, name)

    d = config.hidden_size
    if config.block in ADAPTIVE:
        numbers = linear(condition, state, "adaLN_modulation.1")[:, None]
        chunk = [numbers[..., d * i : d * i + d] for i in range(numbers.shape[-1] // d)]
    match config.block:
        case "adaln-zero":
            x = x + chunk[2] * attend(normed("norm1", x) * (1 + chunk[1]) + chunk[0])
            return x + chunk[5] * feed(normed("norm2", x) * (1 + chunk[4]) + chunk[3])
        case "adaln":
            x = x + attend(normed("norm1", x) * (1 + chunk[1]) + chunk[0])
            return x + feed(normed("norm2", x) * (1 + chunk[3]) + chunk[2])
        case "cross-attention":
            x = x + attend(normed("norm1", x))
            x = x + cross_attention(normed("norm_cross", x), condition, config, under(state, "cross_attn."))
            return x + feed(normed("norm2", x))
        case _:
            x = x + attend(normed("norm1", x))
            return x + feed(normed("norm2", x))


def final_formula(x: Tensor, condition: Tensor, config: DiTConfig, state: State) -> Tensor:
    x = norm(x, config, config.norm_eps, state, "norm_final")
    if config.block in ADAPTIVE:
        shift, scale = linear(condition, state, "adaLN_modulation.1")[:, None].chunk(2, dim=-1)
        x = x * (1 + scale) + shift
    return linear(x, state, "linear")


def embeddings(t: Tensor, y: Tensor, state: State) -> tuple[Tensor, Tensor]:
    """Time and class, (B, D) each."""
    angle = t.double()[:, None] * torch.tensor([math.exp(-math.log(10000) * i / 128) for i in range(128)], dtype=torch.float64)
    time = linear(torch.cat([angle.cos(), angle.sin()], dim=1), state, "t_embedder.mlp.0")
    return linear(silu(time), state, "t_embedder.mlp.2"), state["y_embedder.embedding_table.weight"][y]


def network(x: Tensor, t: Tensor, y: Tensor, config: DiTConfig, state: State, positions: Tensor) -> Tensor:
    p, side = config.patch_size, config.input_size // config.patch_size
    time, label = embeddings(t, y, state)
    tokens = conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=p).flatten(2).mT + positions
    condition = silu(time + label) if config.block in ADAPTIVE else torch.stack([time, label], dim=1)
    if config.block == "in-context":
        tokens = torch.cat([time[:, None], label[:, None], tokens], dim=1)
    for i in range(config.depth):
        tokens = block_formula(tokens, condition, config, under(state, f"blocks.{i}."))
    if config.block == "in-context":
        tokens = tokens[:, 2:]
    out = final_formula(tokens, condition, config, under(state, "final_layer."))
    out = out.reshape(len(x), side, side, p, p, config.out_channels).permute(0, 5, 1, 3, 2, 4)  # n h w p q c → n c h p w q
    return out.reshape(len(x), config.out_channels, side * p, side * p)


# --- models and inputs -------------------------------------------------------------------------------------------------


def random_module(module: nn.Module) -> nn.Module:
    """Weights at which every term of a formula counts."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return module.double().eval().requires_grad_(False)


@pytest.fixture
def build(tiny_dit_config: Callable[..., DiTConfig]) -> Callable[..., DiT]:
    """`build(block, **parts)`: random, float64, unlike epsilons."""

    def make(block: str, **changes: Any) -> DiT:
        torch.manual_seed(2)
        return random_module(DiT(tiny_dit_config("diffusion", block=block, **EPS, **changes)))

    return make


@pytest.fixture
def fresh(tiny_dit_config: Callable[..., DiTConfig]) -> Callable[..., DiT]:
    """`fresh(block, **parts)` as it is before training; wide, so that measured spreads mean something."""

    def make(block: str, **changes: Any) -> DiT:
        torch.manual_seed(0)
        return DiT(tiny_dit_config("diffusion", **{"hidden_size": 128, "num_classes": 200, "block": block, **changes}))

    return make


def inputs(rows: int = 4, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Early times: at t = 999 the features' float32 angle has an error of 3e-5, which would hide others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.arange(rows) * 2 + 1, torch.arange(rows) % 5


def told(layer: nn.Module, condition: Tensor) -> Tensor:
    """What a block or the final layer is called with: what its own modulation makes of SiLU(t + y), or [t, y] as it is."""
    modulation = getattr(layer, "adaLN_modulation", None)
    return condition if modulation is None else modulation(condition)


def seen_by(module: nn.Module) -> list[tuple[Tensor, ...]]:
    """What the module is called with, call by call."""
    calls: list[tuple[Tensor, ...]] = []
    module.register_forward_pre_hook(lambda _, given: calls.append(given))
    return calls


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small wait longer for a second thread than they take, on a machine that is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- formulas ----------------------------------------------------------------------------------------------------------


@each_block
@pytest.mark.parametrize("part", [{}, *({name: True} for name in PARTS[:3])], ids=["plain", *PARTS[:3]])
def test_a_block_equals_its_formula(build: Callable[..., DiT], block: str, part: dict[str, bool]) -> None:
    dit = build(block, **part)
    x = torch.randn(3, 16, 32, dtype=torch.float64)
    condition = torch.randn(3, 32, dtype=torch.float64) if block in ADAPTIVE else torch.randn(3, 2, 32, dtype=torch.float64)
    for module in dit.blocks:
        expected = block_formula(x, condition, dit.config, module.state_dict())
        torch.testing.assert_close(module(x, told(module, condition), None), expected, rtol=1e-9, atol=1e-9)


@each_block
def test_the_final_layer_equals_its_formula_with_and_without_condition(build: Callable[..., DiT], block: str) -> None:
    dit = build(block)
    x = torch.randn(3, 16, 32, dtype=torch.float64)
    one, other = (torch.randn(3, 32, dtype=torch.float64) for _ in range(2))
    final = dit.final_layer
    out, another = (final(x, told(final, condition)) for condition in (one, other))
    torch.testing.assert_close(out, final_formula(x, one, dit.config, final.state_dict()), rtol=1e-9, atol=1e-9)
    assert torch.equal(out, another) == (block not in ADAPTIVE)


@pytest.mark.parametrize("parts", list(product([False, True], repeat=4)), ids=lambda parts: "".join("01"[p] for p in parts))
@each_block
def test_the_network_with_any_parts_equals_its_formula(build: Callable[..., DiT], block: str, parts: tuple[bool, ...]) -> None:
    """Features of time and rotary angles are float32 there, so the whole agrees to 1e-5."""
    dit = build(block, **dict(zip(PARTS, parts, strict=True)))
    expected = network(*inputs(), dit.config, dit.state_dict(), dit.pos_embed)
    assert float(expected.std()) > 0.5
    assert float((dit(*inputs()) - expected).norm() / expected.norm()) < 1e-5


# --- how the condition enters ------------------------------------------------------------------------------------------


def test_in_context_puts_time_and_class_before_the_tokens_without_a_position(build: Callable[..., DiT]) -> None:
    dit = build("in-context")
    x, t, y = inputs()
    first, final = seen_by(dit.blocks[0]), seen_by(dit.final_layer)
    dit(x, t, y)
    tokens = first[0][0]
    assert tokens.shape == (4, 2 + 16, 32)
    assert torch.equal(tokens[:, 0], dit.t_embedder(t)) and torch.equal(tokens[:, 1], dit.y_embedder(y))
    assert torch.equal(tokens[:, 2:], dit.x_embedder(x) + dit.pos_embed)
    assert final[0][0].shape == (4, 16, 32)


def test_in_context_takes_its_two_tokens_away_only_after_the_last_block(build: Callable[..., DiT]) -> None:
    dit = build("in-context", depth=3)
    calls = [seen_by(block) for block in dit.blocks]
    outputs: list[Tensor] = []
    dit.blocks[-1].register_forward_hook(lambda module, given, out: outputs.append(out))
    final = seen_by(dit.final_layer)
    dit(*inputs())
    assert [tuple(call[0][0].shape) for call in calls] == [(4, 18, 32)] * 3
    assert torch.equal(final[0][0], outputs[0][:, 2:])


def test_cross_attention_sees_time_and_class_side_by_side_and_not_their_sum(build: Callable[..., DiT]) -> None:
    dit = build("cross-attention")
    x, t, y = inputs()
    context, tokens = seen_by(dit.blocks[1].cross_attn), seen_by(dit.blocks[0])
    dit(x, t, y)
    assert torch.equal(context[0][1], torch.stack([dit.t_embedder(t), dit.y_embedder(y)], dim=1))
    assert tokens[0][0].shape == (4, 16, 32)


def test_cross_attention_comes_after_self_attention_and_before_the_mlp(build: Callable[..., DiT]) -> None:
    block = build("cross-attention").blocks[0]
    order: list[str] = []
    for name in ("norm1", "attn", "norm_cross", "cross_attn", "norm2", "mlp"):
        block.get_submodule(name).register_forward_hook(lambda *_, name=name: order.append(name))
    block(torch.randn(1, 16, 32, dtype=torch.float64), torch.randn(1, 2, 32, dtype=torch.float64), None)
    assert order == ["norm1", "attn", "norm_cross", "cross_attn", "norm2", "mlp"]


@pytest.mark.parametrize("block", ADAPTIVE)
def test_the_activation_of_the_condition_is_applied_once(build: Callable[..., DiT], block: str) -> None:
    dit = build(block)
    x, t, y = inputs()
    first, final = seen_by(dit.blocks[0]), seen_by(dit.final_layer)
    dit(x, t, y)
    condition = silu(dit.t_embedder(t) + dit.y_embedder(y))
    torch.testing.assert_close(dit.condition(t, y), condition, rtol=1e-9, atol=1e-9)
    for seen, layer in ((first, dit.blocks[0]), (final, dit.final_layer)):
        torch.testing.assert_close(seen[0][1], linear(condition, layer.state_dict(), "adaLN_modulation.1"), rtol=1e-9, atol=1e-9)


@each_block
@with_and_without_parts
def test_time_class_and_every_token_reach_every_output(
    build_checkpoint: Callable[..., Checkpoint], block: str, parts: dict[str, bool]
) -> None:
    dit = build_checkpoint("diffusion", block=block, **parts).dit.double()
    x, t, y = (given[:1] for given in inputs())
    out = dit(x, t, y)
    nudged = x.clone()
    nudged[0, 0, 7, 7] += 1
    for other in (dit(nudged, t, y), dit(x, t + 5, y), dit(x, t, y + 1)):
        assert torch.all((out - other).abs().amax(1) > 1e-8)


# --- what does not depend on x -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_block
@with_and_without_parts
def test_denoising_with_what_was_prepared_is_the_forward_bit_for_bit(
    build_checkpoint: Callable[..., Checkpoint], block: str, parts: dict[str, bool], dtype: torch.dtype
) -> None:
    dit = build_checkpoint("diffusion", block=block, **parts).dit.to(dtype)
    x, t, y = inputs(8)
    prepared = dit.prepare(t, y)
    assert prepared.shape == (8, sum(dit.prepared_sizes)) and prepared.dtype == dtype
    assert torch.equal(dit.denoise(x.float(), prepared), dit(x.float(), t, y))


@each_block
def test_prepared_rows_are_a_table_from_which_any_row_may_be_taken(build_checkpoint: Callable[..., Checkpoint], block: str) -> None:
    dit = build_checkpoint("diffusion", block=block).dit
    x, t, y = inputs(8)
    table = dit.prepare(t, y)
    rows = torch.tensor([5, 0, 0, 3, 7, 5, 1, 2])
    assert torch.equal(dit.denoise(x.float(), table[rows]), dit(x.float(), t[rows], y[rows]))


@pytest.mark.parametrize(
    ("block", "sizes"), [("adaln-zero", [192, 192, 64]), ("adaln", [128, 128, 64]), ("cross-attention", [64]), ("in-context", [64])]
)
def test_a_prepared_row_holds_what_each_layer_takes(build: Callable[..., DiT], block: str, sizes: list[int]) -> None:
    """Of width 32: 6, 4 and 2 chunks; or time and class, once for all."""
    dit = build(block)
    assert dit.prepared_sizes == sizes
    _, t, y = inputs()
    parts, conditions = dit.prepare(t, y).split(sizes, dim=1), dit.conditions(t, y)
    assert len(conditions) == len(dit.blocks) + 1
    for part, condition in zip(parts, conditions, strict=block in ADAPTIVE):
        assert torch.equal(part, condition.flatten(1))
    assert block in ADAPTIVE or all(condition is conditions[0] for condition in conditions)


# --- initialisation ----------------------------------------------------------------------------------------------------


@each_block
@with_and_without_parts
def test_every_fresh_network_predicts_zero(fresh: Callable[..., DiT], block: str, parts: dict[str, bool]) -> None:
    dit = fresh(block, **parts)
    x, t, y = inputs()
    assert torch.count_nonzero(dit(x.float(), t, y)) == 0


@each_block
@with_and_without_parts
def test_only_adaln_zero_starts_as_the_identity(fresh: Callable[..., DiT], block: str, parts: dict[str, bool]) -> None:
    dit = fresh(block, **parts).requires_grad_(False)
    x = torch.randn(3, 16 + 2 * (block == "in-context"), 128)
    condition = torch.randn(3, 128) if block in ADAPTIVE else torch.randn(3, 2, 128)
    for module in dit.blocks:
        out = module(x, told(module, condition), dit.rotary)
        assert torch.equal(out, x) == (block == "adaln-zero")
        assert float((out - x).std()) > 0.1 or block == "adaln-zero"


def test_a_fresh_adaln_block_ignores_its_condition(fresh: Callable[..., DiT]) -> None:
    """All its modulation starts at zero: a plain block, since nothing gates it."""
    block, x = fresh("adaln").blocks[0], torch.randn(3, 16, 128)
    one, other = (told(block, condition) for condition in (torch.randn(3, 128), torch.zeros(3, 128)))
    assert torch.equal(block(x, one, None), block(x, other, None))


@each_block
@with_and_without_parts
def test_every_weight_starts_as_the_paper_has_it(fresh: Callable[..., DiT], block: str, parts: dict[str, bool]) -> None:
    dit = fresh(block, **parts).requires_grad_(False)
    kinds = {"linear": 0, "zero": 0, "one": 0, "table": 0}
    for name, value in dit.named_parameters():
        owner = dit.get_submodule(name.rpartition(".")[0])
        if "adaLN_modulation" in name or name.startswith("final_layer.linear") or name.endswith("bias"):
            assert torch.count_nonzero(value) == 0, name
            kinds["zero"] += 1
        elif isinstance(owner, nn.LayerNorm | nn.RMSNorm):
            assert torch.all(value == 1), name
            kinds["one"] += 1
        elif name.startswith(("t_embedder", "y_embedder")):
            assert float(value.std()) == pytest.approx(0.02, rel=0.03), name
            kinds["table"] += 1
        else:  # Xavier: uniform within ±√(6/(in + out)), the patch convolution seen as a linear
            rows, columns = value.flatten(1).shape
            limit = math.sqrt(6 / (rows + columns))
            assert float(value.abs().max()) <= limit and float(value.std()) == pytest.approx(limit / math.sqrt(3), rel=0.05), name
            kinds["linear"] += 1
    blocks = 2
    assert kinds["linear"] == 1 + blocks * (7 if block == "cross-attention" else 4)
    assert kinds["table"] == 3


@pytest.fixture
def every_warning() -> Iterator[None]:
    """torch's own too, of which most are given once a process: slow paths taken for want of a cast."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


@each_block
@with_and_without_parts
@pytest.mark.usefixtures("every_warning")
def test_every_weight_learns_in_mixed_precision(build: Callable[..., DiT], block: str, parts: dict[str, bool]) -> None:
    """As training runs it: float32 weights, bfloat16 products."""
    dit = build(block, **parts).float().train().requires_grad_(True)
    x, t, y = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        dit(x.float(), t, y).float().square().mean().backward()
    for name, parameter in dit.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        assert torch.count_nonzero(parameter.grad) > 0, name


# --- names -------------------------------------------------------------------------------------------------------------

NORM = ("weight", "bias")


def affine(*names: str) -> set[str]:
    return {f"{name}.{kind}" for name in names for kind in NORM}


def per_block(*names: str) -> set[str]:
    return {f"blocks.{i}.{name}" for i in range(2) for name in names}


def names_of(block: str) -> set[str]:
    """By hand from the official names: FACTS.md §2 and the differences of §1."""
    official = set(torch.load(GOLDEN, weights_only=True)) - {"pos_embed"}
    if block in ADAPTIVE:
        return official
    plain = {name for name in official if "adaLN" not in name} | affine("final_layer.norm_final") | per_block(*affine("norm1", "norm2"))
    if block == "in-context":
        return plain
    return plain | per_block(*affine("norm_cross", "cross_attn.q", "cross_attn.kv", "cross_attn.proj"))


def test_adaln_zero_has_the_official_names_and_shapes(tiny_dit_config: Callable[..., DiTConfig]) -> None:
    official = torch.load(GOLDEN, weights_only=True)
    dit = DiT(tiny_dit_config("diffusion", hidden_size=64, num_heads=4, num_classes=10))
    shapes = {name: value.shape for name, value in dit.state_dict().items()}
    assert shapes == {name: value.shape for name, value in official.items() if name != "pos_embed"}


@each_block
def test_a_block_adds_only_the_names_it_needs(build: Callable[..., DiT], block: str) -> None:
    state = build(block).state_dict()
    assert set(state) == names_of(block)
    chunks = {"adaln-zero": 6, "adaln": 4}.get(block)
    assert chunks is None or state["blocks.0.adaLN_modulation.1.weight"].shape == (chunks * 32, 32)


@each_block
def test_the_parts_add_only_the_names_they_need(build: Callable[..., DiT], block: str) -> None:
    names, attentions = names_of(block), ["attn", "cross_attn"] if block == "cross-attention" else ["attn"]
    qk = [f"{attention}.{norm}" for attention in attentions for norm in ("q_norm", "k_norm")]
    assert set(build(block, rope=True).state_dict()) == names
    assert set(build(block, swiglu=True).state_dict()) == names
    assert set(build(block, qk_norm=True).state_dict()) == names | per_block(*affine(*qk))
    without_bias = {name for name in names if not (name.endswith("bias") and "norm" in name)}
    assert set(build(block, rms_norm=True).state_dict()) == without_bias
    assert set(build(block, rms_norm=True, qk_norm=True).state_dict()) == without_bias | per_block(*(f"{name}.weight" for name in qk))


def test_every_block_of_the_configuration_is_built() -> None:
    assert set(CLASSES) == set(BLOCKS)


@pytest.mark.parametrize(("block", "modulations"), [("adaln-zero", 3), ("adaln", 3), ("cross-attention", 0), ("in-context", 0)])
def test_only_the_adaptive_blocks_are_modulated(build: Callable[..., DiT], block: str, modulations: int) -> None:
    dit = build(block)
    assert sum(isinstance(module, Modulation) for module in dit.modules()) == modulations
    assert isinstance(dit.final_layer, FinalLayer) and (dit.final_layer.adaLN_modulation is None) == (modulations == 0)


# --- rows do not know each other ---------------------------------------------------------------------------------------


@each_block
@with_and_without_parts
def test_a_row_is_bit_for_bit_the_same_among_four_and_among_eight(
    build_checkpoint: Callable[..., Checkpoint], block: str, parts: dict[str, bool]
) -> None:
    dit = build_checkpoint("diffusion", block=block, **parts).dit
    x, t, y = inputs(8)
    x, t = x.float(), t.float() * 60
    torch.set_num_threads(2)  # kernels share rows out among threads, and so depend most on how many rows there are
    crowd = dit(x, t, y)
    for shift in range(8):  # every row at each of the four places
        few = torch.arange(8).roll(shift)[:4]
        assert torch.equal(dit(x[few], t[few], y[few]), crowd[few]), f"rows {few.tolist()} alone"
    for seed in range(4):
        order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
        few = order[:4]
        assert torch.equal(dit(x[order], t[order], y[order]), crowd[order]), f"rows in order {order.tolist()}"
        assert torch.equal(dit(x[few], t[few], y[few]), crowd[few]), f"rows {few.tolist()} alone"


# --- the compiler ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own, on the way to its compiler
@pytest.mark.parametrize(("block", "parts"), [*((block, EVERY_PART) for block in BLOCKS), ("adaln-zero", {})])
def test_every_block_is_one_graph_for_the_compiler(build_checkpoint: Callable[..., Checkpoint], block: str, parts: dict[str, bool]) -> None:
    """Dynamo alone, which needs no C++ compiler: a graph break or a sync with the host would raise."""
    dit = build_checkpoint("diffusion", block=block, depth=1, **parts).dit
    x, t, y = inputs()
    compiled, denoise = (torch.compile(call, backend="eager", fullgraph=True, dynamic=False) for call in (dit, dit.denoise))
    torch.testing.assert_close(compiled(x.float(), t, y), dit(x.float(), t, y), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(denoise(x.float(), dit.prepare(t, y)), dit(x.float(), t, y), rtol=1e-5, atol=1e-5)
    torch.compiler.reset()
