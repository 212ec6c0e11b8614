"""Images and labels from disk, whatever form they lie in, by one small interface: a Dataset of two Splits that are read by index.

| a folder with                                            | is read as                                      |
|----------------------------------------------------------|-------------------------------------------------|
| `train-images-idx3-ubyte[.gz]` and its three companions  | IDX files (idx.py)                              |
| `data_batch_1.bin` … or `train.bin`, `test.bin`          | CIFAR-10 or CIFAR-100, binary (cifar.py)        |
| `state.json`, `dataset_dict.json`, or `*.parquet`         | Hugging Face `datasets` on disk (arrow.py)      |
| `*.tar`                                                  | WebDataset shards (shards.py)                   |
| one sub-folder per class                                 | PNG, JPEG, WebP or BMP files (folder.py)        |

Where a source has a part `train` and a part `test` they are kept; one without has every tenth picture of a class held out.
Pictures are cropped as ADM crops them (pixels.py). Small sets are decoded once, others when they are read (encoded.py).
"""

from training.data.dataset import Dataset, Split, batch_indices, to_float
from training.data.load import load_dataset
from training.data.report import report_data

__all__ = ["Dataset", "Split", "batch_indices", "load_dataset", "report_data", "to_float"]
