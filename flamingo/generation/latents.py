"""What a model makes of images and clips, each made once and kept: in memory, and then in files.

::

    folder/
        2f0c....safetensors     some media: the latents [R, D_v] of each, by the hash of its content, and
        9b41....safetensors     the embedding [dim] that RICES compares

Every file says of which model and which preprocessing it is; one of others is refused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from uuid import uuid4

import torch
import torch.nn.functional as F
from torch import Tensor

from flamingo import fingerprint
from flamingo.processor import Processor
from flamingo.tensor_files import save_tensors

_IN_A_FILE = 512  # media


class Kept(NamedTuple):
    """What is kept of a medium, on the CPU."""

    latents: Tensor  # [R, D_v]
    embedding: Tensor  # float32 [dim], the mean of its features, of length 1

    @property
    def bytes(self) -> int:
        return sum(each.numel() * each.element_size() for each in self)


class Latents:
    """The latents of media, each encoded when it is first asked for, and never again.

    Two media are one if they have the same content, whatever objects or files hold it. In a model with media
    embeddings (`max_num_media`) a medium has other latents in every place of a document.

    Args:
        model: a Flamingo in eval mode, whose weights stay as they are.
        processor: of the model.
        folder: where they are kept for runs to come; None for no longer than this object lives.
        memory: bytes of latents held in memory; others are read from files.
        batch_size: how many media are encoded at once.

    Raises:
        ValueError: if the folder has latents of another model or another preprocessing.
        ImportError: without safetensors, where files are needed.

    Determinism: up to rounding, those of `Flamingo.encode_media`, whatever comes together.

    >>> model, processor = Flamingo(FlamingoConfig.preset("tiny")).eval(), Processor(image_size=32)
    >>> latents, black = Latents(model, processor), torch.zeros(3, 8, 8)
    >>> latents.of_documents([[black], [black, torch.ones(3, 8, 8)]]).shape, latents.encoded
    (torch.Size([2, 2, 8, 40]), 2)
    """

    def __init__(
        self,
        model: Any,
        processor: Processor,
        folder: Path | None = None,
        *,
        memory: int = 2**30,
        batch_size: int = 8,
    ):
        self.model = model
        self.processor = processor
        self.memory = memory
        self.batch_size = batch_size
        self.encoded = 0  # media so far
        self._kept: OrderedDict[str, Kept] = OrderedDict()  # the first was asked for longest ago
        self._held = 0  # bytes
        self._unsaved: dict[str, Kept] = {}
        self._errors: dict[str, str] = {}
        self._files = _Files(folder, model, processor)

    def broken(self, media: Sequence[Any]) -> list[str | None]:
        """Why each of some media cannot be read; None for those that are now encoded.

        Raises:
            FileNotFoundError: if there is no such file.
        """
        names = self._keep(media, [0] * len(media))
        return [self._errors.get(_content(name)) for name in names]

    def of_documents(self, documents: Sequence[Sequence[Any]], *, first: int = 0) -> Tensor:
        """The latents of the media of each document, in order.

        Args:
            documents: P lists of media.
            first: how many media come before those of each document.

        Returns:
            `[P, M, R, D_v]` on the model's device, zeros after the last medium of a document.

        Raises:
            ValueError: if a medium cannot be read.
        """
        places = [first + place for media in documents for place in range(len(media))]
        names = iter(self._keep([medium for media in documents for medium in media], places))
        shape = self.model.resampler.latents
        latents = shape.new_zeros(len(documents), max(map(len, documents), default=0), *shape.shape)
        for row, media in enumerate(documents):
            for column in range(len(media)):
                latents[row, column] = self._get(next(names)).latents
        return latents

    def embeddings(self, media: Sequence[Any]) -> Tensor:
        """The mean of each medium's features, of length 1, float32 `[N, dim]`.

        Raises:
            ValueError: if a medium cannot be read.
        """
        names = self._keep(media, [0] * len(media))
        if not names:
            return torch.zeros(0, self.model.vision.dim)
        return torch.stack([self._get(name).embedding for name in names])

    def save(self) -> None:
        """Writes what is in memory alone to the folder, if there is one."""
        if self._files.last and self._unsaved:
            self._files.add(self._unsaved)
            self._unsaved = {}

    def _get(self, name: str) -> Kept:
        if _content(name) in self._errors:
            raise ValueError(self._errors[_content(name)])
        found = self._kept.get(name)
        if found is None:
            found = self._files.read(name)
            self._hold(name, found)
        else:
            self._kept.move_to_end(name)
        return found

    def _keep(self, media: Sequence[Any], places: Sequence[int]) -> list[str]:
        """Encodes what is not known; gives the name of each medium in its place of a document."""
        if not self.model.config.max_num_media:
            places = [0] * len(media)
        contents = [self._name(medium) for medium in media]
        names = [f"{content}.{place}" for content, place in zip(contents, places, strict=True)]
        wanted = {
            name: (medium, place)
            for name, medium, place in zip(names, media, places, strict=True)
            if not (name in self._kept or name in self._files or _content(name) in self._errors)
        }
        for some in self._clips(wanted):
            encoded = self._encode([clip for _, clip, _ in some], [place for *_, place in some])
            for (name, *_), kept in zip(some, encoded, strict=True):
                self._unsaved[name] = kept
                self._hold(name, kept)
            if len(self._unsaved) >= _IN_A_FILE:
                self.save()
        return names

    def _name(self, medium: Any) -> str:
        """The name of a medium's content; of one that cannot be read, why."""
        try:
            return fingerprint.of_medium(medium, self.processor)
        except ValueError as error:
            self._errors[str(error)] = str(error)
            return str(error)

    def _clips(self, wanted: dict[str, tuple[Any, int]]) -> Iterator[list[tuple[str, Tensor, int]]]:
        """Names, pixels or features, and places: as many as are encoded at once, of one size."""
        waiting: dict[tuple, list[tuple[str, Tensor, int]]] = {}
        for name, (medium, place) in wanted.items():
            try:
                clip = self.processor.clip(medium)
            except ValueError as error:
                self._errors[_content(name)] = str(error)
                continue
            some = waiting.setdefault((clip.shape[1:], place), [])
            some.append((name, clip, place))
            if len(some) == self.batch_size:
                yield waiting.pop((clip.shape[1:], place))
        yield from waiting.values()

    @torch.no_grad()
    def _encode(self, clips: list[Tensor], places: list[int]) -> Iterator[Kept]:
        """Clips `[F, 3, h, w]`, or features `[F, v, dim]`, that stand in one place of their documents."""
        device = self.model.resampler.latents.device
        x, num_frames = self.processor.pad_clips([[clip] for clip in clips])
        features = x.to(device) if clips[0].ndim == 3 else self.model.vision(x.to(device))
        lengths = None if num_frames is None else num_frames.to(device)
        place = places[0]
        # Media before it are empty: each is resampled by itself.
        at_place = F.pad(features.flatten(2), (0, 0, place, 0)).unflatten(2, features.shape[2:])
        if lengths is not None:
            lengths = F.pad(lengths, (place, 0), value=features.shape[2])
        latents = self.model.encode_media(at_place, lengths)[:, place].cpu()
        self.encoded += len(clips)
        means = features[:, 0].float().mean(dim=2)  # [n, F, dim]
        for clip, each, mean in zip(clips, latents, means, strict=True):
            yield Kept(each, F.normalize(mean[: len(clip)].mean(dim=0), dim=-1).cpu())

    def _hold(self, name: str, kept: Kept) -> None:
        """Holds one in memory, and others no longer if they are too many."""
        self._kept[name] = kept
        self._held += kept.bytes
        while self._held > self.memory and len(self._kept) > 1:
            if next(iter(self._kept)) in self._unsaved:
                self._files.add(self._unsaved)
                self._unsaved = {}
            self._held -= self._kept.popitem(last=False)[1].bytes


class _Files:
    """The files of a folder, or of a folder for the time being."""

    def __init__(self, folder: Path | None, model: Any, processor: Processor):
        self.last = folder is not None  # whether they outlive this process
        self.folder = folder
        self.settings: dict[str, str] = {}
        self.where: dict[str, Path] = {}  # the file that has a medium
        if folder is None:
            return
        self.settings = {
            "vision": fingerprint.of_weights(model.vision),
            "resampler": f"{fingerprint.of_weights(model.resampler)} {_unseen(model.config)}",
            "preprocessing": fingerprint.of_preprocessing(
                processor,
                fps=processor.fps,
                max_frames=processor.max_frames,
                max_pixels=processor.max_pixels,
            ),
        }
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("*.safetensors")):
            self.where |= dict.fromkeys(self._names(path), path)

    def __contains__(self, name: str) -> bool:
        return name in self.where

    def add(self, media: dict[str, Kept]) -> None:
        """Writes a file, which has its name once it is whole."""
        if self.folder is None:
            self.temporary = TemporaryDirectory(prefix="flamingo-latents-")  # removed with this object
            self.folder = Path(self.temporary.name)
        path = self.folder / f"{uuid4().hex}.safetensors"  # other processes may write there too
        tensors = {
            f"{name}.{part}": x.contiguous()
            for name, kept in media.items()
            for part, x in kept._asdict().items()
        }
        save_tensors(tensors, path, self.settings)
        self.where |= dict.fromkeys(media, path)

    def read(self, name: str) -> Kept:
        with _open(self.where[name]) as file:
            return Kept(*(file.get_tensor(f"{name}.{part}") for part in Kept._fields))

    def _names(self, path: Path) -> list[str]:
        """The names of a file's media, if it is of these settings."""
        with _open(path) as file:
            found, names = file.metadata() or {}, list(file.keys())
        for setting, value in self.settings.items():
            if found.get(setting) != value:
                raise ValueError(
                    f"{path}: expected latents of this model's {setting}, got those of another. Remove the "
                    "folder, or name another."
                )
        return sorted({name.rpartition(".")[0] for name in names})


def _unseen(config: Any) -> str:
    """What decides a resampler's latents and does not show in its weights."""
    return f"heads={config.resampler_heads} activation={config.activation}"


def _open(path: Path) -> Any:
    safetensors = import_module("safetensors")
    try:
        return safetensors.safe_open(path, framework="pt")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: expected latents, got a file that cannot be read: {error}.") from error


def _content(name: str) -> str:
    """The hash of a medium's content, without its place."""
    return name.rpartition(".")[0]
