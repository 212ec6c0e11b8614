"""The two public formats of a DiT's weights, as the names of our parameters in them, and what their shapes tell.

Official code: our own names, and the position table. diffusers: the embedders copied into every block, q, k and v apart, and no table.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.config import DiTConfig, preset_heads
from model.dit import DiT
from model.layers import position_embedding
from model.sources import ConversionError, Weights

POSITIONS = "pos_embed"
CLASS_TABLE = "y_embedder.embedding_table.weight"
_PATCH, _HIDDEN, _LAST = "x_embedder.proj.weight", "blocks.0.mlp.fc1.weight", "final_layer.linear.weight"

_ONCE = {"x_embedder.proj": "pos_embed.proj", "final_layer.adaLN_modulation.1": "proj_out_1", "final_layer.linear": "proj_out_2"}
_COPIED = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
_IN_BLOCK = {
    "adaLN_modulation.1": ("norm1.linear",),
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}


def official_names(key: str, depth: int) -> list[str]:
    return [key]


def diffusers_names(key: str, depth: int) -> list[str]:
    """Where `DiTTransformer2DModel` keeps our parameter: one name, three for q, k and v, or one per block."""
    module, _, leaf = key.rpartition(".")
    if module in _ONCE:
        return [f"{_ONCE[module]}.{leaf}"]
    if module in _COPIED:
        return [f"transformer_blocks.{i}.{_COPIED[module]}.{leaf}" for i in range(depth)]
    _, index, part = module.split(".", 2)
    return [f"transformer_blocks.{index}.{name}.{leaf}" for name in _IN_BLOCK[part]]


@dataclass(frozen=True)
class Format:
    name: str
    names: Callable[[str, int], list[str]]  # our key, depth → keys of the file
    blocks: str  # prefix of the blocks' keys
    has_positions: bool


OFFICIAL = Format("official", official_names, "blocks", has_positions=True)
DIFFUSERS = Format("diffusers", diffusers_names, "transformer_blocks", has_positions=False)


def architecture_of(weights: Weights, form: Format, *, side: int | None = None, heads: int | None = None) -> DiTConfig:
    """What keys and shapes tell. `side` of the latents is needed where no position table is stored, `heads` where no preset has this shape.

    Raises ConversionError that names the first key that is missing, unknown or of another size than the first ones call for.
    """
    depth = _depth(weights, form)
    weights.require_keys([POSITIONS] * form.has_positions + [name for key in _our_keys(depth) for name in form.names(key, depth)])
    width, channels, patch, _ = _size(weights, form.names(_PATCH, depth)[0], 4)
    rows, _ = _size(weights, form.names(CLASS_TABLE, depth)[0], 2)
    hidden, _ = _size(weights, form.names(_HIDDEN, depth)[0], 2)
    last, _ = _size(weights, form.names(_LAST, depth)[0], 2)
    if form.has_positions:
        side = math.isqrt(_size(weights, POSITIONS, 3)[1]) * patch
    assert side is not None, "a format without positions has a configuration"
    heads = heads or preset_heads(depth, width)
    if heads is None:
        raise ConversionError(f"{weights.path}: no preset has depth {depth} and width {width}, so --heads must tell the number of heads")
    try:
        config = DiTConfig(
            input_size=side,
            patch_size=patch,
            in_channels=channels,
            hidden_size=width,
            depth=depth,
            num_heads=heads,
            num_classes=rows - 1,
            mlp_ratio=_ratio(hidden, width),
            learn_sigma=last == 2 * channels * patch**2,
        )
    except ValueError as error:
        raise ConversionError(f"{weights.path}: {error}") from error
    weights.require_sizes(_sizes(config, form))
    return config


def our_state(weights: Weights, form: Format, config: DiTConfig) -> dict[str, Tensor]:
    """Our parameters, float32, from a file that `architecture_of` has accepted. Raises ConversionError where copies differ."""
    if form.has_positions:
        _require_positions(weights, config)
    sources = {key: form.names(key, config.depth) for key in _our_keys(config.depth)}
    for key, names in sources.items():
        if not _is_split(key):
            _require_alike(weights, names)
    weights.require_held([name for key, names in sources.items() for name in (names if _is_split(key) else names[:1])])
    parts = {key: [weights.tensors[name].float() for name in (names if _is_split(key) else names[:1])] for key, names in sources.items()}
    return {key: torch.cat(tensors) if len(tensors) > 1 else tensors[0] for key, tensors in parts.items()}


def their_state(dit: DiT, form: Format) -> dict[str, Tensor]:
    """Our parameters under the format's names, each a tensor of its own."""
    state = {POSITIONS: positions(dit.config)} if form.has_positions else {}
    for key, value in dit.state_dict().items():
        names = form.names(key, dit.config.depth)
        parts = value.chunk(len(names)) if _is_split(key) else [value] * len(names)
        state |= {name: part.detach().clone() for name, part in zip(names, parts, strict=True)}
    return state


def _is_split(key: str) -> bool:
    return ".attn.qkv." in key


def _depth(weights: Weights, form: Format) -> int:
    """One more than the highest index of a block; a claim of many blocks costs nothing, since the first missing key ends it."""
    parts = (key.split(".") for key in weights.tensors)
    indices = [int(part[1]) for part in parts if part[0] == form.blocks and len(part) > 2 and part[1].isdecimal() and len(part[1]) <= 4]
    return max(indices, default=0) + 1


def _our_keys(depth: int) -> list[str]:
    """In the order of the model, which is built once, with one block."""
    with torch.device("meta"):
        one = list(DiT(DiTConfig(1, 1, 1, 4, 1, 1, 1)).state_dict())
    first, last = one.index(next(key for key in one if key.startswith("blocks."))), one.index("final_layer.linear.weight")
    blocks = [key.replace("blocks.0.", f"blocks.{i}.") for i in range(depth) for key in one[first:last]]
    return one[:first] + blocks + one[last:]


def _size(weights: Weights, key: str, dimensions: int) -> tuple[int, ...]:
    size = tuple(weights.tensors[key].shape)
    if len(size) != dimensions or 0 in size:
        raise ConversionError(f"{weights.path}: {key} has size {size}, where {dimensions} numbers above 0 are wanted")
    return size


def _ratio(hidden: int, width: int) -> float:
    """Such that the model's `int(width·ratio)` is `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _sizes(config: DiTConfig, form: Format) -> dict[str, tuple[int, ...]]:
    """Of every key of the file, from one block built without memory."""
    with torch.device("meta"):
        one = {key: tuple(value.shape) for key, value in DiT(replace(config, depth=1)).state_dict().items()}
    sizes: dict[str, tuple[int, ...]] = {POSITIONS: (1, config.num_tokens, config.hidden_size)} if form.has_positions else {}
    for key in _our_keys(config.depth):
        block = key.split(".")[1]
        rows, *rest = one[key.replace(f"blocks.{block}.", "blocks.0.") if key.startswith("blocks.") else key]
        names = form.names(key, config.depth)
        sizes |= {name: (rows // len(names) if _is_split(key) else rows, *rest) for name in names}
    return sizes


def positions(config: DiTConfig) -> Tensor:
    return position_embedding(config.input_size // config.patch_size, config.hidden_size)[None]


def _require_positions(weights: Weights, config: DiTConfig) -> None:
    """The table is not stored but computed here; one that differs belongs to another model."""
    stored = weights.tensors[POSITIONS]
    off = (stored.float() - positions(config)).abs().max().item()
    if not off <= max(1e-5, torch.finfo(stored.dtype).eps):
        raise ConversionError(f"{weights.path}: {POSITIONS} is not the 2-D sine-cosine table of the paper (it is off by {off:.2g})")


def _require_alike(weights: Weights, names: list[str]) -> None:
    first = weights.tensors[names[0]]
    for name in names[1:]:
        copy = weights.tensors[name]
        if copy.dtype != first.dtype or not torch.equal(copy, first):
            raise ConversionError(f"{weights.path}: {name} differs from {names[0]}; one embedder serves all blocks here")
