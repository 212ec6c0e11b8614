"""Import: what the official code and diffusers wrote computes here what it computes there, and every wrong file is refused by one line."""

import argparse
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel
from safetensors.torch import load_file, save_file

from model.checkpoint import DTYPES, load, save
from model.config import DiTConfig, ObjectiveConfig
from model.convert import Imported, import_checkpoint
from model.dit import DiT
from model.formats import OFFICIAL, their_state
from model.sources import SAFETENSORS, ConversionError
from training.card import model_card

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = GOLDEN / "official-tiny-p2.pt"
State = dict[str, torch.Tensor]


@pytest.fixture
def official() -> State:
    return dict(torch.load(TINY, weights_only=True))


def written(state: State, path: Path) -> str:
    torch.save(state, path)
    return str(path)


def refused(source: str, **options: Any) -> str:
    """The message, which is one line."""
    with pytest.raises(ConversionError) as caught:
        import_checkpoint(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def random_transformer(seed: int = 0, **changes: Any) -> DiTTransformer2DModel:
    """Of diffusers' own making, with the embedders of the first block in all, as every published one has them."""
    fields = {
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "num_layers": 3,
        "sample_size": 8,
        "out_channels": 8,
        "num_embeds_ada_norm": 10,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DiTTransformer2DModel(**{**fields, **changes}).eval()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


def random_vae(seed: int = 0, **changes: Any) -> AutoencoderKL:
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2, "block_out_channels": [8, 16]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(**{**blocks, "norm_num_groups": 4, **changes}).eval()


def rewrite(path: Path, **changes: Any) -> None:
    """Fields of a JSON file; None removes one."""
    document = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in document.items() if value is not None}))


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A folder as diffusers writes it: transformer, VAE, scheduler, and the index by hand, as the published ones have it."""
    folder = tmp_path / "pipeline"
    random_transformer().save_pretrained(folder / "transformer")
    random_vae().save_pretrained(folder / "vae")
    DDIMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")
    names = {str(i): f"name {i}, synonym {i}" for i in range(10)}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", "id2label": names}))
    return folder


def forward(model: Callable[..., Any], seed: int = 0, classes: int = 11) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(6, 4, 8, 8, generator=generator), torch.arange(6) * 2 % classes
    t = torch.tensor([0, 1, 250, 500, 998, 999])
    with torch.no_grad():
        return model(x, t, y)


def theirs(model: DiTTransformer2DModel) -> torch.Tensor:
    return forward(lambda x, t, y: model(x, timestep=t, class_labels=y, return_dict=False)[0])


def assert_close(ours: torch.Tensor, reference: torch.Tensor) -> None:
    assert reference.std() > 0.01
    assert (ours - reference).abs().max() < 1e-4 * reference.abs().max()


# --- official ----------------------------------------------------------------------------------------------------------


def assert_is_golden(imported: Imported) -> None:
    golden = load_file(GOLDEN / "official-tiny-p2.golden.safetensors")
    with torch.no_grad():
        assert_close(imported.checkpoint.dit(golden["x"], golden["t"], golden["y"]), golden["forward"])


def test_an_official_file_computes_the_golden_forward() -> None:
    imported = import_checkpoint(str(TINY), heads=4)
    assert_is_golden(imported)
    assert imported.checkpoint.config.architecture == DiTConfig(8, 2, 4, 64, 2, 4, 10)
    assert imported.checkpoint.config.objective == ObjectiveConfig("diffusion")


def test_the_moving_average_of_a_training_checkpoint_computes_the_golden_forward(tmp_path: Path, official: State) -> None:
    content = {
        "model": {key: value + 1 for key, value in official.items()},
        "ema": official,
        "opt": {},
        "args": argparse.Namespace(lr=1e-4),
    }
    torch.save(content, tmp_path / "0050000.pt")
    assert_is_golden(import_checkpoint(str(tmp_path / "0050000.pt"), heads=4))


def test_safetensors_of_the_official_names_compute_the_golden_forward(tmp_path: Path, official: State) -> None:
    save_file(official, tmp_path / "model.safetensors")
    assert_is_golden(import_checkpoint(str(tmp_path / "model.safetensors"), heads=4))


@pytest.mark.parametrize(
    "config",
    [
        DiTConfig(8, 4, 4, 32, 1, 2, 3, learn_sigma=False),
        DiTConfig(4, 1, 1, 32, 2, 4, 1),
        DiTConfig(6, 2, 3, 60, 3, 5, 7, mlp_ratio=2.5),
        DiTConfig(4, 2, 4, 12, 1, 3, 2, mlp_ratio=1.7),
    ],
    ids=["no covariance", "patch 1", "odd width", "odd ratio"],
)
def test_shapes_tell_the_architecture(tmp_path: Path, config: DiTConfig) -> None:
    found = import_checkpoint(written(their_state(DiT(config), OFFICIAL), tmp_path / "a.pt"), heads=config.num_heads)
    architecture = found.checkpoint.config.architecture
    assert replace(architecture, mlp_ratio=config.mlp_ratio) == config
    assert int(architecture.mlp_ratio * architecture.hidden_size) == int(config.mlp_ratio * config.hidden_size)


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (768, 12)])
def test_a_preset_of_the_paper_tells_its_heads(tmp_path: Path, width: int, heads: int) -> None:
    with torch.device("meta"):
        dit = DiT(DiTConfig(2, 2, 4, width, 12, heads, 2))
    state = {key: torch.zeros_like(value, device="cpu", dtype=torch.float16) for key, value in dit.state_dict().items()}
    found = import_checkpoint(written({"pos_embed": dit.pos_embed, **state}, tmp_path / "a.pt"))
    assert found.checkpoint.config.architecture.num_heads == heads


def test_unknown_heads_are_asked_for() -> None:
    assert refused(str(TINY)).endswith("no preset has depth 2 and width 64, so --heads must tell the number of heads")
    assert "hidden_size 64 is not a multiple of num_heads 5" in refused(str(TINY), heads=5)


def test_an_official_file_is_served_as_the_paper_samples() -> None:
    config = import_checkpoint(str(TINY), heads=4).checkpoint.config
    assert (config.default_sampler, config.default_steps, config.default_guidance_scale, config.default_spacing) == ("ddpm", 250, 4.0, None)
    assert (config.image_size, config.image_channels, config.vae) == (64, 3, None)


def test_without_learned_covariance_the_sampler_is_ddim(tmp_path: Path) -> None:
    dit = DiT(DiTConfig(8, 4, 4, 32, 1, 2, 3, learn_sigma=False))
    found = import_checkpoint(written(their_state(dit, OFFICIAL), tmp_path / "a.pt"), heads=2)
    assert found.checkpoint.config.default_sampler == "ddim"


def test_the_convention_taken_is_said_and_can_be_chosen() -> None:
    plain, asked = import_checkpoint(str(TINY), heads=4), import_checkpoint(str(TINY), heads=4, time_features="diffusers")
    assert [found.checkpoint.config.architecture.frequency_shift for found in (plain, asked)] == [0, 1]
    assert any("divided by 128" in note and "--time-features diffusers" in note for note in plain.notes)
    assert any("divided by 127" in note and "as asked" in note for note in asked.notes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_what_is_stored_in_another_precision_becomes_float32(tmp_path: Path, official: State, dtype: torch.dtype) -> None:
    found = import_checkpoint(written({key: value.to(dtype) for key, value in official.items()}, tmp_path / "a.pt"), heads=4)
    weight = found.checkpoint.dit.x_embedder.proj.weight
    assert weight.dtype == torch.float32 and torch.equal(weight, official["x_embedder.proj.weight"].to(dtype).float())


# --- official, and wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("pos_embed"), "lacks key 'pos_embed'"),
        (lambda s: (s.pop("final_layer.linear.weight"), s.pop("blocks.1.mlp.fc1.bias")), "lacks key 'blocks.1.mlp.fc1.bias'"),
        (lambda s: [s.pop(key) for key in list(s) if key.startswith("blocks.0")], "lacks key 'blocks.0.attn.qkv.weight'"),
        (lambda s: s.update(zebra=torch.ones(1), ant=torch.ones(1)), "has an unknown key 'ant'"),
        (lambda s: s.update({"blocks.1.cross_attn.q.weight": torch.ones(1)}), "has an unknown key 'blocks.1.cross_attn.q.weight'"),
        (lambda s: s.update({f"blocks.{'9' * 5000}.x": torch.ones(1)}), "has an unknown key 'blocks.999"),
        (lambda s: s.update({"blocks.9999.attn.qkv.weight": torch.ones(1)}), "lacks key 'blocks.2.attn.qkv.weight'"),
        (
            lambda s: s.update({"blocks.1.attn.proj.weight": torch.ones(64, 32)}),
            "blocks.1.attn.proj.weight has size (64, 32), not (64, 64)",
        ),
        (lambda s: s.update({"pos_embed": torch.ones(1, 15, 64)}), "pos_embed has size (1, 15, 64), not (1, 9, 64)"),
        (lambda s: s.update({"final_layer.linear.bias": torch.ones(16)}), "final_layer.linear.bias has size (16,), not (32,)"),
        (lambda s: s.update({"x_embedder.proj.weight": torch.ones(64, 16)}), "x_embedder.proj.weight has size (64, 16), where 4 numbers"),
        (lambda s: s.update({"x_embedder.proj.weight": torch.ones(64, 4, 0, 0)}), "x_embedder.proj.weight has size (64, 4, 0, 0), where"),
        (lambda s: s["pos_embed"].add_(0.01), "pos_embed is not the 2-D sine-cosine table"),
        (lambda s: s["pos_embed"].fill_(math.nan), "pos_embed is not the 2-D sine-cosine table"),
        (lambda s: s.update({"t_embedder.mlp.0.weight": torch.ones(64, 1).expand(64, 256)}), "'t_embedder.mlp.0.weight' claims"),
        (lambda s: s.update(a=torch.ones(64, 1, dtype=torch.int32)), "'a' is of type int32"),
    ],
)
def test_a_wrong_official_file_is_refused_by_its_first_wrong_key(
    tmp_path: Path, official: State, change: Callable[[State], Any], message: str
) -> None:
    change(official)
    refusal = refused(written(official, tmp_path / "wrong.pt"), heads=4)
    assert message in refusal and refusal.startswith(str(tmp_path / "wrong.pt"))


def test_blocks_that_share_their_bytes_are_refused(tmp_path: Path, official: State) -> None:
    """A small file of a thousand blocks would be a large model."""
    names = [key.removeprefix("blocks.0.") for key in official if key.startswith("blocks.0.")]
    official |= {f"blocks.{i}.{name}": official[f"blocks.0.{name}"] for i in range(50) for name in names}
    assert "claim" in refused(written(official, tmp_path / "a.pt"), heads=4)


# --- diffusers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_eps", [1e-5, 1e-6, 0.1])
@pytest.mark.parametrize("class_name", ["DiTTransformer2DModel", "Transformer2DModel"])
def test_our_forward_is_that_of_diffusers(tmp_path: Path, norm_eps: float, class_name: str) -> None:
    """Whether its second norm's eps is written or left to the default; under both class names."""
    model = random_transformer(**({} if norm_eps == 1e-5 else {"norm_eps": norm_eps}))
    model.save_pretrained(tmp_path / "transformer")
    rewrite(tmp_path / "transformer" / "config.json", _class_name=class_name, **({"norm_eps": None} if norm_eps == 1e-5 else {}))
    found = import_checkpoint(str(tmp_path / "transformer"))
    assert_close(forward(found.checkpoint.dit), theirs(model))
    assert found.checkpoint.config.architecture.mlp_norm_eps == norm_eps


def test_the_eps_and_the_time_features_matter(tmp_path: Path) -> None:
    """Were either convention ignored, the comparison above would notice."""
    model = random_transformer(norm_eps=0.1)
    model.save_pretrained(tmp_path)
    reference = theirs(model)
    for change in ({"mlp_norm_eps": 1e-5}, {"frequency_shift": 0}):
        found = import_checkpoint(str(tmp_path)).checkpoint
        other = DiT(replace(found.config.architecture, **change))
        other.load_state_dict(found.dit.state_dict())
        assert (forward(other) - reference).abs().max() > 1e-2 * reference.abs().max()


def test_the_published_configuration_is_read(tmp_path: Path) -> None:
    """The fields of facebook/DiT-XL-2-256, written by diffusers 0.12, with other sizes."""
    model = random_transformer()
    model.save_pretrained(tmp_path)
    rewrite(
        tmp_path / "config.json", norm_eps=None, _class_name="Transformer2DModel", only_cross_attention=False, use_linear_projection=False
    )
    document = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**document, "cross_attention_dim": None, "num_vector_embeds": None}))
    assert_close(forward(import_checkpoint(str(tmp_path)).checkpoint.dit), theirs(model))


@pytest.mark.parametrize("form", ["bin", "shards"])
def test_older_and_larger_folders_are_read_too(tmp_path: Path, form: str) -> None:
    model = random_transformer()
    if form == "bin":
        model.save_pretrained(tmp_path, safe_serialization=False)
    else:
        model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert not (tmp_path / SAFETENSORS).exists()
    found = import_checkpoint(str(tmp_path))
    assert_close(forward(found.checkpoint.dit), theirs(model))
    assert len(found.checkpoint.config.provenance["imported"]["sha256"]) == (1 if form == "bin" else 10)


def test_embedders_that_share_their_bytes_are_read(tmp_path: Path) -> None:
    """A converted state dict, saved before the copies were made."""
    model = random_transformer()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / SAFETENSORS)
    first = {key: value for key, value in state.items() if key.startswith("transformer_blocks.0.norm1.emb.")}
    state |= {key.replace(".0.", f".{i}.", 1): value for key, value in first.items() for i in range(3)}
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    (tmp_path / SAFETENSORS).unlink()
    assert_close(forward(import_checkpoint(str(tmp_path)).checkpoint.dit), theirs(model))


def test_a_pipeline_folder_brings_labels_process_and_vae(pipeline: Path) -> None:
    config = import_checkpoint(str(pipeline)).checkpoint.config
    assert config.labels[3] == ("name 3", "synonym 3") and len(config.labels) == 10
    assert config.objective == ObjectiveConfig("diffusion")
    assert (config.default_sampler, config.default_steps, config.default_guidance_scale, config.default_spacing) == (
        "ddim",
        50,
        4.0,
        "leading",
    )
    assert config.vae and (config.image_size, config.image_channels) == (16, 3)
    assert config.vae.latent_std == (1 / 0.18215,) * 4 and config.vae.latent_mean == (0.0,) * 4


def test_the_process_is_the_scheduler_folders(pipeline: Path) -> None:
    changes = {
        "num_train_timesteps": 40,
        "beta_start": 1e-3,
        "beta_end": 0.1,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    }
    rewrite(pipeline / "scheduler" / "scheduler_config.json", **changes)
    config = import_checkpoint(str(pipeline)).checkpoint.config
    assert config.objective == ObjectiveConfig("diffusion", num_timesteps=40, beta_start=1e-3, beta_end=0.1, prediction="v")
    assert (config.default_steps, config.default_spacing) == (40, "trailing")


def test_an_imported_checkpoint_has_a_card_and_loads(pipeline: Path, tmp_path: Path) -> None:
    imported = import_checkpoint(str(pipeline))
    save(tmp_path / "out", imported.checkpoint, card=model_card(imported.checkpoint.config, {}))
    found = load(tmp_path / "out")
    assert torch.equal(forward(found.dit), forward(imported.checkpoint.dit))
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Imported from `{pipeline}` (diffusers format)" in card and "divided by 127" in card and card.count("sha256") == 2


def test_the_dit_is_stored_in_the_type_asked_for_and_the_vae_in_float32(pipeline: Path, tmp_path: Path) -> None:
    save(tmp_path / "out", import_checkpoint(str(pipeline)).checkpoint, dtype=DTYPES["bfloat16"])
    found = load(tmp_path / "out")
    assert {p.dtype for p in found.dit.parameters()} == {torch.bfloat16} and {p.dtype for p in found.vae.parameters()} == {torch.float32}


# --- diffusers, and wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("activation_fn", "gelu"),
        ("activation_fn", "geglu"),
        ("attention_bias", False),
        ("norm_type", "ada_norm"),
        ("norm_elementwise_affine", True),
        ("only_cross_attention", True),
        ("interpolation_scale", 2.0),
        ("cross_attention_dim", 768),
        ("caption_channels", 4096),
        ("num_vector_embeds", 100),
        ("qk_norm", "rms_norm"),
        ("num_layers", 4),
        ("num_layers", 10**9),
        ("patch_size", 4),
        ("in_channels", 8),
        ("out_channels", 4),
        ("num_embeds_ada_norm", 1000),
        ("attention_head_dim", 16),
        ("num_attention_heads", "4"),
        ("norm_eps", 0.0),
        ("norm_eps", "small"),
        ("sample_size", [8, 8]),
    ],
    ids=str,
)
def test_a_configuration_that_we_cannot_hold_is_refused_by_its_field(pipeline: Path, field: str, value: Any) -> None:
    rewrite(pipeline / "transformer" / "config.json", **{field: value})
    assert refused(str(pipeline)).startswith(f"{pipeline / 'transformer' / 'config.json'}: {field} ")


def test_latents_beyond_reason_are_refused_before_memory_is_spent(pipeline: Path) -> None:
    rewrite(pipeline / "transformer" / "config.json", sample_size=2**30)
    assert "more than 128 a side" in refused(str(pipeline))


def test_heads_may_be_told_for_a_folder_too(pipeline: Path) -> None:
    assert import_checkpoint(str(pipeline), heads=2).checkpoint.config.architecture.num_heads == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beta_schedule", "scaled_linear"),
        ("rescale_betas_zero_snr", True),
        ("trained_betas", [0.1, 0.2]),
        ("prediction_type", "sample"),
        ("num_train_timesteps", 0),
        ("beta_start", "low"),
        ("_class_name", "FlowMatchEulerDiscreteScheduler"),
        ("use_flow_sigmas", True),
    ],
)
def test_a_process_that_we_cannot_hold_is_refused_by_its_field(pipeline: Path, field: str, value: Any) -> None:
    rewrite(pipeline / "scheduler" / "scheduler_config.json", **{field: value})
    assert refused(str(pipeline)).startswith(f"{pipeline / 'scheduler' / 'scheduler_config.json'}: {field} ")


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight", lambda value: value + 1e-7),
        ("transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias", lambda value: value.half()),
    ],
)
def test_copies_that_disagree_are_refused_by_the_first_that_differs(pipeline: Path, key: str, change: Callable[..., Any]) -> None:
    path = pipeline / "transformer" / SAFETENSORS
    state = load_file(path)
    later = key.replace(".1.", ".2.", 1)
    save_file({**state, later: state[later] + 1, key: change(state[key])}, path)
    assert f"{key} differs from {key[:18]}.0." in refused(str(pipeline))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("transformer_blocks.1.attn1.to_k.bias"), "lacks key 'transformer_blocks.1.attn1.to_k.bias'"),
        (lambda s: s.update({"proj_out_3.weight": torch.ones(1)}), "has an unknown key 'proj_out_3.weight'"),
        (
            lambda s: s.update({"transformer_blocks.2.attn1.to_v.weight": torch.ones(32, 16)}),
            "transformer_blocks.2.attn1.to_v.weight has size (32, 16), not (32, 32)",
        ),
    ],
)
def test_wrong_weights_in_a_folder_are_refused_by_diffusers_own_names(pipeline: Path, change: Callable[[State], Any], message: str) -> None:
    path = pipeline / "transformer" / SAFETENSORS
    state = load_file(path)
    change(state)
    save_file(state, path)
    assert refused(str(pipeline)) == f"{path}: {message}"


def test_other_folders_are_refused(tmp_path: Path, pipeline: Path, make_checkpoint: Callable[..., Path]) -> None:
    assert "is a checkpoint of dit already" in refused(str(make_checkpoint(tmp_path)))
    (tmp_path / "empty").mkdir()
    assert "neither model_index.json nor config.json" in refused(str(tmp_path / "empty"))
    assert "'AutoencoderKL', neither DiTTransformer2DModel nor Transformer2DModel" in refused(str(pipeline / "vae"))
    (pipeline / "transformer" / "config.json").write_text("[1]")
    assert "holds no JSON object" in refused(str(pipeline))


# --- labels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["id2label.json", "model_index.json", "list.json", "lines.txt"])
def test_labels_come_from_a_file(tmp_path: Path, form: str) -> None:
    names = [f"name {i}, synonym {i}" for i in range(10)]
    mapping = {str(i): name for i, name in enumerate(names)}
    content = {"id2label.json": mapping, "model_index.json": {"id2label": mapping}, "list.json": names}.get(form)
    (tmp_path / form).write_text(json.dumps(content) if content else "\n".join(names) + "\n")
    labels = import_checkpoint(str(TINY), heads=4, labels=tmp_path / form).checkpoint.labels
    assert labels == tuple((f"name {i}", f"synonym {i}") for i in range(10))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('["a", "b"]', "names 2 classes, but the model has 10"),
        (json.dumps({str(i): "x" for i in range(11)}), "names 11 classes, but the model has 10"),
        ('{"cat": 0}', "'cat': 0 is no index and name of a class"),
        ('{"-1": "x"}', "'-1': 'x' is no index"),
        ("7", "an object of index and name, or a list"),
        ("{", "is no JSON"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "labels.json").write_text(content)
    refusal = refused(str(TINY), heads=4, labels=tmp_path / "labels.json")
    assert message in refusal and str(tmp_path / "labels.json") in refusal


def test_classes_without_a_name_are_numbered(pipeline: Path) -> None:
    rewrite(pipeline / "model_index.json", id2label={"0": " tench ,, Tinca tinca,tench", "4": " , "})
    labels = import_checkpoint(str(pipeline)).checkpoint.labels
    assert labels[0] == ("tench", "Tinca tinca") and labels[4] == ("class 4",) and labels[9] == ("class 9",)


def test_rows_after_the_named_classes_are_padding_only_if_they_are_all_the_same(pipeline: Path) -> None:
    rewrite(pipeline / "model_index.json", id2label={str(i): f"name {i}" for i in range(4)})
    assert import_checkpoint(str(pipeline)).checkpoint.config.architecture.num_classes == 10
    path = pipeline / "transformer" / SAFETENSORS
    state = load_file(path)
    for key in [key for key in state if "embedding_table" in key]:
        state[key][4:] = state[key][10]
    save_file(state, path)
    found = import_checkpoint(str(pipeline)).checkpoint
    assert found.config.architecture.num_classes == 4 and found.dit.y_embedder.embedding_table.weight.shape == (5, 32)


# --- VAE ---------------------------------------------------------------------------------------------------------------


def assert_decodes_alike(vae: Any, reference: AutoencoderKL, latents: torch.Tensor, raw: torch.Tensor) -> None:
    with torch.no_grad():
        assert_close(vae.decode(latents), reference.decode(raw, return_dict=False)[0])


@pytest.mark.parametrize("where", ["a VAE's folder", "a pipeline's folder"])
def test_a_vae_is_given_beside_an_official_file(pipeline: Path, where: str) -> None:
    folder = pipeline if where == "a pipeline's folder" else pipeline / "vae"
    found = import_checkpoint(str(TINY), heads=4, vae=str(folder)).checkpoint
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert_decodes_alike(found.vae, random_vae(), latents, latents / 0.18215)
    assert found.config.image_size == 16


def test_a_vae_given_goes_before_the_folders_own(pipeline: Path, tmp_path: Path) -> None:
    random_vae(scaling_factor=0.5, in_channels=1, out_channels=1).save_pretrained(tmp_path / "other")
    config = import_checkpoint(str(pipeline), vae=str(tmp_path / "other")).checkpoint.config
    assert config.vae and config.vae.latent_std == (2.0,) * 4 and config.image_channels == 1


def test_statistics_per_channel_and_a_shift_are_held(tmp_path: Path) -> None:
    """normalised = (raw − mean)·scaling/std."""
    reference = random_vae(scaling_factor=0.5, latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])
    reference.save_pretrained(tmp_path / "a")
    found = import_checkpoint(str(TINY), heads=4, vae=str(tmp_path / "a")).checkpoint.vae
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    raw = latents * torch.tensor([1.0, 2, 3, 4]).view(1, 4, 1, 1) / 0.5 + torch.tensor([0.1, 0.2, 0.3, 0.4]).view(1, 4, 1, 1)
    assert_decodes_alike(found, reference, latents, raw)
    random_vae(scaling_factor=0.5, shift_factor=0.25).save_pretrained(tmp_path / "b")
    shifted = import_checkpoint(str(TINY), heads=4, vae=str(tmp_path / "b")).checkpoint.vae
    assert_decodes_alike(shifted, random_vae(), latents, latents / 0.5 + 0.25)


def test_attention_under_its_old_names_is_read(pipeline: Path) -> None:
    path, old = pipeline / "vae" / SAFETENSORS, {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(path)
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): value for key, value in state.items()}
    assert sum("proj_attn" in key for key in state) == 4
    save_file(state, path)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert_decodes_alike(import_checkpoint(str(pipeline)).checkpoint.vae, random_vae(), latents, latents / 0.18215)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("act_fn", "relu"),
        ("use_quant_conv", False),
        ("use_post_quant_conv", False),
        ("down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
        ("up_block_types", ["UpDecoderBlock2D"]),
        ("block_out_channels", []),
        ("block_out_channels", [10**12]),
        ("layers_per_block", 10**9),
        ("latent_channels", 16),
        ("out_channels", 1),
        ("scaling_factor", 0),
        ("latents_std", "one"),
        ("mid_block_add_attention", "yes"),
        ("tiling", True),
    ],
    ids=str,
)
def test_a_vae_that_we_cannot_hold_is_refused_by_its_field(pipeline: Path, field: str, value: Any) -> None:
    rewrite(pipeline / "vae" / "config.json", **{field: value})
    assert refused(str(pipeline)).startswith(f"{pipeline / 'vae' / 'config.json'}: {field} ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("quant_conv.bias"), "lacks key 'quant_conv.bias'"),
        (lambda s: s.update({"loss.logvar": torch.ones(1)}), "has an unknown key 'loss.logvar'"),
        (lambda s: s.update({"decoder.conv_in.bias": torch.ones(3)}), "decoder.conv_in.bias has size (3,), not (16,)"),
    ],
)
def test_a_wrong_vae_is_refused_by_its_first_wrong_key(pipeline: Path, change: Callable[[State], Any], message: str) -> None:
    path = pipeline / "vae" / SAFETENSORS
    state = load_file(path)
    change(state)
    save_file(state, path)
    assert refused(str(pipeline)) == f"{path}: {message}"


def test_a_folder_without_weights_is_refused(pipeline: Path) -> None:
    (pipeline / "vae" / SAFETENSORS).unlink()
    assert f"{pipeline / 'vae'} holds no weights" in refused(str(pipeline))
    shutil.rmtree(pipeline / "vae")
    assert import_checkpoint(str(pipeline)).checkpoint.vae is None


def test_settings_of_sampling_that_are_not_ours_are_said(pipeline: Path) -> None:
    assert not any(note.startswith("warning") for note in import_checkpoint(str(pipeline)).notes)
    config = pipeline / "scheduler" / "scheduler_config.json"
    rewrite(config, clip_sample=True, set_alpha_to_one=False, steps_offset=1, thresholding=True, timestep_spacing="linspace")
    warnings = "\n".join(note for note in import_checkpoint(str(pipeline)).notes if note.startswith("warning"))
    for said in (
        "clip_sample = True",
        "set_alpha_to_one = False",
        "steps_offset = 1",
        "thresholding = True",
        "timestep_spacing = 'linspace'",
    ):
        assert said in warnings


def test_process_and_sampling_taken_are_said(pipeline: Path) -> None:
    notes = "\n".join(import_checkpoint(str(pipeline)).notes)
    assert "1000 steps, betas 0.0001 to 0.02, predicts noise" in notes and "ddim, 50 steps, spacing leading" in notes
    notes = "\n".join(import_checkpoint(str(TINY), heads=4).notes)
    assert "ddpm, 250 steps, spacing paper" in notes and "the first three" in notes


def test_another_number_of_heads_than_is_known_is_warned_of(pipeline: Path) -> None:
    assert any("2 heads as asked" in note and "says 4" in note for note in import_checkpoint(str(pipeline), heads=2).notes)
    assert not any("as asked, but" in note for note in import_checkpoint(str(pipeline), heads=4).notes)
