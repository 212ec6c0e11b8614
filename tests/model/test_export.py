"""Export: DiTPipeline on our folder makes our pictures, everything comes back bit for bit, and what a format cannot hold is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file

from model.checkpoint import Checkpoint, load, save
from model.config import ObjectiveConfig, VAEConfig
from model.convert import import_checkpoint
from model.diffusers_folder import scaling_factor
from model.export import export_diffusers, export_official
from model.samplers import build_table
from model.sampling import sample_latents
from model.sources import ConversionError
from model.vae import VAE

Build = Callable[..., Checkpoint]
PAPERS = {"latent_mean": (0.0,) * 4, "latent_std": (1 / 0.18215,) * 4}
PLAIN = {"latent_mean": (0.0,) * 4, "latent_std": (2.5,) * 4}  # what one scaling factor says


@pytest.fixture
def build(build_checkpoint: Build) -> Build:
    """`build(vae={…}, objective=…, **dit)`: a diffusion with random weights, in the conventions of DiTPipeline unless told."""

    def make(vae: dict[str, Any] | None = None, objective: dict[str, Any] | None = None, channels: int = 1, **dit: Any) -> Checkpoint:
        made = build_checkpoint("diffusion", image_channels=channels, **{"frequency_shift": 1, "mlp_norm_eps": 1e-5, **dit})
        if vae and made.vae:
            made.vae = _with_statistics(made.vae, vae)
        made.config = replace(
            made.config, objective=ObjectiveConfig("diffusion", **(objective or {})), vae=made.vae.config if made.vae else None
        )
        return made

    return make


def _with_statistics(vae: VAE, changes: dict[str, Any]) -> VAE:
    other = VAE(replace(vae.config, **changes)).eval()
    other.load_state_dict(vae.state_dict(), strict=True)
    return other


def without_vae(checkpoint: Checkpoint) -> Checkpoint:
    return Checkpoint(replace(checkpoint.config, vae=None), checkpoint.dit, None)


def assert_same_bits(ours: torch.nn.Module, back: torch.nn.Module) -> None:
    mine, other = ours.state_dict(), back.state_dict()
    assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)


# --- DiTPipeline -------------------------------------------------------------------------------------------------------


def pipeline_pictures(folder: Path, classes: list[int], guidance_scale: float, steps: int) -> torch.Tensor:
    pipeline = DiTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    seeded = torch.Generator().manual_seed(5)
    made = pipeline(class_labels=classes, guidance_scale=guidance_scale, num_inference_steps=steps, generator=seeded, output_type="pt")
    return made.images


def our_pictures(checkpoint: Checkpoint, classes: list[int], guidance_scale: float, steps: int) -> torch.Tensor:
    """From the latents that the pipeline's generator gives."""
    config = checkpoint.config.architecture
    latents = torch.randn(
        len(classes), config.in_channels, config.input_size, config.input_size, generator=torch.Generator().manual_seed(5)
    )
    table = build_table(checkpoint.config.objective, "ddim", steps, spacing="leading", learn_sigma=config.learn_sigma)
    seeds = torch.zeros(len(classes), dtype=torch.int64)
    final = sample_latents(
        checkpoint.dit, latents, torch.tensor(classes), config.null_class, table, guidance_scale=guidance_scale, seeds=seeds
    )
    assert checkpoint.vae
    with torch.no_grad():
        return (checkpoint.vae.decode(final) / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "RGB"])
@pytest.mark.parametrize("statistics", [None, PLAIN], ids=["folded", "one factor"])
def test_dit_pipeline_makes_our_pictures(build: Build, tmp_path: Path, channels: int, statistics: dict[str, Any] | None) -> None:
    """Guidance of all channels, the null class, DDIM with leading times, the VAE's scale: within one grey level."""
    checkpoint = build(statistics, channels=channels)
    export_diffusers(checkpoint, tmp_path / "out")
    theirs = pipeline_pictures(tmp_path / "out", [0, 1, 2, 3, 3], 4.0, 8)
    ours = our_pictures(checkpoint, [0, 1, 2, 3, 3], 4.0, 8)
    assert theirs.shape == (5, channels, 16, 16) and theirs.std() > 0.1
    assert (theirs[0] - theirs[1]).abs().max() > 0.1 and ((theirs > 0) & (theirs < 1)).float().mean() > 0.5
    assert (ours - theirs).abs().max() < 1 / 255


@pytest.mark.parametrize(
    ("objective", "dit"),
    [
        ({}, {"learn_sigma": False}),
        ({"prediction": "v"}, {"learn_sigma": False}),
        ({"num_timesteps": 100, "beta_end": 0.1}, {}),
        ({}, {"mlp_norm_eps": 1e-6}),
    ],
    ids=["no covariance", "v-prediction", "another process", "another eps"],
)
def test_dit_pipeline_makes_our_pictures_in_other_settings(build: Build, tmp_path: Path, objective: dict, dit: dict) -> None:
    checkpoint = build(PLAIN, objective, **dit)
    export_diffusers(checkpoint, tmp_path / "out")
    theirs = pipeline_pictures(tmp_path / "out", [0, 2, 3], 4.0, 8)
    assert theirs.std() > 0.05
    assert (our_pictures(checkpoint, [0, 2, 3], 4.0, 8) - theirs).abs().max() < 1 / 255


def test_dit_pipeline_knows_the_classes_by_every_name(build: Build, tmp_path: Path) -> None:
    export_diffusers(build(), tmp_path / "out")
    pipeline = DiTPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.get_label_ids(["cat", "house cat", "lorry"]) == [0, 0, 3]


def test_the_null_class_is_where_dit_pipeline_looks_for_it(build: Build, tmp_path: Path) -> None:
    checkpoint = build()
    notes = export_diffusers(checkpoint, tmp_path / "out")
    table = DiTTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer").transformer_blocks[1].norm1.emb.class_embedder
    ours = checkpoint.dit.y_embedder.embedding_table.weight
    assert table.embedding_table.weight.shape == (1001, 32) and torch.equal(table.embedding_table.weight[:4], ours[:4])
    assert bool((table.embedding_table.weight[4:] == ours[4]).all())
    assert any("from row 4 to 1000" in note for note in notes)


def test_a_folder_without_vae_takes_one_from_elsewhere(build: Build, tmp_path: Path) -> None:
    checkpoint = build(PLAIN)
    export_diffusers(checkpoint, tmp_path / "whole")
    notes = export_diffusers(without_vae(checkpoint), tmp_path / "out")
    assert any("no VAE" in note for note in notes) and not (tmp_path / "out" / "vae").exists()
    pipeline = DiTPipeline.from_pretrained(tmp_path / "out", vae=AutoencoderKL.from_pretrained(tmp_path / "whole" / "vae"))
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(class_labels=[1], num_inference_steps=1, output_type="np").images.shape == (1, 16, 16, 1)


# --- there and back ----------------------------------------------------------------------------------------------------


def test_official_and_back_is_bit_exact(build: Build, tmp_path: Path) -> None:
    checkpoint = build(frequency_shift=0, mlp_norm_eps=1e-6, mlp_ratio=3.0)
    export_official(checkpoint, tmp_path / "out.pt")
    back = import_checkpoint(str(tmp_path / "out.pt"), heads=2).checkpoint
    assert_same_bits(checkpoint.dit, back.dit)
    assert back.config.architecture == checkpoint.config.architecture


def test_an_official_file_holds_the_official_keys_and_no_more_bytes_than_they_need(tmp_path: Path) -> None:
    golden = Path(__file__).parents[1] / "golden" / "official-tiny-p2.pt"
    save(tmp_path / "a", import_checkpoint(str(golden), heads=4).checkpoint)
    export_official(load(tmp_path / "a"), tmp_path / "out.pt")
    ours, theirs = (torch.load(path, weights_only=True) for path in (tmp_path / "out.pt", golden))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs if key != "pos_embed")
    assert (ours["pos_embed"] - theirs["pos_embed"]).abs().max() < 1e-6
    assert (tmp_path / "out.pt").stat().st_size < 1.05 * golden.stat().st_size


@pytest.mark.parametrize(
    "objective", [{}, {"prediction": "v", "num_timesteps": 100, "beta_start": 1e-3, "beta_end": 0.1}], ids=["paper", "v"]
)
def test_diffusers_and_back_is_bit_exact(build: Build, tmp_path: Path, objective: dict[str, Any]) -> None:
    checkpoint = build(PLAIN, objective, mlp_norm_eps=3e-6)
    export_diffusers(checkpoint, tmp_path / "out")
    back = import_checkpoint(str(tmp_path / "out")).checkpoint
    assert_same_bits(checkpoint.dit, back.dit)
    assert checkpoint.vae and back.vae
    assert_same_bits(checkpoint.vae, back.vae)
    for name in ("architecture", "objective", "vae", "labels", "image_size", "image_channels"):
        assert getattr(back.config, name) == getattr(checkpoint.config, name), name


def test_a_thousand_classes_come_back_too(build_checkpoint: Build, tmp_path: Path) -> None:
    small = build_checkpoint("diffusion", frequency_shift=1)
    dit = type(small.dit)(replace(small.config.architecture, num_classes=1000, depth=1)).eval()
    labels = tuple((f"name {i}", f"synonym {i}") for i in range(1000))
    config = replace(small.config, architecture=dit.config, labels=labels, vae=None)
    export_diffusers(Checkpoint(config, dit, None), tmp_path / "out")
    back = import_checkpoint(str(tmp_path / "out")).checkpoint
    assert_same_bits(dit, back.dit)
    assert (back.config.architecture, back.config.labels) == (config.architecture, labels)


def test_weights_keep_the_type_they_are_stored_in(build: Build, tmp_path: Path) -> None:
    save(tmp_path / "half", build(), dtype=torch.bfloat16)
    checkpoint = load(tmp_path / "half")
    export_official(checkpoint, tmp_path / "out.pt")
    export_diffusers(checkpoint, tmp_path / "out")
    state = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    for source in ("out.pt", "out"):
        back = import_checkpoint(str(tmp_path / source), heads=2).checkpoint
        assert_same_bits(checkpoint.dit, back.dit.to(torch.bfloat16))


def test_folded_statistics_decode_and_encode_alike(build: Build, tmp_path: Path) -> None:
    checkpoint = build()
    export_diffusers(checkpoint, tmp_path / "out")
    ours, back = checkpoint.vae, import_checkpoint(str(tmp_path / "out")).checkpoint.vae
    assert ours and back and ours.config.latent_mean[0] != 0 and set(back.config.latent_std) == {1.0}
    generator = torch.Generator().manual_seed(0)
    latents, images = torch.randn(4, 4, 8, 8, generator=generator), torch.rand(4, 1, 16, 16, generator=generator) * 2 - 1
    with torch.no_grad():
        assert (ours.decode(latents) - back.decode(latents)).abs().max() < 1e-5
        for mine, other in zip(ours.moments(images), back.moments(images), strict=True):
            assert (mine - other).abs().max() < 1e-5 and mine.std() > 1e-3


@pytest.mark.parametrize("factor", [0.18215, 0.13025, 1.0, 0.5, 3.7, 1e-3])
def test_a_scaling_factor_survives_the_way_here_and_back(factor: float) -> None:
    assert scaling_factor(1 / factor) == factor


def test_latents_without_statistics_have_the_factor_one(build: Build, tmp_path: Path) -> None:
    checkpoint = build({"latent_mean": (), "latent_std": ()})
    export_diffusers(checkpoint, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "vae" / "config.json").read_text())["scaling_factor"] == 1.0


# --- refused, warned of, and written whole -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dit", "message"),
    [
        ({"block": "adaln"}, "block = 'adaln', only 'adaln-zero'"),
        ({"block": "in-context"}, "block = 'in-context'"),
        ({"block": "cross-attention"}, "block = 'cross-attention'"),
        ({"qk_norm": True}, "qk_norm = True"),
        ({"rms_norm": True}, "rms_norm = True"),
        ({"swiglu": True}, "swiglu = True"),
        ({"rope": True}, "rope = True"),
        ({"norm_eps": 1e-5}, "norm_eps = 1e-05, only 1e-06"),
        ({"time_factor": 2.0}, "time_factor = 2.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("export", [export_official, export_diffusers])
def test_what_neither_format_holds_is_refused(
    build: Build, tmp_path: Path, export: Callable[..., Any], dit: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConversionError) as caught:
        export(build(**dit), tmp_path / "out")
    assert f"neither format holds {message}" in str(caught.value) and "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("export", [export_official, export_diffusers])
def test_a_flow_is_refused(build_checkpoint: Build, tmp_path: Path, export: Callable[..., Any]) -> None:
    with pytest.raises(ConversionError, match="neither format holds the objective 'flow'"):
        export(build_checkpoint("flow"), tmp_path / "out")


def test_each_format_refuses_what_the_other_could_hold(build: Build, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="the official code predicts noise, this model v"):
        export_official(build(objective={"prediction": "v"}, learn_sigma=False), tmp_path / "out")
    with pytest.raises(ConversionError, match="mlp_ratio is 2"):
        export_diffusers(build(mlp_ratio=2.0), tmp_path / "out")
    many = build()
    dit = type(many.dit)(replace(many.config.architecture, num_classes=1001))
    config = replace(many.config, architecture=dit.config, labels=tuple((str(i),) for i in range(1001)))
    with pytest.raises(ConversionError, match="it cannot have 1001 classes"):
        export_diffusers(Checkpoint(config, dit, many.vae), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_conventions_that_the_format_does_not_share_are_warned_of(build: Build, tmp_path: Path) -> None:
    official = export_official(build(PAPERS, objective={"beta_end": 0.1}), tmp_path / "a.pt")
    assert sum(note.startswith("warning:") for note in official) == 3
    assert any("divided by 127" in note for note in official) and any("eps 1e-05" in note for note in official)
    assert not any(
        note.startswith("warning:") for note in export_official(build(PAPERS, frequency_shift=0, mlp_norm_eps=1e-6), tmp_path / "b.pt")
    )
    assert not any(note.startswith("warning:") for note in export_diffusers(build(), tmp_path / "c"))
    assert any("divided by 128" in note for note in export_diffusers(build(frequency_shift=0), tmp_path / "d"))


def test_a_name_with_a_comma_is_warned_of(build: Build, tmp_path: Path) -> None:
    checkpoint = build()
    checkpoint.config = replace(checkpoint.config, labels=(("crane, the bird",), *checkpoint.config.labels[1:]))
    assert any("'crane, the bird'" in note for note in export_diffusers(checkpoint, tmp_path / "out"))


@pytest.mark.parametrize("export", [export_official, export_diffusers])
def test_an_export_is_never_written_over_anything(build: Build, tmp_path: Path, export: Callable[..., Any]) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(FileExistsError, match="never written over"):
        export(build(frequency_shift=0), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "precious"


def test_an_interrupted_export_leaves_nothing_behind(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("model.export.scheduler_fields", fail)
    with pytest.raises(KeyboardInterrupt):
        export_diffusers(build(), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_the_vae_given_away_is_not_changed(build: Build, tmp_path: Path) -> None:
    checkpoint = build()
    assert checkpoint.vae
    before = {key: value.clone() for key, value in checkpoint.vae.state_dict().items()}
    export_diffusers(checkpoint, tmp_path / "out")
    assert all(torch.equal(value, before[key]) for key, value in checkpoint.vae.state_dict().items())
    assert isinstance(checkpoint.config.vae, VAEConfig) and checkpoint.vae.autoencoder.config.scaling_factor == 1.0


def test_what_the_official_code_must_be_told_is_warned_of(build: Build, tmp_path: Path) -> None:
    other = build(
        {"latent_mean": (1.0,) * 4, "latent_std": (3.0,) * 4}, frequency_shift=0, mlp_norm_eps=1e-6, learn_sigma=False, mlp_ratio=2.0
    )
    told = export_official(other, tmp_path / "other.pt")
    for said in ("0.18215", "learn_sigma=False", "mlp_ratio is 2"):
        assert any(note.startswith("warning") and said in note for note in told)
