"""The JSON files of a diffusers folder ↔ our configurations. Every value that ours cannot hold is refused by the name of its field."""

import math
from pathlib import Path
from typing import Any

from model.config import DiTConfig, ObjectiveConfig, VAEConfig
from model.sources import ConversionError, read_json

TRANSFORMERS = ("DiTTransformer2DModel", "Transformer2DModel")  # the second is what the published folders say
PIPELINE_CLASSES = 1000  # DiTPipeline writes the null class as this number
_SPACINGS = ("leading", "trailing")

# Values that mean what we compute; None and a field's absence mean diffusers' default, which is the first of these.
_TRANSFORMER_FIXED: dict[str, tuple[Any, ...]] = {
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "attention_type": ("default",),
    "double_self_attention": (False,),
    "interpolation_scale": (1,),
    "norm_elementwise_affine": (False,),
    "norm_type": ("ada_norm_zero",),
    "only_cross_attention": (False,),
    "use_additional_conditions": (False,),
}
_TRANSFORMER_FREE = (
    "dropout",
    "norm_num_groups",
    "upcast_attention",
    "use_linear_projection",
)  # of training, of precision, of other blocks
_TRANSFORMER_DEFAULTS = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "num_layers": 28,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}
_VAE_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "mid_block_add_attention": (True, False),
    "use_post_quant_conv": (True,),
    "use_quant_conv": (True,),
}
_VAE_FREE = ("force_upcast", "sample_size")
_MOST_LAYERS = 16
_SCHEDULER_FIXED: dict[str, tuple[Any, ...]] = {
    "beta_schedule": ("linear",),
    "rescale_betas_zero_snr": (False,),
    "use_flow_sigmas": (False,),
}
_PREDICTIONS = {"epsilon": "noise", "v_prediction": "v"}


class Fields:
    """A JSON object whose fields are taken one by one, with the file's name in every complaint."""

    def __init__(self, path: Path) -> None:
        self.path, self.values = path, read_json(path)

    @property
    def kind(self) -> str:
        return str(self.values.get("_class_name"))

    def get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def integer(self, name: str, default: int) -> int:
        value = self.get(name, default)
        if type(value) is not int or value < 1:
            raise self.wrong(name, "a whole number above 0")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self.wrong(name, "a number")
        return float(value)

    def positive(self, name: str, default: float) -> float:
        value = self.number(name, default)
        if value <= 0:
            raise self.wrong(name, "a number above 0")
        return value

    def numbers(self, name: str) -> tuple[float, ...]:
        value = self.get(name, [])
        if not isinstance(value, list) or not all(type(v) in (int, float) and math.isfinite(v) for v in value):
            raise self.wrong(name, "a list of numbers")
        return tuple(float(v) for v in value)

    def wrong(self, name: str, wanted: str) -> ConversionError:
        return ConversionError(f"{self.path}: {name} must be {wanted}, got {self.values.get(name)!r}")

    def require_only(self, fixed: dict[str, tuple[Any, ...]], known: tuple[str, ...]) -> None:
        """No field but the known ones and those of `fixed` at their values, which are all that is computed here."""
        self.require(fixed)
        for name, value in sorted(self.values.items()):
            if value is not None and not name.startswith("_") and name not in fixed and name not in known:
                raise ConversionError(f"{self.path}: {name} is unknown here, so what it does to the model ({value!r}) would be lost")

    def require(self, fixed: dict[str, tuple[Any, ...]]) -> None:
        for name, allowed in fixed.items():
            if self.get(name, allowed[0]) not in allowed:
                raise self.wrong(name, f"{allowed[0]!r}, which is all that a DiT here can be")


def read_transformer(path: Path) -> Fields:
    """`config.json` of a transformer, its fields known and ours to hold."""
    fields = Fields(path)
    if fields.kind not in TRANSFORMERS:
        raise ConversionError(f"{path}: _class_name is {fields.kind!r}, neither {' nor '.join(TRANSFORMERS)}")
    fields.require_only(_TRANSFORMER_FIXED, (*_TRANSFORMER_FREE, *_TRANSFORMER_DEFAULTS, "out_channels", "sample_size", "norm_eps"))
    return fields


def require_agreement(fields: Fields, config: DiTConfig) -> None:
    """What the configuration says of the shape is what the weights have."""
    has = {
        "in_channels": config.in_channels,
        "num_layers": config.depth,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": config.num_classes,
        "out_channels": config.out_channels,
    }
    for name, value in has.items():
        if fields.integer(name, _TRANSFORMER_DEFAULTS.get(name, config.in_channels)) != value:
            raise fields.wrong(name, f"{value}, as the weights have it")
    heads, head = (fields.integer(name, _TRANSFORMER_DEFAULTS[name]) for name in ("num_attention_heads", "attention_head_dim"))
    if heads * head != config.hidden_size:
        raise fields.wrong("attention_head_dim", f"such that {heads} heads of it make the width {config.hidden_size}")


def transformer_heads(fields: Fields) -> int:
    return fields.integer("num_attention_heads", _TRANSFORMER_DEFAULTS["num_attention_heads"])


def transformer_fields(config: DiTConfig) -> dict[str, Any]:
    """Arguments of `DiTTransformer2DModel`, whose class table always has the rows that DiTPipeline counts on."""
    return {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "sample_size": config.input_size,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": PIPELINE_CLASSES,
        "norm_eps": config.mlp_norm_eps,
    }


def read_objective(path: Path) -> tuple[ObjectiveConfig, str | None]:
    """`scheduler_config.json` → the process, and the spacing of its times where ours has it. How it samples besides is ours to choose."""
    fields = Fields(path)
    if fields.kind.startswith("FlowMatch"):
        raise ConversionError(f"{path}: _class_name is {fields.kind!r}, a flow; these formats hold diffusions")
    fields.require(_SCHEDULER_FIXED)
    if fields.get("trained_betas", None) is not None:
        raise ConversionError(f"{path}: trained_betas is given; only betas on a line can be held")
    prediction = fields.get("prediction_type", "epsilon")
    if prediction not in _PREDICTIONS:
        raise fields.wrong("prediction_type", " or ".join(_PREDICTIONS))
    spacing = fields.get("timestep_spacing", _SPACINGS[0])
    try:
        objective = ObjectiveConfig(
            "diffusion",
            num_timesteps=fields.integer("num_train_timesteps", 1000),
            beta_start=fields.number("beta_start", 1e-4),
            beta_end=fields.number("beta_end", 2e-2),
            prediction=_PREDICTIONS[prediction],
        )
    except ValueError as error:
        raise error if isinstance(error, ConversionError) else ConversionError(f"{path}: {error}") from error
    return objective, spacing if spacing in _SPACINGS else None


_SAMPLING = {"clip_sample": False, "thresholding": False, "set_alpha_to_one": True, "steps_offset": 0}


def ignored_sampling(path: Path) -> list[str]:
    """What `scheduler_config.json` says of sampling that no sampler here does, as `name = value`."""
    fields = Fields(path)
    ignored = [name for name, plain in _SAMPLING.items() if fields.get(name, plain) != plain]
    if fields.get("timestep_spacing", _SPACINGS[0]) not in _SPACINGS:
        ignored.append("timestep_spacing")
    return [f"{name} = {fields.values[name]!r}" for name in ignored]


def scheduler_fields(objective: ObjectiveConfig) -> dict[str, Any]:
    """Arguments of `DDIMScheduler`: our `ddim` with the spacing `leading`."""
    return {
        "num_train_timesteps": objective.num_timesteps,
        "beta_start": objective.beta_start,
        "beta_end": objective.beta_end,
        "beta_schedule": "linear",
        "prediction_type": next(theirs for theirs, ours in _PREDICTIONS.items() if ours == objective.prediction),
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "timestep_spacing": "leading",
    }


def read_vae(path: Path, dit: DiTConfig) -> VAEConfig:
    """`config.json` of an `AutoencoderKL`, for the latents of this DiT; its scaling factor becomes the latents' statistics."""
    fields = Fields(path)
    if fields.kind != "AutoencoderKL":
        raise ConversionError(f"{path}: _class_name is {fields.kind!r}, not 'AutoencoderKL'")
    held = ("in_channels", "out_channels", "latent_channels", "block_out_channels", "layers_per_block", "norm_num_groups")
    blocks, statistics = ("down_block_types", "up_block_types"), ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    fields.require_only(_VAE_FIXED, (*_VAE_FREE, *held, *blocks, *statistics))
    widths = fields.get("block_out_channels", [64])
    if not isinstance(widths, list) or not all(type(width) is int and 0 < width <= 2**16 for width in widths) or not 0 < len(widths) < 10:
        raise fields.wrong("block_out_channels", "a list of the levels' widths")
    for name, kind in zip(blocks, ("DownEncoderBlock2D", "UpDecoderBlock2D"), strict=True):
        if fields.get(name, [kind]) != [kind] * len(widths):
            raise fields.wrong(name, f"{len(widths)} × {kind!r}")
    if fields.integer("out_channels", 3) != fields.integer("in_channels", 3):
        raise fields.wrong("out_channels", "in_channels")
    if fields.integer("latent_channels", 4) != dit.in_channels:
        raise fields.wrong("latent_channels", f"{dit.in_channels}, which the DiT takes")
    if fields.integer("layers_per_block", 1) > _MOST_LAYERS:
        raise fields.wrong("layers_per_block", f"at most {_MOST_LAYERS}")
    mean, std = _statistics(fields, dit.in_channels)
    try:
        return VAEConfig(
            image_size=dit.input_size * 2 ** (len(widths) - 1),
            image_channels=fields.integer("in_channels", 3),
            latent_channels=dit.in_channels,
            block_out_channels=tuple(widths),
            layers_per_block=fields.integer("layers_per_block", 1),
            norm_num_groups=fields.integer("norm_num_groups", 32),
            mid_block_attention=bool(fields.get("mid_block_add_attention", True)),
            latent_mean=mean,
            latent_std=std,
        )
    except ValueError as error:
        raise error if isinstance(error, ConversionError) else ConversionError(f"{path}: {error}") from error


def _statistics(fields: Fields, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """normalised = (raw − mean)·scaling/std, as diffusers' pipelines with per-channel statistics compute it."""
    scaling = fields.positive("scaling_factor", 0.18215)
    mean = fields.numbers("latents_mean") or (fields.number("shift_factor", 0.0),) * channels
    std = fields.numbers("latents_std") or (1.0,) * channels
    return mean, tuple(value / scaling for value in std)


def scaling_factor(std: float) -> float:
    """1/std; of its neighbours that give back exactly this std, the shortest to write: 0.18215 stays 0.18215 on its way here and back."""
    near = 1 / std
    exact = [value for value in (near, math.nextafter(near, 0), math.nextafter(near, math.inf)) if 1 / value == std]
    return min(exact or [near], key=lambda value: len(repr(value)))
