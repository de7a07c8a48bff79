"""`encode`: a training set's images and clips through the frozen vision encoder, for `features` to keep."""

from collections.abc import Iterator
from contextlib import ExitStack
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from flamingo.processor import Processor
from flamingo.training import interrupt
from flamingo.training.bad import DataError
from flamingo.training.config import DatasetConfig, TrainingConfig
from flamingo.training.features import FeatureStore, name_apart, name_of
from flamingo.training.files import File
from flamingo.training.lock import locked
from flamingo.training.optimizer import store_as
from flamingo.training.processes import device_of, rank, wait_for_all, world_size
from flamingo.training.samples import parts_of, read_file
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
        ValueError: if another process encodes into one of the folders.
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
    with ExitStack() as stack:
        for store in (store for _, store in stores if rank() == 0):
            stack.enter_context(locked(store.folder))
        for dataset, store in stores:
            shards = find_shards(dataset.shards)
            name_apart(store.folder, shards)
            mine = shards[rank() :: world_size()]
            for shard in import_module("tqdm").tqdm(mine, desc=dataset.name, unit="shard"):
                if not store.is_done(shard):
                    media = _Media(dataset, processor, entries(shard), store.names(shard))
                    tensors = dict(_encoded(vision, _loader(media, config.workers), device, config.bfloat16))
                    store.add(shard, tensors)
                    encoded += len(tensors)
        wait_for_all()
    return encoded


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
        media = {name_of(self.config, part): part for part in parts if not isinstance(part, str)}
        return [(name, self._clip(files)) for name, files in media.items() if name not in self.known]

    def _clip(self, files: list[File]) -> Tensor | None:
        """float32 `[F, 3, image_size, image_size]`."""
        try:
            return self.processor.clip([frame for file in files for frame in read_file(self.config, file)])
        except ValueError:
            return None


def _loader(media: _Media, workers: int) -> DataLoader:
    return DataLoader(
        media,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=interrupt.ignore,
        generator=torch.Generator(),
    )


@torch.no_grad()
def _encoded(
    vision: Any, samples: DataLoader, device: torch.device, bfloat16: bool
) -> Iterator[tuple[str, Tensor]]:
    """The features of each medium, once, those of some at a time."""
    waiting: dict[str, Tensor] = {}
    seen: set[str] = set()
    for name, clip in (medium for media in samples for medium in media):
        if name in seen:
            continue
        seen.add(name)
        if clip is None:
            yield name, torch.zeros(0)
            continue
        waiting[name] = clip
        if sum(map(len, waiting.values())) >= FRAMES:
            yield from _together(vision, waiting, device, bfloat16)
            waiting = {}
    if waiting:
        yield from _together(vision, waiting, device, bfloat16)


def _together(
    vision: Any, clips: dict[str, Tensor], device: torch.device, bfloat16: bool
) -> Iterator[tuple[str, Tensor]]:
    """As frames of one clip: frames never mix in an encoder."""
    pixels = torch.cat(list(clips.values()))[None, None].to(device)  # [1, 1, all frames, 3, h, w]
    features = vision(pixels.bfloat16() if bfloat16 else pixels)[0, 0].cpu()
    for name, each in zip(clips, features.split([len(clip) for clip in clips.values()]), strict=True):
        yield name, each.clone()
