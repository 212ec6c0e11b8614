"""A recipe: one TOML file that says everything a training run needs but the data's folder."""

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from model.config import TIME_FEATURES, DiTConfig, ObjectiveConfig, check_kind

RECIPES = Path(__file__).parent / "recipes"
PRECISIONS = ("bfloat16", "float32")
_FLOW_TIME_FACTOR = 1000.0  # flow time 0…1 seen by the embedding on the scale of diffusion steps


@dataclass(frozen=True)
class DataConfig:
    image_size: int
    image_channels: int
    labels: tuple[str, ...] = ()  # names for the classes of IDX files; an image folder names its own
    horizontal_flip: bool = True


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW with a linear warm-up and a cosine fall to `final_learning_rate`."""

    steps: int
    batch_size: int
    learning_rate: float
    final_learning_rate: float
    warmup_steps: int
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    ema_decay: float | tuple[float, ...] = 0.999  # several averages at once, or none; the first is what is previewed and published
    precision: str = "bfloat16"  # of the matrix products; weights, their averages and the optimiser's state are float32 in any case
    sample_every: int = 500
    save_every: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "sample_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "gradient_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for decay in self.ema_decays:
            if type(decay) not in (int, float) or not 0 <= decay < 1:
                raise ValueError(f"ema_decay must be in 0 … 1, or a list of such numbers, got {decay!r}")
        if len(set(self.ema_decays)) < len(self.ema_decays):
            raise ValueError(f"ema_decay names a number twice: {', '.join(map(str, self.ema_decays))}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")

    @property
    def ema_decays(self) -> tuple[float, ...]:
        return self.ema_decay if isinstance(self.ema_decay, tuple) else (self.ema_decay,)


@dataclass(frozen=True)
class Execution:
    """How this machine makes the steps. None of it changes what comes out but for float rounding, so a resumed run may differ in it."""

    micro_batch_size: int = 0  # samples that a process takes at once, their gradients added up; 0: its whole share of a batch
    compile: bool = False  # by torch.compile: minutes before the first step, less time in each
    activation_checkpointing: bool = False  # activations are computed again in the backward pass instead of kept
    shard: bool = False  # weights, gradients and optimiser state spread over the processes (FSDP2), for what does not fit
    tensorboard: bool = True

    def __post_init__(self) -> None:
        if self.micro_batch_size < 0:
            raise ValueError(f"micro_batch_size must be at least 1, or 0 for all at once, got {self.micro_batch_size}")


@dataclass(frozen=True)
class VAERecipe:
    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    mid_block_attention: bool
    kl_weight: float
    optimiser: OptimiserConfig


@dataclass(frozen=True)
class DiTRecipe:
    """Fields are those of DiTConfig and ObjectiveConfig, which say what they mean and check them."""

    patch_size: int
    hidden_size: int
    depth: int
    num_heads: int
    objective: str
    learn_sigma: bool  # diffusion: the paper's hybrid loss; without, the squared error alone
    optimiser: OptimiserConfig
    label_dropout: float = 0.1
    block: str = "adaln-zero"
    qk_norm: bool = False
    rms_norm: bool = False
    swiglu: bool = False
    rope: bool = False
    prediction: str = "noise"
    min_snr_gamma: float = 0.0
    flow_time: str = "logit-normal"
    time_features: str = "official"  # or "diffusers", for a network that DiTPipeline shall run too

    def __post_init__(self) -> None:
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout must be in 0 … 1, got {self.label_dropout}")
        if self.time_features not in TIME_FEATURES:
            raise ValueError(f"time_features must be one of: {', '.join(TIME_FEATURES)}; got {self.time_features!r}")
        self.objective_config()
        if self.learn_sigma and self.objective == "flow":
            raise ValueError("learn_sigma belongs to the objective 'diffusion': a flow has no covariance to learn")
        self.architecture(input_size=max(1, self.patch_size), in_channels=1, num_classes=1)  # for its checks

    def objective_config(self) -> ObjectiveConfig:
        return ObjectiveConfig(self.objective, prediction=self.prediction, min_snr_gamma=self.min_snr_gamma, flow_time=self.flow_time)

    def architecture(self, *, input_size: int, in_channels: int, num_classes: int) -> DiTConfig:
        """The network for latents and classes that the recipe does not know."""
        return DiTConfig(
            input_size=input_size,
            patch_size=self.patch_size,
            in_channels=in_channels,
            hidden_size=self.hidden_size,
            depth=self.depth,
            num_heads=self.num_heads,
            num_classes=num_classes,
            learn_sigma=self.learn_sigma,
            time_factor=_FLOW_TIME_FACTOR if self.objective == "flow" else 1.0,
            frequency_shift=TIME_FEATURES[self.time_features],
            block=self.block,
            qk_norm=self.qk_norm,
            rms_norm=self.rms_norm,
            swiglu=self.swiglu,
            rope=self.rope,
        )


@dataclass(frozen=True)
class ServingDefaults:
    steps: int
    guidance_scale: float
    sampler: str
    dtype: str = "bfloat16"  # of the stored weights


@dataclass(frozen=True)
class Recipe:
    name: str
    data: DataConfig
    vae: VAERecipe
    dit: DiTRecipe
    defaults: ServingDefaults


R = TypeVar("R")


def _build(kind: type[R], section: str, values: dict[str, Any], path: Path, **nested: Any) -> R:
    allowed = {f.name: f.type for f in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(allowed))
    if unknown:
        raise ValueError(f"{path}: [{section}] has no field {unknown[0]!r}; it has: {', '.join(allowed)}")
    try:
        for name, value in values.items():
            check_kind(name, allowed[name], value)
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}, **nested)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: [{section}] {error}") from error


def load_recipe(name_or_path: str) -> Recipe:
    """A bundled recipe by name, or a TOML file by path; ValueError says which field of which section is wrong."""
    path = Path(name_or_path)
    if not path.is_file():
        path = RECIPES / f"{name_or_path}.toml"
    if not path.is_file():
        bundled = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
        raise ValueError(f"no recipe {name_or_path!r}: give a TOML file or one of: {bundled}")
    try:
        document = tomllib.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    sections = {"data", "vae", "dit", "defaults"}
    if set(document) != sections:
        raise ValueError(f"{path} must have the sections {', '.join(sorted(sections))}; it has: {', '.join(sorted(document))}")
    for section in (*sections, "vae.optimiser", "dit.optimiser"):
        name, _, inner = section.partition(".")
        if not isinstance(document[name].get(inner, {}) if inner else document[name], dict):
            raise ValueError(f"{path}: {section} is no table; it begins with [{section}]")
    stages: dict[str, OptimiserConfig] = {
        stage: _build(OptimiserConfig, f"{stage}.optimiser", document[stage].pop("optimiser", {}), path) for stage in ("vae", "dit")
    }
    return Recipe(
        name=path.stem,
        data=_build(DataConfig, "data", document["data"], path),
        vae=_build(VAERecipe, "vae", document["vae"], path, optimiser=stages["vae"]),
        dit=_build(DiTRecipe, "dit", document["dit"], path, optimiser=stages["dit"]),
        defaults=_build(ServingDefaults, "defaults", document["defaults"], path),
    )
