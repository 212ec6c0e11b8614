"""Which kind of data a folder holds."""

from pathlib import Path

from training.config import DataConfig
from training.data import arrow
from training.data.cifar import find_cifar, load_cifar
from training.data.dataset import Dataset
from training.data.folder import load_folder
from training.data.idx import find_idx, load_idx
from training.data.parts import files_of
from training.data.shards import load_shards

KEPT_IN = Path("runs/data")  # what was found out about large sets, and parquet files rewritten


def load_dataset(folder: str | Path, config: DataConfig, kept_in: Path = KEPT_IN) -> Dataset:
    """Read both splits at the recipe's size. ValueError says what was looked for and what was found."""
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"no data folder at {root}")
    if find_idx(root, "train-images-idx3-ubyte"):
        return load_idx(root, config)
    if cifar := find_cifar(root):
        return load_cifar(root, cifar, config)
    if any((root / name).is_file() for name in (arrow.SPLITS, arrow.STATE)):
        return arrow.load_saved(root, config, kept_in)
    if parquet := files_of(root, ".parquet"):
        return arrow.load_parquet(root, parquet, config, kept_in)
    if shards := files_of(root, ".tar"):
        return load_shards(root, shards, config, kept_in)
    if any(p.is_dir() for p in root.iterdir()):
        return load_folder(root, config, kept_in)
    raise ValueError(
        f"{root} holds neither IDX files (train-images-idx3-ubyte[.gz] …), CIFAR's (data_batch_1.bin …), a saved Hugging Face dataset, "
        "*.parquet files nor *.tar shards, nor one sub-folder of images per class"
    )
