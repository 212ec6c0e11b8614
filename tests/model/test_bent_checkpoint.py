"""A checkpoint folder that anybody may have written is loaded as what it says or is a CheckpointError: no other error, no end of memory."""

import contextlib
import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from model import checkpoint as module
from model.checkpoint import CheckpointError, load, read_config, resolve
from model.manifest import is_plain_name
from model.registry import models, roll_back, signature, versions
from tests.bent import DEEP, JUNK, LONG, bent_bytes, bent_json, text_of


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]) -> Path:
    """Never changed."""
    return make_checkpoint(tmp_path_factory.mktemp("sound"), "diffusion")


@pytest.fixture(scope="module")
def bent(tmp_path_factory: pytest.TempPathFactory, sound: Path) -> Callable[..., Path]:
    """`bent(manifest, **weights)`: the sound folder with these bytes in place of its own; the manifest vouches for the weights."""
    folder = tmp_path_factory.mktemp("bent") / "tiny"
    shutil.copytree(sound, folder)

    def make(manifest: bytes | dict[str, Any] | None = None, **weights: bytes) -> Path:
        document = json.loads((sound / "checkpoint.json").read_bytes()) if manifest is None else manifest
        for kind, name in module.WEIGHTS.items():
            data = weights.get(kind, (sound / name).read_bytes())
            (folder / name).write_bytes(data)
            if kind in weights:
                document["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        (folder / "checkpoint.json").write_bytes(document if isinstance(document, bytes) else as_a_careful_hand_writes(document))
        return folder

    return make


def as_a_careful_hand_writes(document: Any) -> bytes:
    """With a hash and a checksum that fit, as far as the document has what they are made of."""
    if not isinstance(document, dict):
        return text_of(document).encode()
    document = {name: value for name, value in document.items() if name != "checksum"}
    with contextlib.suppress(KeyError, TypeError, AttributeError, ValueError, RecursionError):
        document["hash"] = module._identity(document)
    try:
        checksum = hashlib.sha256(module._canonical(document)).hexdigest()
        return module._canonical({**document, "checksum": checksum})
    except (ValueError, TypeError, RecursionError):
        return text_of(document).encode()


def check(folder: Path) -> str:
    """'read' or 'refused': what is read says the same when it is written again."""
    try:
        config, identity = read_config(folder)
    except CheckpointError as error:
        told = str(error)
        assert told.startswith(str(folder)) and len(told) < 1000, told
        return "refused"
    said = module._describe(config)
    assert module._parse(json.loads(json.dumps(said)), folder) == config and len(identity) == 64
    try:
        loaded = load(folder)
    except CheckpointError as error:
        assert str(error).startswith(str(folder))
        return "refused"
    assert loaded.config == config and loaded.hash == identity
    return "read"


# --- the manifest ------------------------------------------------------------------------------------------------------


def test_the_folder_that_is_bent_is_sound_before(bent: Callable[..., Path]) -> None:
    assert check(bent()) == "read"


@settings(max_examples=150)
@given(data=st.data())
def test_bytes_that_nobody_vouches_for_are_refused(sound: Path, bent: Callable[..., Path], data: st.DataObject) -> None:
    right = (sound / "checkpoint.json").read_bytes()
    wrong = data.draw(st.binary(max_size=100) | bent_bytes(right) | JUNK.map(lambda junk: text_of(junk).encode()))
    assert check(bent(wrong)) == ("read" if wrong == right else "refused")


@settings(max_examples=300)
@given(data=st.data())
def test_a_bent_document_with_sums_that_fit_is_read_or_refused(sound: Path, bent: Callable[..., Path], data: st.DataObject) -> None:
    check(bent(data.draw(bent_json(json.loads((sound / "checkpoint.json").read_bytes())))))


SIZES = [
    ("architecture", "depth"),
    ("architecture", "hidden_size"),
    ("architecture", "input_size"),
    ("architecture", "patch_size"),
    ("architecture", "in_channels"),
    ("architecture", "num_classes"),
    ("architecture", "mlp_ratio"),
    ("vae", "image_size"),
    ("vae", "latent_channels"),
    ("vae", "layers_per_block"),
    ("vae", "norm_num_groups"),
    ("objective", "num_timesteps"),
]


@pytest.mark.parametrize("size", [2**10, 2**16, 2**31, 2**63, 10**30])
@pytest.mark.parametrize(("section", "name"), SIZES, ids=lambda value: value)
def test_a_claim_of_any_size_is_refused_before_memory_is_spent(
    sound: Path, bent: Callable[..., Path], section: str, name: str, size: int
) -> None:
    document = json.loads((sound / "checkpoint.json").read_bytes())
    document[section][name] = size
    if name == "num_classes":
        document["labels"] = document["labels"] + [["x"]] * (min(size, 2**16) - len(document["labels"]))
    some_steps = name == "num_timesteps" and size <= 2**16  # which no weight depends on
    assert check(bent(document)) == ("read" if some_steps else "refused")


def test_many_levels_of_the_autoencoder_are_refused(sound: Path, bent: Callable[..., Path]) -> None:
    for levels in ([8] * 1000, [2**40, 2**40], [8.0, 16.0], [True, 8], [[8], 16], [], {"0": 8}, "88"):
        document = json.loads((sound / "checkpoint.json").read_bytes())
        document["vae"]["block_out_channels"] = levels
        assert check(bent(document)) == "refused"


@pytest.mark.parametrize(
    "manifest",
    [DEEP, '{"a": ' + DEEP[:900] + "]" * 900 + "}", f'{{"format": {LONG}}}', '{"format": 1e999}', '{"format": NaN}', '{"\\ud800": 1}'],
    ids=lambda text: text[:16],
)
def test_json_that_no_parser_likes_is_refused(bent: Callable[..., Path], manifest: str) -> None:
    assert check(bent(manifest.encode())) == "refused"


def test_a_field_that_is_said_twice_is_refused(sound: Path, bent: Callable[..., Path]) -> None:
    right = (sound / "checkpoint.json").read_bytes()
    assert check(bent(right.replace(b'  "format": 1,', b'  "format": 1,\n  "format": 1,'))) == "refused"


def test_a_manifest_without_an_end_is_not_read_to_its_end(bent: Callable[..., Path]) -> None:
    path = bent() / "checkpoint.json"
    with path.open("r+b") as file:
        file.truncate(1 << 40)  # takes no room
    assert check(path.parent) == "refused"
    assert [version.error for version in versions(path.parent) if version.error and "more than" in version.error]
    path.unlink()


def test_a_hash_that_is_not_its_own_is_refused(sound: Path, bent: Callable[..., Path]) -> None:
    document = json.loads((sound / "checkpoint.json").read_bytes())
    del document["checksum"]
    document["hash"] = "0" * 64
    document["checksum"] = hashlib.sha256(module._canonical(document)).hexdigest()
    with pytest.raises(CheckpointError, match="has a hash that is not that of its content"):
        read_config(bent(module._canonical(document)))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: d.update(labels=["cat", "dog", "ship", "truck"]), "labels must be a list of lists"),
        (lambda d: d["labels"].__setitem__(0, ["cat", 3]), "labels is of another type"),
        (lambda d: d["defaults"].update(guidance_scale="2"), "the default guidance_scale must be between 1 and 20"),
        (lambda d: d["defaults"].update(guidance_scale=21), "the default guidance_scale must be between 1 and 20"),
        (lambda d: d["defaults"].update(steps=2.5), "the default steps must be between 1 and 1000; got 2.5"),
        (lambda d: d["defaults"].update(guidance_interval=[False, True]), "the default guidance_interval must be"),
        (lambda d: d.update(quality={"draft": 5}), "quality is of another type"),
        (lambda d: d.update(quality={"draft": {"steps": 0}}), "quality 'draft': steps must be between 1 and 1000; got 0"),
        (lambda d: d.update(quality={"draft": {"sampler": "euler"}}), "quality 'draft': sampler must be one of this model's: ddpm"),
        (lambda d: d.update(quality={"draft": {"guidance_interval": [1, 0]}}), "quality 'draft': guidance_interval must be"),
        (lambda d: d.update(metrics=[1]), "metrics is of another type"),
        (lambda d: d.update(image_size=True), "image_size is of another type"),
        (lambda d: d.update(architecture=[]), "the fields of DiTConfig are no JSON object"),
        (lambda d: d["architecture"].update(learn_sigma=1), "learn_sigma must be true or false, got 1"),
        (lambda d: d["architecture"].update(depth=2.0), "depth must be a whole number, got 2.0"),
        (lambda d: d["architecture"].update(mlp_ratio=True), "mlp_ratio must be a finite number, got True"),
        (lambda d: d["vae"].update(latent_std=[1, 1, 1, "1"]), "latent_std must be a finite number, got '1'"),
        (lambda d: d["files"].update({"dit.safetensors": {"sha256": 3, "bytes": 1}}), "no sha256 and length of 'dit.safetensors'"),
        (lambda d: d["files"]["README.md"].update(bytes=-1), "no sha256 and length of 'README.md'"),
        (lambda d: d["files"].update({"/etc/passwd": d["files"]["README.md"]}), "names a file '/etc/passwd', which cannot lie beside it"),
        (lambda d: d.update(files=[]), "its files are no JSON object"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_told(sound: Path, bent: Callable[..., Path], change: Callable[[dict], None], told: str) -> None:
    document = json.loads((sound / "checkpoint.json").read_bytes())
    change(document)
    with pytest.raises(CheckpointError) as raised:
        load(bent(document))
    assert told in str(raised.value)


# --- the weights -------------------------------------------------------------------------------------------------------


def framed(header: bytes, rest: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file: the length of a JSON header, the header, numbers."""
    return struct.pack("<Q", len(header) if length is None else length) + header + rest


def parts(data: bytes) -> tuple[bytes, bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return data[8 : 8 + length], data[8 + length :]


ONE = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'


def tensors(header: str) -> bytes:
    """A file of one number."""
    return framed(f"{{{header}}}".encode(), bytes(4))


@settings(max_examples=100)
@given(data=st.data())
def test_bent_weights_that_are_vouched_for_are_read_or_refused(sound: Path, bent: Callable[..., Path], data: st.DataObject) -> None:
    header, numbers = parts((sound / "dit.safetensors").read_bytes())
    bent_header = data.draw(bent_bytes(header) | bent_json(json.loads(header)).map(lambda document: text_of(document).encode()))
    check(bent(dit=framed(bent_header, numbers)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        framed(b"{}", length=2**63),
        framed(b"{}", length=2**64 - 1),
        framed(b"{}", length=2**20),
        framed(DEEP.encode()),
        tensors('"a": {"dtype": "F32", "shape": [9223372036854775807, 4], "data_offsets": [0, 4]}'),
        tensors('"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}'),
        tensors(f'"a": {ONE}, "a": {ONE}'),
        tensors(f'"a": {ONE}, "b": {ONE}'),
        tensors('"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}'),
        tensors('"a": {"dtype": "F12", "shape": [1], "data_offsets": [0, 4]}'),
    ],
    ids=lambda data: repr(data[:60]),
)
def test_weights_that_claim_what_they_do_not_have_are_refused(bent: Callable[..., Path], data: bytes) -> None:
    for kind in ("dit", "vae"):
        assert check(bent(**{kind: data})) == "refused"


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_weights_of_another_type_are_refused_by_their_key(
    sound: Path, bent: Callable[..., Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    state = load_file(sound / "dit.safetensors")
    state["blocks.1.attn.proj.bias"] = state["blocks.1.attn.proj.bias"].to(dtype)
    save_file(state, tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"'blocks.1.attn.proj.bias' is of type"):
        load(bent(dit=(tmp_path / "a").read_bytes()))


# --- the registry ------------------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(data=st.binary(max_size=40) | st.text(max_size=300).map(lambda text: text.encode(errors="surrogatepass")))
def test_any_file_latest_names_a_version_or_is_refused(sound: Path, registry: Path, data: bytes) -> None:
    (registry / "tiny" / "latest").write_bytes(data)
    try:
        assert resolve(registry / "tiny").parent == registry / "tiny"
    except CheckpointError as error:
        assert "no checkpoint folder beside it" in str(error)
    assert set(models(registry)) == {"tiny"}
    assert {version.hash for version in versions(registry / "tiny")} >= {read_config(sound)[1]}
    assert signature(registry / "tiny")


@settings(max_examples=100)
@given(data=st.data())
def test_a_bent_manifest_is_listed_as_a_version_with_an_error_or_as_a_sound_one(sound: Path, registry: Path, data: st.DataObject) -> None:
    right = (sound / "checkpoint.json").read_bytes()
    wrong = data.draw(bent_bytes(right) | bent_json(json.loads(right)).map(lambda document: text_of(document).encode()))
    (registry / "tiny" / "bent" / "checkpoint.json").write_bytes(wrong)
    (listed,) = [version for version in versions(registry / "tiny") if version.name == "bent"]
    assert listed.error is None or listed.error.startswith(str(registry)) or "No such file" in listed.error
    with contextlib.suppress(ValueError):  # a CheckpointError, or a hash that is not told
        roll_back(registry / "tiny", "bent")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, sound: Path) -> Path:
    """A model with a sound version and one to be bent."""
    root = tmp_path_factory.mktemp("registry")
    for name in ("111111111111", "bent"):
        shutil.copytree(sound, root / "tiny" / name)
    return root


@given(st.text(max_size=20) | st.text(min_size=250, max_size=300) | st.sampled_from([".", "..", "", "a/b", "a\0", "\ud800", "\udcff"]))
def test_a_plain_name_leads_nowhere_else(name: str) -> None:
    if is_plain_name(name):
        assert "/" not in name and (Path("/registry") / name).parent == Path("/registry")
        assert not (Path("/registry") / name / "checkpoint.json").is_file()
