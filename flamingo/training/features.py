"""Features of a training set's images and clips, made once by the frozen vision encoder and read ever after.

::

    features/
        laion-00000.safetensors     of the shard laion/00000.tar: for each medium a tensor [F, v, dim], named
        laion-00001.safetensors     by the hash of its content; [0] for one that could not be read

Every file says of which encoder and which preprocessing it is; one of others is refused.
"""

import hashlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from flamingo.media import Features
from flamingo.processor import Processor
from flamingo.training.bad import DataError
from flamingo.training.config import Clips, DatasetConfig, TrainingConfig
from flamingo.training.files import File
from flamingo.training.optimizer import store_as
from flamingo.training.processes import device_of, rank, wait_for_all, world_size
from flamingo.training.samples import Show, parts_of, read_file
from flamingo.training.shards import Entry, entries, find_shards

FRAMES = 32  # encoded at once


def encode(model: nn.Module, processor: Processor, config: TrainingConfig) -> int:
    """Writes the features of every dataset that names a folder for them.

    Shards that have theirs are passed over, so the same call goes on where one was stopped. Several processes
    (torchrun) share the shards.

    Args:
        model: whose `vision` encodes; that is moved to the device and, with `config.bfloat16`, rounded.
        processor: of images to pixels, as for training.
        config: the run.

    Returns:
        How many media this process has encoded.

    Raises:
        FileNotFoundError: if there are no shards.
        DataError: if no dataset names a folder, features are there of another encoder or preprocessing, or a
            shard is damaged.

    Limits: the features of a shard are held in memory until they are written.

    >>> import tempfile
    >>> from PIL import Image
    >>> from flamingo.training import Pairs, TrainingConfig, pair_sample, train, write_shards
    >>> model = Flamingo(FlamingoConfig.preset("tiny")).freeze()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     samples = [pair_sample(Image.new("RGB", (9, 9), c), f"a {c} square") for c in ("red", "blue")]
    ...     _ = write_shards(f"{folder}/squares", samples)
    ...     still = {"flip": 0.0, "colour": 0.0, "features": f"{folder}/features"}
    ...     squares = Pairs(name="squares", shards=(f"{folder}/squares",), batch_size=2, **still)
    ...     run = TrainingConfig(folder=f"{folder}/run", datasets=(squares,), steps=1, workers=0)
    ...     encode(model, Processor(image_size=32), run), train(model, Processor(image_size=32), run).name
    (2, 'step-00000001')
    """
    named = [dataset for dataset in config.datasets if dataset.features is not None]
    if not named:
        raise DataError('encode: expected a dataset with a folder, as features = "features", got none.')
    device, encoded = device_of(config.device), 0
    stores = [(dataset, FeatureStore(dataset, model, processor, config)) for dataset in named]
    vision: Any = model.vision
    vision.to(device).eval()
    if config.bfloat16:
        store_as(torch.bfloat16, vision.parameters())
    for dataset, store in stores:
        shards = find_shards(dataset.shards)
        store.name_apart(shards)
        for shard in import_module("tqdm").tqdm(
            shards[rank() :: world_size()], desc=dataset.name, unit="shard"
        ):
            if store.is_done(shard):
                continue
            known = store.names(shard)
            media = _Media(dataset, processor, entries(shard), known)
            loader = DataLoader(
                media, batch_size=None, num_workers=config.workers, generator=torch.Generator()
            )
            tensors = dict(_encoded(vision, loader, device, config.bfloat16))
            store.add(shard, tensors)
            encoded += len(tensors)
    wait_for_all()
    return encoded


class FeatureStore:
    """The files of one dataset's features.

    Args:
        dataset: with a folder of features.
        model: whose `vision` they are of, before anything is rounded or sharded.
        processor: of images to pixels.
        config: of the run.

    Raises:
        ValueError: if the model has no vision encoder.
    """

    def __init__(
        self, dataset: DatasetConfig, model: nn.Module, processor: Processor, config: TrainingConfig
    ):
        if not isinstance(getattr(model, "vision", None), nn.Module):
            raise ValueError(
                f"train: expected a model with a vision encoder, `vision`, whose features dataset "
                f"{dataset.name!r} names, got {type(model).__name__}."
            )
        self.folder = Path(str(dataset.features))
        self.settings = {
            "encoder": _fingerprint(model.vision, config.bfloat16),
            "preprocessing": json.dumps(
                {
                    "image_size": processor.image_size,
                    "mean": processor.mean.flatten().tolist(),
                    "std": processor.std.flatten().tolist(),
                    "fit": processor.fit,
                    "max_pixels": dataset.max_pixels,
                    "bfloat16": config.bfloat16,
                }
            ),
        }

    def path(self, shard: str) -> Path:
        folder, name = os.path.split(os.path.abspath(shard))
        return self.folder / f"{os.path.basename(folder)}-{os.path.splitext(name)[0]}.safetensors"

    def name_apart(self, shards: Sequence[str]) -> None:
        """Raises DataError if the features of two shards would have one name."""
        by_path: dict[Path, str] = {}
        for shard in shards:
            other = by_path.setdefault(self.path(shard), shard)
            if other != shard:
                raise DataError(
                    f"encode: expected shards whose names, or whose folders' names, differ, got {other} and "
                    f"{shard}, whose features would both be {self.path(shard)}."
                )

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
        missing = [shard for shard in shards if not self.has(shard)]
        if missing:
            more = f", and none of {len(missing) - 1} others" if len(missing) > 1 else ""
            raise DataError(
                f"{self.path(missing[0])}: expected the features of {missing[0]}, got none{more}. Run "
                "`python -m flamingo encode` with the same file first."
            )

    def add(self, shard: str, tensors: dict[str, Tensor]) -> None:
        """A shard's features, beside those that there are; the file has its name once it is whole."""
        safetensors = import_module("safetensors.torch")
        path = self.path(shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        known = safetensors.load_file(path) if self.has(shard) else {}
        metadata = self.settings | {"shard": _stamp(shard)}
        safetensors.save_file(known | tensors, unfinished, metadata=metadata)
        os.replace(unfinished, path)

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


def _stamp(shard: str) -> str:
    about = os.stat(shard)
    return f"{about.st_size} bytes, {about.st_mtime_ns}"


def _of(found: dict[str, str], name: str) -> str:
    """Of which preprocessing; a fingerprint says nothing to anybody."""
    return f", {found[name]}" if name == "preprocessing" and name in found else ""


def _fingerprint(vision: Any, bfloat16: bool) -> str:
    """A hash of the encoder's weights as it computes with them."""
    digest = hashlib.sha256()
    for name, value in vision.state_dict().items():
        value = value.detach().cpu()
        value = value.bfloat16() if bfloat16 and value.is_floating_point() else value
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _name(config: DatasetConfig, files: list[File]) -> str:
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
    name = _name(config, files)
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


class _Media(Dataset):
    """The media of each sample that are not known yet: their names, and their pixels or None."""

    def __init__(
        self, config: DatasetConfig, processor: Processor, listed: list[Entry], known: frozenset[str]
    ):
        self.config = config
        self.processor = processor
        self.listed = listed
        self.known = known

    def __len__(self) -> int:
        return len(self.listed)

    def __getitem__(self, index: int) -> list[tuple[str, Tensor | None]]:
        try:
            parts = parts_of(self.config, self.listed[index].read())
        except (ValueError, FileNotFoundError, RecursionError):
            return []  # training will count it
        media = {_name(self.config, part): part for part in parts if not isinstance(part, str)}
        return [(name, self._clip(files)) for name, files in media.items() if name not in self.known]

    def _clip(self, files: list[File]) -> Tensor | None:
        """float32 `[F, 3, image_size, image_size]`."""
        try:
            return self.processor.clip([frame for file in files for frame in read_file(self.config, file)])
        except ValueError:
            return None


@torch.no_grad()
def _encoded(
    vision: Any, samples: DataLoader, device: torch.device, bfloat16: bool
) -> Iterator[tuple[str, Tensor]]:
    """The features of each medium, once, some of them encoded together: frames never mix in an encoder."""
    waiting: dict[str, Tensor] = {}
    seen: set[str] = set()

    def together() -> Iterator[tuple[str, Tensor]]:
        if waiting:
            pixels = torch.cat(list(waiting.values()))[None, None].to(device)  # [1, 1, all frames, 3, h, w]
            features = vision(pixels.bfloat16() if bfloat16 else pixels)[0, 0].cpu()
            for name, each in zip(waiting, features.split([len(c) for c in waiting.values()]), strict=True):
                yield name, each.clone()
            waiting.clear()

    for media in samples:
        for name, clip in media:
            if name in seen:
                continue
            seen.add(name)
            if clip is None:
                yield name, torch.zeros(0)
                continue
            waiting[name] = clip
            if sum(map(len, waiting.values())) >= FRAMES:
                yield from together()
    yield from together()
