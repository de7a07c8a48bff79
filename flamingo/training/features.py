"""Features of a training set's images and clips, made once by the frozen vision encoder and read ever after.

::

    features/
        laion-00000.safetensors     of the shard laion/00000.tar: for each medium a tensor [F, v, dim], named
        laion-00001.safetensors     by the hash of its content; [0] for one that could not be read

Every file says of which encoder and which preprocessing it is; one of others is refused. `encoding` makes
them.
"""

import hashlib
import os
import random
from collections.abc import Sequence
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flamingo import fingerprint
from flamingo.media import Features
from flamingo.processor import Processor
from flamingo.tensor_files import save_tensors
from flamingo.training.bad import DataError
from flamingo.training.config import Clips, DatasetConfig, TrainingConfig
from flamingo.training.files import File
from flamingo.training.samples import Show


class FeatureStore:
    """The files of one dataset's features.

    Args:
        dataset: with a folder of features.
        model: whose `vision` they are of, before anything is rounded or sharded.
        processor: of images to pixels.
        config: of the run.

    Raises:
        ValueError: if the model has no vision encoder, or one that is trained.
    """

    def __init__(
        self, dataset: DatasetConfig, model: nn.Module, processor: Processor, config: TrainingConfig
    ):
        vision = getattr(model, "vision", None)
        if not isinstance(vision, nn.Module):
            raise ValueError(
                f"train: expected a model with a vision encoder, `vision`, whose features dataset "
                f"{dataset.name!r} names, got {type(model).__name__}."
            )
        if any(parameter.requires_grad for parameter in vision.parameters()):
            raise ValueError(
                f"train: expected a frozen vision encoder, as dataset {dataset.name!r} reads its features, "
                "got one that is trained. Call freeze(), or leave features out."
            )
        self.folder = Path(str(dataset.features))
        self.settings = {
            "encoder": fingerprint.of_weights(vision, dtype=torch.bfloat16 if config.bfloat16 else None),
            "preprocessing": fingerprint.of_preprocessing(
                processor, max_pixels=dataset.max_pixels, bfloat16=config.bfloat16
            ),
        }

    def path(self, shard: str) -> Path:
        return _path(self.folder, shard)

    def has(self, shard: str) -> bool:
        """Whether there is a file for a shard.

        Raises:
            DataError: if it is of another encoder or another preprocessing.
        """
        path = self.path(shard)
        if not path.exists():
            return False
        found = self._metadata(path)
        for name, value in self.settings.items():
            if found.get(name) != value:
                raise DataError(
                    f"{path}: expected features of this run's {name}, got those of another"
                    f"{_of(found, name)}. Remove them and run `python -m flamingo encode` again, or name "
                    "another folder."
                )
        return True

    def is_done(self, shard: str) -> bool:
        """Whether a shard has not been touched since its features were made."""
        return self.has(shard) and self._metadata(self.path(shard)).get("shard") == _stamp(shard)

    def names(self, shard: str) -> frozenset[str]:
        """Of which media there are features."""
        if not self.has(shard):
            return frozenset()
        with import_module("safetensors").safe_open(self.path(shard), framework="pt") as file:
            return frozenset(file.keys())

    def check(self, shards: Sequence[str]) -> None:
        """Raises DataError if a shard has no features, or those of something else."""
        expect_made(self.folder, shards)
        for shard in shards:
            self.has(shard)

    def add(self, shard: str, tensors: dict[str, Tensor]) -> None:
        """A shard's features, beside those that there are; the file has its name once it is whole."""
        path = self.path(shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        known = import_module("safetensors.torch").load_file(path) if self.has(shard) else {}
        save_tensors(known | tensors, path, self.settings | {"shard": _stamp(shard)})

    def show(self, shard: str) -> Show:
        """What reads the features of a medium of this shard, instead of its files."""
        return partial(_read, str(self.path(shard)))

    @staticmethod
    def _metadata(path: Path) -> dict[str, str]:
        safetensors = import_module("safetensors")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                return file.metadata() or {}
        except safetensors.SafetensorError as error:
            raise DataError(f"{path}: expected features, got a file that cannot be read: {error}.") from error


def name_apart(folder: Path, shards: Sequence[str]) -> None:
    """Raises DataError if the features of two shards would have one name."""
    by_path: dict[Path, str] = {}
    for shard in shards:
        other = by_path.setdefault(_path(folder, shard), shard)
        if other != shard:
            raise DataError(
                f"encode: expected shards whose names, or whose folders' names, differ, got {other} and "
                f"{shard}, whose features would both be {_path(folder, shard)}."
            )


def expect_made(folder: Path, shards: Sequence[str]) -> None:
    """Raises DataError if there is no file for a shard, of whatever encoder."""
    missing = [shard for shard in shards if not _path(folder, shard).exists()]
    if missing:
        more = f", and none of {len(missing) - 1} others" if len(missing) > 1 else ""
        raise DataError(
            f"{_path(folder, missing[0])}: expected the features of {missing[0]}, got none{more}. Run "
            "`python -m flamingo encode` with the same file first."
        )


def _path(folder: Path, shard: str) -> Path:
    parent, name = os.path.split(os.path.abspath(shard))
    return folder / f"{os.path.basename(parent)}-{os.path.splitext(name)[0]}.safetensors"


def _stamp(shard: str) -> str:
    about = os.stat(shard)
    return f"{about.st_size} bytes, {about.st_mtime_ns}"


def _of(found: dict[str, str], name: str) -> str:
    """Of which preprocessing; a fingerprint says nothing to anybody."""
    return f", {found[name]}" if name == "preprocessing" and name in found else ""


def name_of(config: DatasetConfig, files: list[File]) -> str:
    """A hash of a medium's content, and of what is taken of a video."""
    digest = hashlib.sha256()
    for file in files:
        taken = f" {config.fps} {config.frames}" if isinstance(config, Clips) and file.is_video else ""
        digest.update(f"{len(file.content)}{taken}\n".encode())
        digest.update(file.content)
    return digest.hexdigest()


@lru_cache(maxsize=16)
def _open(path: str, changed: int) -> Any:
    return import_module("safetensors").safe_open(path, framework="pt")


def _read(path: str, config: DatasetConfig, files: list[File], draw: random.Random) -> Features:
    name = name_of(config, files)
    try:
        tensor = _open(path, os.stat(path).st_mtime_ns).get_tensor(name)
    except import_module("safetensors").SafetensorError as error:
        raise DataError(
            f"{path}: expected features of {files[0].name}, got none: the shard has changed, or the "
            "dataset's frames or fps. Run `python -m flamingo encode` again."
        ) from error
    if not tensor.numel():
        raise ValueError(
            f"expected {files[0].name} to be an image or a clip, got one that encode could not read"
        )
    return Features(tensor)
