"""Text on the machine -> shards of tokens -> batches that are a pure function of (manifest, seed, step). No torch."""

from hydra.data.build import open_dataset, prepare_dataset
from hydra.data.corpora import check_corpus
from hydra.data.loader import IGNORE_INDEX, Batch, Dataset
from hydra.data.spec import BOS_TOKEN, DataSpec

__all__ = [
    "BOS_TOKEN",
    "IGNORE_INDEX",
    "Batch",
    "DataSpec",
    "Dataset",
    "check_corpus",
    "open_dataset",
    "prepare_dataset",
]
