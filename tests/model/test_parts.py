"""The parts beyond the paper, each by its own property, and together: they run, are saved, and belong to a checkpoint's hash."""

import json
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model import checkpoint as module
from model.blocks import BLOCKS as CLASSES
from model.checkpoint import Checkpoint, load, read_config, save
from model.config import ADAPTIVE, BLOCKS, DiTConfig, ObjectiveConfig, VAEConfig, preset, stored
from model.dit import DiT
from model.layers import Attention, CrossAttention, Mlp, SwiGLU, make_norm, rotary_table, rotate

PARTS = ("qk_norm", "rms_norm", "swiglu", "rope")
EVERY_PART = dict.fromkeys(PARTS, True)
BUNDLED = Path(__file__).parents[2] / "checkpoints" / "fashion-mnist"
# What a checkpoint.json held before there were blocks and parts.
FIRST_ARCHITECTURE = {
    *("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes"),
    *("mlp_ratio", "learn_sigma", "norm_eps", "time_factor", "frequency_shift"),
}
FIRST_OBJECTIVE = {"kind", "num_timesteps", "beta_start", "beta_end", "logit_normal_mean", "logit_normal_std"}

each_block = pytest.mark.parametrize("block", BLOCKS)
each_combination = pytest.mark.parametrize(
    "parts", [dict(zip(PARTS, on, strict=True)) for on in product([False, True], repeat=4)], ids=lambda p: "+".join(k for k in p if p[k])
)


@pytest.fixture(autouse=True)
def seeded_on_one_thread() -> Iterator[None]:
    """Products this small wait longer for a second thread than they take, on a machine that is shared."""
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def attention(kind: type[nn.Module] = Attention, **options: Any) -> nn.Module:
    made = kind(32, 2, **options).double().requires_grad_(False)
    for parameter in made.parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    return made


def scaled(made: nn.Module, name: str, rows: slice, factor: float) -> None:
    linear = made.get_submodule(name)
    linear.weight[rows] *= factor
    linear.bias[rows] *= factor


# --- QK-norm -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rms", [False, True], ids=["layer norm", "rms norm"])
def test_q_and_k_are_normalised_per_head_before_their_affine(rms: bool) -> None:
    made = attention(qk_norm=True, rms_norm=rms)
    seen: dict[str, Tensor] = {}
    for name in ("q_norm", "k_norm"):
        norm = made.get_submodule(name)
        nn.init.ones_(norm.weight)
        if not rms:
            nn.init.zeros_(norm.bias)
        norm.register_forward_hook(lambda m, given, out, name=name: seen.update({name: out}))
    made(50 * torch.randn(3, 16, 32, dtype=torch.float64))
    for value in seen.values():
        assert value.shape == (3, 2, 16, 16), "rows, heads, tokens, channels of one head"
        torch.testing.assert_close(value.square().mean(-1), torch.ones(3, 2, 16).double(), rtol=1e-4, atol=0)
        assert (float(value.mean(-1).abs().max()) < 1e-9) == (not rms)
    assert set(seen) == {"q_norm", "k_norm"}


@pytest.mark.parametrize("rms", [False, True], ids=["layer norm", "rms norm"])
@pytest.mark.parametrize("part", [slice(0, 32), slice(32, 64)], ids=["q", "k"])
def test_the_size_of_q_and_k_does_not_matter_with_qk_norm(part: slice, rms: bool) -> None:
    x = torch.randn(2, 16, 32, dtype=torch.float64)
    for qk_norm in (True, False):
        made = attention(qk_norm=qk_norm, rms_norm=rms, eps=1e-12)
        before = made(x)
        scaled(made, "qkv", part, 7.0)
        assert torch.allclose(made(x), before, rtol=1e-6, atol=1e-6) == qk_norm


def test_the_size_of_v_matters_with_qk_norm() -> None:
    made, x = attention(qk_norm=True), torch.randn(2, 16, 32, dtype=torch.float64)
    before = made(x) - made.proj.bias
    scaled(made, "qkv", slice(64, 96), 7.0)
    torch.testing.assert_close(made(x) - made.proj.bias, 7 * before)


@pytest.mark.parametrize("name", ["q", "kv"])
def test_the_size_of_q_and_k_does_not_matter_across_attentions_either(name: str) -> None:
    x, context = torch.randn(2, 16, 32, dtype=torch.float64), torch.randn(2, 2, 32, dtype=torch.float64)
    made = attention(CrossAttention, qk_norm=True, eps=1e-12)
    before = made(x, context)
    scaled(made, name, slice(0, 32), 7.0)  # of kv, the first half is k
    torch.testing.assert_close(made(x, context), before, rtol=1e-6, atol=1e-6)


# --- RMS norm ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [False, True])
def test_the_root_mean_square_norm_equals_its_formula(affine: bool) -> None:
    norm = make_norm(32, rms=True, eps=0.05, affine=affine).double()
    weight = torch.ones(32, dtype=torch.float64)
    if affine:
        nn.init.normal_(norm.weight)
        weight = norm.weight
    assert len(list(norm.parameters())) == int(affine), "no bias"
    x = torch.randn(3, 16, 32, dtype=torch.float64) + 2
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 0.05).sqrt() * weight)


def test_norms_of_half_precision_are_taken_in_float32() -> None:
    """Squares of 300 overflow float16, and a mean of 1000 hides a spread of 1 from bfloat16's sums."""
    x = torch.randn(4, 64) * 400
    for rms in (False, True):
        norm = make_norm(64, rms=rms, eps=1e-6, affine=False)
        torch.testing.assert_close(norm(x.half()).float(), norm(x.half().float()), rtol=2e-3, atol=1e-3)


@each_block
def test_rms_norm_replaces_every_layer_norm(tiny_dit_config: Callable[..., DiTConfig], block: str) -> None:
    plain = DiT(tiny_dit_config("flow", block=block, qk_norm=True))
    rms = DiT(tiny_dit_config("flow", block=block, qk_norm=True, rms_norm=True))
    layers = [name for name, m in plain.named_modules() if isinstance(m, nn.LayerNorm)]
    assert layers == [name for name, m in rms.named_modules() if isinstance(m, nn.RMSNorm)] and len(layers) >= 9
    assert not any(isinstance(m, nn.LayerNorm) for m in rms.modules())


@each_block
@pytest.mark.parametrize("rms", [False, True], ids=["layer norm", "rms norm"])
def test_every_norm_has_its_epsilon(tiny_dit_config: Callable[..., DiTConfig], block: str, rms: bool) -> None:
    dit = DiT(tiny_dit_config("flow", block=block, qk_norm=True, rms_norm=rms, norm_eps=1e-3, mlp_norm_eps=1e-5))
    norms = {name: m.eps for name, m in dit.named_modules() if isinstance(m, nn.LayerNorm | nn.RMSNorm)}
    assert norms == {name: 1e-5 if name.endswith("norm2") else 1e-3 for name in norms}


@each_block
@pytest.mark.parametrize("rms", [False, True], ids=["layer norm", "rms norm"])
def test_norms_are_affine_only_where_no_condition_shifts_them(tiny_dit_config: Callable[..., DiTConfig], block: str, rms: bool) -> None:
    dit = DiT(tiny_dit_config("flow", block=block, rms_norm=rms))
    norms = [m for m in dit.modules() if isinstance(m, nn.LayerNorm | nn.RMSNorm)]
    assert len(norms) == 1 + 2 * (3 if block == "cross-attention" else 2)
    assert {m.elementwise_affine for m in norms} == {block not in ADAPTIVE}


# --- SwiGLU ------------------------------------------------------------------------------------------------------------


def test_swiglu_equals_its_formula() -> None:
    made = SwiGLU(32, 4.0).double()
    x = torch.randn(3, 16, 32, dtype=torch.float64)
    hidden = made.fc2.in_features
    gate = x @ made.fc1.weight[:hidden].T + made.fc1.bias[:hidden]
    value = x @ made.fc1.weight[hidden:].T + made.fc1.bias[hidden:]
    expected = (gate * torch.sigmoid(gate) * value) @ made.fc2.weight.T + made.fc2.bias
    torch.testing.assert_close(made(x), expected)


@pytest.mark.parametrize("size", ["S", "B", "L", "XL"])
def test_swiglu_has_as_many_parameters_as_the_mlp_it_replaces(size: str) -> None:
    config = preset(f"DiT-{size}/2")
    with torch.device("meta"):
        gated, plain = (sum(p.numel() for p in kind(config.hidden_size, config.mlp_ratio).parameters()) for kind in (SwiGLU, Mlp))
    assert gated == pytest.approx(plain, rel=0.02)


@pytest.mark.parametrize("width", [32, 64, 384, 1152])
@pytest.mark.parametrize("ratio", [1.0, 2.0, 4.0, 8 / 3])
def test_swiglu_is_as_wide_as_kernels_like(width: int, ratio: float) -> None:
    hidden = SwiGLU(width, ratio).fc2.in_features
    assert hidden % 8 == 0 and abs(hidden - width * ratio * 2 / 3) < 8


# --- rotary positions --------------------------------------------------------------------------------------------------

SIDE, HEAD = 5, 16


def scores(q: Tensor, k: Tensor) -> Tensor:
    """One q and one k (d,) put at every place: (places, places)."""
    table = rotary_table(SIDE, HEAD)
    at_q, at_k = (rotate(v.expand(1, 1, SIDE * SIDE, HEAD), table)[0, 0].double() for v in (q, k))
    return at_q @ at_k.T


def test_scores_depend_on_the_offset_of_rows_and_columns_alone() -> None:
    values = scores(torch.randn(HEAD), torch.randn(HEAD))
    by_offset: dict[tuple[int, int], list[float]] = {}
    for (i, (r, c)), (j, (s, d)) in product(enumerate(product(range(SIDE), repeat=2)), repeat=2):
        by_offset.setdefault((s - r, d - c), []).append(float(values[i, j]))
    assert len(by_offset) == (2 * SIDE - 1) ** 2
    assert max(max(v) - min(v) for v in by_offset.values()) < 1e-5
    middle = sorted(v[0] for v in by_offset.values())
    assert min(b - a for a, b in pairwise(middle)) > 1e-7, "and every offset has a score of its own"


def test_columns_turn_the_first_half_of_the_pairs_and_rows_the_second() -> None:
    cosine, sine = rotary_table(SIDE, HEAD).view(2, SIDE, SIDE, HEAD)  # row, column, channel
    for table in (cosine, sine):
        assert torch.equal(table[..., : HEAD // 2], table[..., HEAD // 2 :]), "both channels of a pair"
        assert torch.equal(table[0, :, :4], table[3, :, :4]) and torch.equal(table[:, 0, 4:8], table[:, 3, 4:8])
    frequency = 10000.0 ** (-torch.arange(4) / 4)
    torch.testing.assert_close(sine[1, 3, :4], torch.sin(3 * frequency))
    torch.testing.assert_close(sine[1, 3, 4:8], torch.sin(frequency))


def test_a_pair_is_turned_by_its_angle() -> None:
    x = torch.zeros(1, 1, SIDE * SIDE, HEAD)
    x[..., 1] = 1.0  # paired with channel 9; frequency 1/10 of the columns
    out = rotate(x, rotary_table(SIDE, HEAD))[0, 0].view(SIDE, SIDE, HEAD)
    angle = torch.arange(SIDE).expand(SIDE, SIDE) / 10
    torch.testing.assert_close(out[..., 1], angle.cos())
    torch.testing.assert_close(out[..., 9], angle.sin())
    assert torch.count_nonzero(out) == torch.count_nonzero(out[..., [1, 9]])


def test_tokens_without_a_place_are_not_turned() -> None:
    x = torch.randn(2, 3, 2 + SIDE * SIDE, HEAD)
    out = rotate(x, rotary_table(SIDE, HEAD, prefix=2))
    assert torch.equal(out[:, :, :2], x[:, :, :2])
    assert torch.equal(out[:, :, 2:], rotate(x[:, :, 2:], rotary_table(SIDE, HEAD)))


def test_turning_keeps_lengths() -> None:
    x = torch.randn(2, 3, 32 * 32, HEAD)
    torch.testing.assert_close(rotate(x, rotary_table(32, HEAD)).norm(dim=-1), x.norm(dim=-1))


def test_v_and_the_order_of_the_tokens_are_not_turned() -> None:
    """With q = 0 every token attends to all alike, whatever its place."""
    made, x = attention(), torch.randn(2, SIDE * SIDE, 32, dtype=torch.float64)
    scaled(made, "qkv", slice(0, 32), 0.0)
    torch.testing.assert_close(made(x, rotary_table(SIDE, HEAD)), made(x))


@each_block
def test_only_the_in_context_block_has_tokens_without_a_place(tiny_dit_config: Callable[..., DiTConfig], block: str) -> None:
    dit = DiT(tiny_dit_config("flow", block=block, rope=True))
    prefix = 2 if block == "in-context" else 0
    assert torch.equal(dit.rotary, rotary_table(4, 16, prefix)) and dit.rotary.shape == (2, prefix + 16, 16)
    assert DiT(tiny_dit_config("flow", block=block)).rotary is None


def test_bfloat16_values_are_turned_in_float32() -> None:
    x = torch.randn(2, 3, 32 * 32, HEAD).bfloat16()
    table = rotary_table(32, HEAD)
    out = rotate(x, table)
    assert out.dtype == torch.bfloat16 and torch.equal(out, rotate(x.float(), table).bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_weights_of_half_precision_keep_the_rotary_angles_of_float32(
    tmp_path: Path, build_checkpoint: Callable[..., Checkpoint], dtype: torch.dtype
) -> None:
    original = build_checkpoint("flow", rope=True)
    exact = rotary_table(4, 16)
    save(tmp_path / "a", original)
    for dit in (load(tmp_path / "a", dtype=dtype).dit, original.dit.to(dtype)):
        torch.testing.assert_close(dit.rotary.float(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("width", "heads", "channels"), [(24, 4, 6), (32, 16, 2), (20, 4, 5), (12, 4, 3)])
def test_rope_is_refused_for_heads_that_do_not_hold_whole_pairs(
    tiny_dit_config: Callable[..., DiTConfig], width: int, heads: int, channels: int
) -> None:
    tiny_dit_config("flow", hidden_size=width, num_heads=heads)
    with pytest.raises(ValueError, match=f"{channels} a head is no multiple of 4"):
        tiny_dit_config("flow", hidden_size=width, num_heads=heads, rope=True)


@each_block
def test_a_network_made_on_the_meta_device_has_real_tables_once_loaded(tiny_dit_config: Callable[..., DiTConfig], block: str) -> None:
    config = tiny_dit_config("flow", block=block, rope=True)
    real = DiT(config)
    with torch.device("meta"):
        empty = DiT(config)
    empty.load_state_dict(real.state_dict(), assign=True)
    for name, table in real.named_buffers():
        assert torch.equal(empty.get_buffer(name), table), name
    assert {name for name, _ in empty.named_buffers()} == {"pos_embed", "rotary"}


# --- all together ------------------------------------------------------------------------------------------------------


def inputs(rows: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(rows, 4, 8, 8), torch.arange(rows) / rows, torch.arange(rows) % 5


@each_block
@each_combination
def test_every_combination_runs_in_both_precisions(build_checkpoint: Callable[..., Checkpoint], block: str, parts: dict[str, bool]) -> None:
    dit, given = build_checkpoint("flow", block=block, **parts).dit, inputs()
    full = dit(*given)
    half = dit.bfloat16()(*given)
    for out in (full, half):
        assert out.dtype == torch.float32 and out.shape == (4, 4, 8, 8) and bool(out.isfinite().all())
        assert float(out.std(0).min()) > 1e-4 and float(out.flatten(1).std(1).min()) > 0.05, "rows and pixels differ"
    assert float((half - full).norm() / full.norm()) < 0.05


@each_block
@pytest.mark.parametrize("part", PARTS)
def test_every_part_changes_the_network(build_checkpoint: Callable[..., Checkpoint], block: str, part: str) -> None:
    given = inputs()
    without, with_it = (build_checkpoint("flow", block=block, **{part: on}).dit(*given) for on in (False, True))
    assert float((with_it - without).norm() / without.norm()) > 1e-3


@each_block
@pytest.mark.parametrize("parts", [{}, {"qk_norm": True}, {"rms_norm": True, "rope": True}, EVERY_PART], ids=lambda p: "+".join(p))
def test_a_saved_combination_comes_back_bit_for_bit(
    tmp_path: Path, build_checkpoint: Callable[..., Checkpoint], block: str, parts: dict[str, bool]
) -> None:
    original, given = build_checkpoint("flow", block=block, **parts), inputs()
    identity = save(tmp_path / "a", original)
    loaded = load(tmp_path / "a")
    assert loaded.hash == identity and loaded.config == original.config
    state = loaded.dit.state_dict()
    assert state.keys() == original.dit.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in original.dit.state_dict().items())
    assert torch.equal(loaded.dit(*given), original.dit(*given))


# --- what a checkpoint says of them ------------------------------------------------------------------------------------


def identity_of(config: module.CheckpointConfig, files: dict[str, Any]) -> str:
    return module._identity({**module._describe(config), "files": files})


def test_the_bundled_checkpoint_keeps_the_hash_that_its_pictures_carry() -> None:
    document = json.loads((BUNDLED / "checkpoint.json").read_text())
    config = module._parse(document, BUNDLED)
    again = json.loads(module._canonical(module._describe(config)))
    assert again == {key: document[key] for key in again}
    assert identity_of(config, document["files"]) == document["hash"] == read_config(BUNDLED)[1]


@pytest.mark.parametrize("objective", ["flow", "diffusion"])
def test_nothing_new_is_written_of_a_model_that_is_the_papers(tmp_path: Path, make_checkpoint: Callable[..., Path], objective: str) -> None:
    document = json.loads((make_checkpoint(tmp_path, objective) / "checkpoint.json").read_text())
    assert set(document["architecture"]) == FIRST_ARCHITECTURE and set(document["objective"]) == FIRST_OBJECTIVE
    assert set(document["vae"]) == {field.name for field in fields(VAEConfig)}


@pytest.mark.parametrize(
    "change",
    [*({name: True} for name in PARTS), {"mlp_norm_eps": 1e-5}, *({"block": block} for block in BLOCKS[1:])],
    ids=lambda change: "-".join(map(str, change.values() if "block" in change else change)),
)
def test_a_part_is_written_and_changes_the_hash_though_the_weights_are_the_same(
    tmp_path: Path, build_checkpoint: Callable[..., Checkpoint], change: dict[str, Any]
) -> None:
    """RoPE and an epsilon have no weights that would tell."""
    original = build_checkpoint("flow")
    changed = replace(original.config, architecture=replace(original.config.architecture, **change))
    written = stored(changed.architecture)
    assert written == {**stored(original.config.architecture), **change}
    assert module.from_json(DiTConfig, written) == changed.architecture
    files = {"dit.safetensors": {"sha256": "ab" * 32, "bytes": 1}, "vae.safetensors": {"sha256": "cd" * 32, "bytes": 1}}
    assert identity_of(changed, files) != identity_of(original.config, files)
    save(tmp_path / "a", Checkpoint(changed, DiT(changed.architecture), original.vae))
    assert read_config(tmp_path / "a")[0] == changed
    assert all(json.loads((tmp_path / "a" / "checkpoint.json").read_text())["architecture"][k] == v for k, v in change.items())


@pytest.mark.parametrize("change", [{"prediction": "v"}, {"min_snr_gamma": 5.0}, {"kind": "flow", "flow_time": "uniform"}])
def test_an_objective_that_is_not_the_papers_is_written_and_read_again(change: dict[str, Any]) -> None:
    objective = ObjectiveConfig(**{"kind": "diffusion", **change})
    written = stored(objective)
    assert written.keys() == FIRST_OBJECTIVE | (change.keys() - {"kind"})
    assert module.from_json(ObjectiveConfig, written) == objective


@pytest.mark.parametrize("part", ["qk_norm", "swiglu", "rms_norm"])
def test_weights_of_another_architecture_are_refused(tmp_path: Path, build_checkpoint: Callable[..., Checkpoint], part: str) -> None:
    """A manifest, sound in itself, that claims a part whose weights are not there."""
    block = "in-context" if part == "rms_norm" else "adaln-zero"
    original = build_checkpoint("flow", block=block)
    save(tmp_path / "a", original)
    changed = replace(original.config, architecture=replace(original.config.architecture, **{part: True}))
    module._write_manifest(tmp_path / "a", changed)
    with pytest.raises(module.CheckpointError, match=r"dit\.safetensors"):
        load(tmp_path / "a")


def test_an_unknown_block_in_a_manifest_is_refused_with_those_there_are(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint(tmp_path)
    document = json.loads((folder / "checkpoint.json").read_text())
    document["architecture"]["block"] = "mamba"
    with pytest.raises(module.CheckpointError, match=r"block must be one of adaln-zero, adaln, cross-attention, in-context, got 'mamba'"):
        module._parse(document, folder)


def test_the_four_blocks_are_four_classes() -> None:
    assert len(set(CLASSES.values())) == 4
