"""What a model is made of, as frozen dataclasses that are checked when they are built and stored in `checkpoint.json`.

A field that was added after checkpoints existed is declared with `_added(default)`; `stored()` leaves it out while it has its default, so
that an older checkpoint keeps the hash by which its pictures name it.
"""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_args

BLOCKS = ("adaln-zero", "adaln", "cross-attention", "in-context")  # Peebles & Xie 2022, §3.2
ADAPTIVE = ("adaln-zero", "adaln")  # those whose norms, the final one too, take scale and shift from the condition


def _added(default: Any) -> Any:
    return field(default=default, metadata={"added": True})


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


_KINDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a string"}
LARGEST_IMAGE = 1 << 13  # pixels of a side
LONGEST_SIDE = 128  # patches: 2048 pixels in the paper's VAE and patches of 2
# A configuration may come from a file that claims anything: more than this is a mistake or an attack, and building it would not end.
_MOST = {"patch_size": 1 << 7, "in_channels": 1 << 10, "latent_channels": 1 << 10, "hidden_size": 1 << 16, "depth": 1 << 10}
_MOST |= {"num_classes": 1 << 20, "image_size": LARGEST_IMAGE, "layers_per_block": 16, "num_timesteps": 100_000}
_MOST_LEVELS, _MOST_WIDTH, _MOST_MLP_RATIO = 10, 1 << 14, 64


def check_kind(name: str, kind: Any, value: Any) -> None:
    """ValueError unless the value has a field's type: a dataclass takes any, and `rope = "no"` would be true. 1 will do for 1.0."""
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 1 << 53 else math.inf
    fits = type(value) is kind and (kind is not float or math.isfinite(value))
    if kind in _KINDS and not fits:
        raise ValueError(f"{name} must be {_KINDS[kind]}, got {ascii(value)[:60]}")


def _check_fields(config: Any) -> None:
    """Types of a configuration's fields, tuples' entries too, and the most that any may be."""
    for f in fields(config):
        value, kinds = getattr(config, f.name), get_args(f.type)
        _require(not kinds or isinstance(value, tuple), f"{f.name} must be a list, got {ascii(value)[:60]}")
        for entry in value if kinds else [value]:
            check_kind(f.name, kinds[0] if kinds else f.type, entry)
        most = _MOST.get(f.name)
        _require(most is None or value <= most, f"{f.name} must be at most {most}, got {ascii(value)[:60]}")


def stored(config: Any) -> dict[str, Any]:
    """A configuration as `checkpoint.json` holds it."""
    at_default = {f.name for f in fields(config) if f.metadata.get("added") and getattr(config, f.name) == f.default}
    return {name: value for name, value in asdict(config).items() if name not in at_default}


TIME_FEATURES = {"official": 0, "diffusers": 1}  # → DiTConfig.frequency_shift, by whose code the network is to be evaluated


@dataclass(frozen=True)
class DiTConfig:
    """Shape and conventions of a DiT (Peebles & Xie 2022, §3.2). Every default below is the paper's."""

    input_size: int  # latent height and width
    patch_size: int
    in_channels: int  # latent channels C
    hidden_size: int  # D
    depth: int
    num_heads: int
    num_classes: int  # without the null class, whose index is num_classes
    mlp_ratio: float = 4.0
    learn_sigma: bool = True  # 2C output channels: noise and the covariance's v
    norm_eps: float = 1e-6  # of every norm but the one before the MLP
    time_factor: float = 1.0  # t is multiplied by this before its features: 1 for steps 0…999, 1000 for flow time 0…1
    frequency_shift: int = 0  # feature frequencies are 10⁴^(−i/(128−shift)); see TIME_FEATURES
    mlp_norm_eps: float = _added(1e-6)  # of the norm before a block's MLP, which diffusers gives 1e-5 unless told
    block: str = _added("adaln-zero")
    qk_norm: bool = _added(False)  # beyond the paper: q and k normalised per head
    rms_norm: bool = _added(False)  # beyond the paper: root mean square in place of layer norms
    swiglu: bool = _added(False)  # beyond the paper: gated MLP with as many parameters
    rope: bool = _added(False)  # beyond the paper: 2-D rotary positions in self-attention, besides the table

    def __post_init__(self) -> None:
        _check_fields(self)
        for name in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        side = self.input_size // self.patch_size
        _require(side <= LONGEST_SIDE, f"latents of {self.input_size} in patches of {self.patch_size} are more than {LONGEST_SIDE} a side")
        _require(self.input_size % self.patch_size == 0, f"input_size {self.input_size} is not a multiple of patch_size {self.patch_size}")
        _require(self.hidden_size % self.num_heads == 0, f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        _require(self.hidden_size % 4 == 0, f"hidden_size must be a multiple of 4 for 2-D sine-cosine positions, got {self.hidden_size}")
        _require(self.frequency_shift in (0, 1), f"frequency_shift must be 0 (official) or 1 (diffusers), got {self.frequency_shift}")
        _require(self.mlp_ratio > 0 and self.time_factor > 0, "mlp_ratio and time_factor must be positive")
        _require(self.mlp_ratio <= _MOST_MLP_RATIO, f"mlp_ratio must be at most {_MOST_MLP_RATIO}, got {self.mlp_ratio}")
        _require(self.norm_eps > 0 and self.mlp_norm_eps > 0, "norm_eps and mlp_norm_eps must be positive")
        _require(self.block in BLOCKS, f"block must be one of {', '.join(BLOCKS)}, got {self.block!r}")
        head = self.hidden_size // self.num_heads
        _require(
            not self.rope or head % 4 == 0, f"rope turns pairs of channels for rows and for columns: {head} a head is no multiple of 4"
        )

    @property
    def num_tokens(self) -> int:
        return (self.input_size // self.patch_size) ** 2

    @property
    def out_channels(self) -> int:
        return 2 * self.in_channels if self.learn_sigma else self.in_channels

    @property
    def null_class(self) -> int:
        return self.num_classes


@dataclass(frozen=True)
class VAEConfig:
    """Shape of the autoencoder, and the statistics that normalise its latents to zero mean and unit variance."""

    image_size: int
    image_channels: int  # 1 grey, 3 RGB
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)  # each level but the last halves the size
    layers_per_block: int = 2
    norm_num_groups: int = 32
    mid_block_attention: bool = True
    latent_mean: tuple[float, ...] = ()  # per channel; filled in once the VAE is trained
    latent_std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _check_fields(self)
        for name in ("image_size", "latent_channels", "layers_per_block", "norm_num_groups"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        levels = len(self.block_out_channels)
        _require(1 <= levels <= _MOST_LEVELS, f"block_out_channels must name the widths of 1 to {_MOST_LEVELS} levels, got {levels}")
        _require(self.image_channels in (1, 3), f"image_channels must be 1 (grey) or 3 (RGB), got {self.image_channels}")
        _require(self.image_size % self.factor == 0, f"image_size {self.image_size} is not a multiple of the VAE's factor {self.factor}")
        for width in self.block_out_channels:
            _require(1 <= width <= _MOST_WIDTH, f"a block width must be between 1 and {_MOST_WIDTH}, got {width}")
            _require(width % self.norm_num_groups == 0, f"block width {width} is not a multiple of norm_num_groups {self.norm_num_groups}")
        for name in ("latent_mean", "latent_std"):
            given = len(getattr(self, name))
            _require(given in (0, self.latent_channels), f"{name} has {given} values for {self.latent_channels} latent channels")
        _require(all(s > 0 for s in self.latent_std), f"latent_std must be positive, got {self.latent_std}")

    @property
    def factor(self) -> int:
        return int(2 ** (len(self.block_out_channels) - 1))

    @property
    def latent_size(self) -> int:
        return self.image_size // self.factor


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the network was trained to predict, and the process it belongs to.

    With `learn_sigma` in the architecture a diffusion objective is the paper's hybrid loss; without, the mean squared error alone.
    """

    kind: str  # "diffusion": T steps of Gaussian noise; "flow": velocity of the linear path
    num_timesteps: int = 1000  # diffusion: T
    beta_start: float = 1e-4
    beta_end: float = 2e-2
    logit_normal_mean: float = 0.0  # flow: t = sigmoid(mean + std·N(0,1)) in training
    logit_normal_std: float = 1.0
    prediction: str = _added("noise")  # diffusion: "noise", or "v" = √ᾱ·ε − √(1−ᾱ)·x₀ (Salimans & Ho 2022, §4)
    min_snr_gamma: float = _added(0.0)  # diffusion: the squared error is weighted by min(SNR, γ) of x₀'s (Hang et al. 2023); 0 is off
    flow_time: str = _added("logit-normal")  # flow: "logit-normal" or "uniform" times in training

    def __post_init__(self) -> None:
        _check_fields(self)
        _require(self.kind in ("diffusion", "flow"), f"objective must be 'diffusion' or 'flow', got {self.kind!r}")
        _require(self.num_timesteps >= 2, f"num_timesteps must be at least 2, got {self.num_timesteps}")
        _require(
            0 < self.beta_start <= self.beta_end < 1, f"betas must satisfy 0 < start ≤ end < 1, got {self.beta_start}, {self.beta_end}"
        )
        _require(self.logit_normal_std > 0, f"logit_normal_std must be positive, got {self.logit_normal_std}")
        _require(self.prediction in ("noise", "v"), f"prediction must be 'noise' or 'v', got {self.prediction!r}")
        _require(self.min_snr_gamma >= 0, f"min_snr_gamma must be positive, or 0 for none, got {self.min_snr_gamma}")
        _require(self.flow_time in ("logit-normal", "uniform"), f"flow_time must be 'logit-normal' or 'uniform', got {self.flow_time!r}")
        for name in ("prediction", "min_snr_gamma"):
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            _require(self.kind == "diffusion" or value == default, f"{name} belongs to the objective 'diffusion', not to {self.kind!r}")
        _require(self.kind == "flow" or self.flow_time == "logit-normal", "flow_time belongs to the objective 'flow', not to 'diffusion'")


_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}  # depth, width, heads
PRESETS = tuple(f"DiT-{size}/{patch}" for size in _SIZES for patch in (8, 4, 2))  # the paper's Table 1 and §4
PAPER_VAE_FACTOR = 8  # pixels of a picture to one of its latent, in the paper's autoencoder
_LARGEST_IMAGE = 2048  # pixels of a preset: its position table is a real one


def preset(name: str, *, image_size: int = 256, block: str = "adaln-zero", num_classes: int = 1000) -> DiTConfig:
    """`DiT-XL/2` and its eleven sisters, on 4-channel latents of an f8 autoencoder. ValueError lists the names."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there is: {', '.join(PRESETS)}")
    sound = PAPER_VAE_FACTOR <= image_size <= _LARGEST_IMAGE and image_size % PAPER_VAE_FACTOR == 0
    _require(sound, f"image_size must be a multiple of {PAPER_VAE_FACTOR} up to {_LARGEST_IMAGE}, got {image_size}")
    size, patch = name.removeprefix("DiT-").split("/")
    depth, width, heads = _SIZES[size]
    return DiTConfig(
        input_size=image_size // PAPER_VAE_FACTOR,
        patch_size=int(patch),
        in_channels=4,
        hidden_size=width,
        depth=depth,
        num_heads=heads,
        num_classes=num_classes,
        block=block,
    )


def preset_heads(depth: int, width: int) -> int | None:
    """Heads of the preset with this depth and width, or None: weights do not tell their number."""
    return next((heads for *shape, heads in _SIZES.values() if shape == [depth, width]), None)
