"""Weights of others, bent: `dit import` reads them or refuses them in one line, at no more cost than the files are long."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from model.convert import Imported, import_checkpoint
from model.labels import read_labels
from model.sources import SAFETENSORS, ConversionError, Weights, read_weights
from tests.bent import DEEP, JUNK, LONG, bent_bytes, bent_json, text_of

TINY = Path(__file__).parents[1] / "golden" / "official-tiny-p2.pt"
FILES = ["model_index.json", "scheduler/scheduler_config.json", "transformer/config.json", "vae/config.json"]
BLOCKS = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2, "block_out_channels": [8, 16]}


def outcome(read: Callable[[], object]) -> object:
    """What is read, or None for what is refused as it should be."""
    try:
        return read()
    except ConversionError as error:
        assert str(error) and "\n" not in str(error), error
        return None


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as diffusers writes it."""
    folder = tmp_path_factory.mktemp("sound")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=4, out_channels=8, num_embeds_ada_norm=3
        )
        transformer.save_pretrained(folder / "transformer")
        AutoencoderKL(**BLOCKS, norm_num_groups=4).save_pretrained(folder / "vae")
    DDIMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")
    names = {"0": "cat, house cat", "1": "dog", "2": "ship"}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", "id2label": names}))
    return folder


@pytest.fixture(scope="module")
def bent(tmp_path_factory: pytest.TempPathFactory, sound: Path) -> Callable[[str, bytes], Path]:
    """`bent(name, data)`: the folder with one file of other bytes."""
    folder = tmp_path_factory.mktemp("bent") / "pipeline"

    def make(name: str, data: bytes) -> Path:
        shutil.copytree(sound, folder, dirs_exist_ok=True)
        (folder / name).write_bytes(data)
        return folder

    return make


def test_the_folder_that_is_bent_is_sound_before(sound: Path) -> None:
    imported = import_checkpoint(str(sound))
    assert imported.checkpoint.vae is not None and imported.checkpoint.labels[0] == ("cat", "house cat")


@settings(max_examples=100)
@given(name=st.sampled_from(FILES), data=st.data())
def test_a_bent_configuration_is_read_or_refused(sound: Path, bent: Callable[[str, bytes], Path], name: str, data: st.DataObject) -> None:
    right = (sound / name).read_bytes()
    wrong = data.draw(bent_json(json.loads(right)).map(lambda document: text_of(document).encode()) | bent_bytes(right))
    imported = outcome(lambda: import_checkpoint(str(bent(name, wrong))))
    assert imported is None or isinstance(imported, Imported)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("data", [DEEP, f'{{"_class_name": {LONG}}}', "[]", "null", ""], ids=lambda text: text[:16])
def test_json_that_no_parser_likes_is_refused(bent: Callable[[str, bytes], Path], name: str, data: str) -> None:
    assert outcome(lambda: import_checkpoint(str(bent(name, data.encode())))) is None


@pytest.mark.parametrize(("name", "field"), [("transformer/config.json", "num_layers"), ("transformer/config.json", "sample_size")] + [
    ("vae/config.json", field) for field in ("layers_per_block", "latent_channels", "norm_num_groups")
] + [("scheduler/scheduler_config.json", "num_train_timesteps")])  # fmt: skip
@pytest.mark.parametrize("size", [2**31, 2**63, 10**400], ids=["2^31", "2^63", "10^400"])
def test_a_claim_of_any_size_is_refused(sound: Path, bent: Callable[[str, bytes], Path], name: str, field: str, size: int) -> None:
    document = {**json.loads((sound / name).read_bytes()), field: size}
    assert outcome(lambda: import_checkpoint(str(bent(name, json.dumps(document).encode())))) is None


@settings(max_examples=150)
@given(data=st.data())
def test_bent_weights_are_read_or_refused(small: dict[str, Path], data: st.DataObject) -> None:
    """A file of safetensors, and the archive that torch.save writes, zip, pickle and all."""
    path = small[data.draw(st.sampled_from(sorted(small)))]
    sound = path.read_bytes()
    (bent := path.with_stem("bent")).write_bytes(data.draw(bent_bytes(sound)))
    weights = outcome(lambda: read_weights(bent))
    assert weights is None or isinstance(weights, Weights)
    if isinstance(weights, Weights):
        assert all(value.nbytes <= max(value.untyped_storage().nbytes(), 1) for value in weights.tensors.values())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, state = tmp_path_factory.mktemp("small"), {"a": torch.ones(3), "b": torch.zeros(2, 2)}
    save_file(state, folder / "a.safetensors")
    torch.save(state, folder / "a.pt")
    return {path.suffix: path for path in folder.iterdir()}


@settings(max_examples=30)
@given(data=st.data())
def test_a_bent_official_file_is_imported_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "bent-official.pt"
    path.write_bytes(data.draw(bent_bytes(TINY.read_bytes())))
    imported = outcome(lambda: import_checkpoint(str(path), heads=4))
    assert imported is None or isinstance(imported, Imported)


@settings(max_examples=100)
@given(data=st.data())
def test_a_bent_index_of_weights_names_files_beside_it_or_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "shards"
    folder.mkdir(exist_ok=True)
    save_file({"a": torch.ones(1)}, folder / "one.safetensors")
    index = folder / f"{SAFETENSORS}.index.json"
    index.write_text(text_of(data.draw(bent_json({"weight_map": {"a": "one.safetensors"}}))))
    outcome(lambda: read_weights(index))


@settings(max_examples=150)
@given(
    document=JUNK | bent_json({"id2label": {"0": "cat, house cat", "1": "dog"}}) | bent_json(["cat", "dog"]),
    suffix=st.sampled_from(["json", "txt"]),
)
def test_any_file_of_names_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, document: Any, suffix: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"names.{suffix}"
    path.write_text(text_of(document))
    labels = outcome(lambda: read_labels(path))
    assert labels is None or all(type(index) is int and all(group) for index, group in labels.items())  # type: ignore[attr-defined]
