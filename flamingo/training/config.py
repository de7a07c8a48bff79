"""What a training run is: every choice, with the paper's values where the paper gives one."""

import difflib
import sys
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

from flamingo.media import MAX_PIXELS
from flamingo.ranges import POSITIVE, SHARE, Range, at_least, at_most, expect_ranges

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_RANGES = {
    # of a dataset
    "weight": POSITIVE,
    "batch_size": POSITIVE,
    "micro_batch_size": POSITIVE,
    "length": at_least(5),  # <BOS>, <image>, <EOC> and <EOS> leave one token
    "flip": SHARE,
    "colour": SHARE,
    "max_pixels": POSITIVE,
    "max_images": at_least(0),
    "min_similarity": Range("a cosine in -1..1", lambda value: -1 <= value <= 1),
    "p_next": SHARE,
    "space": SHARE,
    "frames": POSITIVE,
    "fps": POSITIVE,
    # of a run
    "steps": at_least(0),
    "learning_rate": POSITIVE,
    "warmup_steps": at_least(0),
    "weight_decay": at_least(0),
    "eps": POSITIVE,
    "max_grad_norm": POSITIVE,
    "seed": Range("in 0..2**63 - 1", lambda value: 0 <= value < 2**63),
    "shards_at_once": POSITIVE,
    "workers": at_least(0),
    "checkpoint_every": POSITIVE,
    "keep": POSITIVE,
    "max_bad": SHARE,
}
# What is above is a slip of the hand: it would fill the memory, or the machine with processes.
_MOST = {name: at_most(2**31 - 1) for name in _RANGES} | {
    "batch_size": at_most(1_000_000),
    "workers": at_most(1000),
    "seed": at_most(2**63 - 1),
}


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """One dataset of the mixture; what all kinds have.

    Args:
        name: what logs and checkpoints call it.
        shards: tar files in WebDataset's format, see `flamingo.training.shards`; `*`, `?` and braces as in a
            shell, as `laion/{00000..00231}.tar`, or folders.
        weight: lambda, the factor of its loss.
        batch_size: samples in a step, over all processes.
        micro_batch_size: samples of a process that are computed at once, None for all; their gradients add up
            to the same.
        length: tokens of a sample at most, 5 or more.
        flip, colour: probabilities that an image or a clip is mirrored, and that its colours are changed; see
            `augment`. 0 and 0 leave images as they are.
        max_pixels: of an image or a frame; a larger one is bad before it is decoded.
        features: a folder of features that `python -m flamingo encode` has made of the images, which are then
            not looked at; flip and colour have to be 0. None to encode the images in every step.
    """

    kind: ClassVar[str]

    name: str
    shards: tuple[str, ...]
    weight: float
    batch_size: int
    micro_batch_size: int | None = None
    length: int
    flip: float = 0.5
    colour: float = 0.8
    max_pixels: int = MAX_PIXELS
    features: str | None = None

    def __post_init__(self):
        where = f"dataset {self.name!r}"
        if not self.name:
            raise ValueError("expected a dataset to have a name, got an empty one.")
        if not self.shards:
            raise ValueError(f"expected {where} to have shards, got none.")
        expect_ranges(self, _RANGES, of=where)
        expect_ranges(self, _MOST, of=where)
        if self.features is not None:
            _expect_name("features", self.features)
        if self.features is not None and (self.flip or self.colour):
            raise ValueError(
                f"expected flip = 0 and colour = 0 of {where}, whose features are of images "
                f"as they are, got {self.flip} and {self.colour}."
            )


@dataclass(frozen=True, kw_only=True)
class Documents(DatasetConfig):
    """Web pages of interleaved text and images, the paper's M3W.

    Args:
        weight, batch_size, length: as in `DatasetConfig`; the batch is that of the paper's ablations, which
            keeps the final one to itself. A longer document is cut to a random window of that length.
        max_images: images of a window; the first are kept, later ones are left out.
        images: a folder of image files that pages name, for those that are not in the shards: MMC4's
            `image_name`.
        min_similarity: MMC4's images that are less like their text are left out; open_flamingo's threshold.
        p_next: probability that a document's text sees the next image instead of the last.
    """

    kind: ClassVar[str] = "documents"

    weight: float = 1.0
    batch_size: int = 256
    length: int = 256
    max_images: int = 5
    images: str | None = None
    min_similarity: float = 0.24
    p_next: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Captioned(DatasetConfig):
    """Images or clips with captions; what both kinds have.

    Args:
        weight, batch_size, length: as in `DatasetConfig`. The end of a longer caption is left out.
        space: probability of a space in front of a caption.
    """

    length: int = 64
    space: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Pairs(Captioned):
    """Images with captions, the paper's ALIGN and LTIP; arguments as in `Captioned`."""

    kind: ClassVar[str] = "pairs"

    weight: float = 0.2
    batch_size: int = 512


@dataclass(frozen=True, kw_only=True)
class Clips(Captioned):
    """Clips with captions, the paper's VTP.

    Args:
        weight, batch_size, length, space: as in `Captioned`.
        frames: of a clip; the first are kept.
        fps: frames a second that are read of a video file.
    """

    kind: ClassVar[str] = "clips"

    weight: float = 0.03
    batch_size: int = 64
    frames: int = 8
    fps: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model that `python -m flamingo train` builds.

    Args:
        preset: see `FlamingoConfig.preset`; of a tower in a folder the sizes are that tower's.
        changes: fields of `FlamingoConfig` with other values.
        vision: a folder of transformers with a CLIP or a SigLIP and its `preprocessor_config.json`.
        language: a folder of transformers with a causal language model, of a family that
            `PretrainedLanguage` knows or MPT-1B, and its tokenizer. `<|endofchunk|>` and `<image>` are added
            as by open_flamingo, and their embeddings are trained.
        checkpoint: of open_flamingo, see `load_open_flamingo`; needs both folders.
        vision_weights, language_weights: safetensors of frozen parts that are no folders, with the names of
            `model.vision` and `model.language`; None leaves such a part random.

    Raises:
        ValueError: for keys that contradict each other.
    """

    preset: str
    changes: dict[str, Any] = field(default_factory=dict)
    vision: str | None = None
    language: str | None = None
    checkpoint: str | None = None
    vision_weights: str | None = None
    language_weights: str | None = None

    def __post_init__(self):
        for tower, decided in _DECIDED.items():
            if getattr(self, tower) is None:
                continue
            if getattr(self, f"{tower}_weights") is not None:
                raise ValueError(f"[model]: expected {tower} or {tower}_weights, got both. Remove one.")
            others = sorted(decided & self.changes.keys())
            if others:
                raise ValueError(
                    f"[model]: expected changes without {', '.join(others)}, which {tower} = "
                    f'"{getattr(self, tower)}" decides. Remove {"it" if len(others) == 1 else "them"}.'
                )
        if self.checkpoint is not None and (self.vision is None or self.language is None):
            raise ValueError(
                f'[model]: expected vision and language beside checkpoint = "{self.checkpoint}", the folders '
                "of the towers it was trained with."
            )


# The fields of FlamingoConfig that a tower decides.
_DECIDED = {
    "vision": {"vision", "image_size", "vision_dim", "patch_size", "vision_layers", "vision_heads"},
    "language": {
        "vocab_size",
        "language_dim",
        "language_layers",
        "language_heads",
        "language_positions",
        "tie_embeddings",
        "new_tokens",
        "media_token_id",
    },
}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """A training run. Defaults are the paper's; AdamW's betas and eps, which it does not give, are PyTorch's.

    Args:
        folder: where checkpoints and logs go, on a disk that all processes see; a folder that has a
            checkpoint is continued.
        datasets: the mixture, `Documents`, `Pairs` and `Clips`.
        steps: updates of the whole run.
        learning_rate: after the warm-up, then constant.
        warmup_steps: over which it grows from 0 in a straight line.
        weight_decay: AdamW's; not of parameters whose name begins with one of `no_decay`.
        max_grad_norm: longest gradient of all trained parameters together.
        bfloat16: parameters, activations and gradients of one pass in bfloat16, frozen parameters also stored
            so; trained ones, their sums of gradients and AdamW's moments are float32. False: all as the model
            is.
        gradient_checkpointing: keep the inputs of a block only, and compute the block again for its gradient.
        seed: of the data's order and of everything drawn in it.
        shards_at_once: shards whose samples are shuffled together; all of them give a perfect shuffle.
        workers: processes that read and decode each dataset; 0 for none.
        device: "auto" takes a GPU where there is one.
        kernels: whether the command line trains with the kernels, where they are installed; `train` itself
            takes a model as it is. Only speed and rounding depend on it: a run may go on with another value.
        checkpoint_every: updates between two checkpoints.
        keep: checkpoints that are kept, the latest.
        max_bad: share of a dataset's samples that may be bad: cut or missing images, captions that are none.
            They are left out and counted, and another sample takes the place of each. A larger share stops
            the run: after a whole epoch, or earlier where chance would not explain it.
        tensorboard: write TensorBoard's files too.
        model: what the command line builds; `train` itself is given a model.

    Raises:
        ValueError: for a value out of its range.

    Source: arXiv 2204.14198, section 2.4, appendices B.1.2 and B.2.

    >>> config = TrainingConfig(folder="run", datasets=(Pairs(name="ltip", shards=("ltip/*.tar",)),))
    >>> config.learning_rate, config.warmup_steps, config.weight_decay, config.datasets[0].weight
    (0.0001, 5000, 0.1, 0.2)
    """

    folder: str
    datasets: tuple[DatasetConfig, ...]
    steps: int = 500_000
    learning_rate: float = 1e-4
    warmup_steps: int = 5000
    weight_decay: float = 0.1
    no_decay: tuple[str, ...] = ("resampler",)
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    bfloat16: bool = True
    gradient_checkpointing: bool = False
    seed: int = 0
    shards_at_once: int = 8
    workers: int = 2
    device: str = "auto"
    kernels: bool = True
    checkpoint_every: int = 1000
    keep: int = 3
    max_bad: float = 0.1
    tensorboard: bool = False
    model: ModelConfig | None = None

    def __post_init__(self):
        _expect_name("folder", self.folder)
        names = [dataset.name for dataset in self.datasets]
        if not names:
            raise ValueError("expected datasets, each a table [[datasets]], got none.")
        if len(set(names)) < len(names):
            raise ValueError(f"expected datasets of different names, got {names}.")
        expect_ranges(self, _RANGES, of="the run")
        expect_ranges(self, _MOST, of="the run")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"expected two betas from 0 to below 1, got {self.betas}.")

    @staticmethod
    def from_toml(path: str | Path) -> "TrainingConfig":
        """The run that a TOML file describes: fields as keys, `[[datasets]]` with a `kind` each, `[model]`.

        Raises:
            ValueError: for a key that does not exist, is missing, or has a value of the wrong type.
        """
        return TrainingConfig.from_text(Path(path).read_bytes(), path)

    @staticmethod
    def from_text(text: bytes, path: str | Path) -> "TrainingConfig":
        """The run that the text of a TOML file describes; `path` is for errors, which are `from_toml`'s."""
        try:
            table = tomllib.loads(text.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: expected TOML, got: {error}.") from error
        tables = table.pop("datasets", [])
        if not (isinstance(tables, list) and all(isinstance(each, dict) for each in tables)):
            raise ValueError(
                f"{path}: expected datasets as tables, each under [[datasets]], got {tables!r:.60}."
            )
        datasets = tuple(_dataset(each, path) for each in tables)
        model = table.pop("model", None)
        if model is not None:
            if not isinstance(model, dict):
                raise ValueError(f"{path}: expected a table [model], got {model!r:.60}.")
            model = _from_table(ModelConfig, model, f"{path}, [model]")
        return _from_table(TrainingConfig, {**table, "datasets": datasets, "model": model}, str(path))


def _expect_name(field: str, name: str) -> None:
    """Raises ValueError for what is no name of a folder that may be made."""
    if not name or "\0" in name:
        raise ValueError(f"expected {field} to name a folder, got {name!r}.")
    if name.startswith("~"):
        raise ValueError(f"expected {field} without ~, which a shell alone knows, got {name!r}.")


def _dataset(table: dict[str, Any], path: str | Path) -> DatasetConfig:
    kinds = {kind.kind: kind for kind in (Documents, Pairs, Clips)}
    where = f"{path}, [[datasets]] {table.get('name', '')!r}"
    kind = table.pop("kind", None)
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"{where}: expected kind to be one of {', '.join(kinds)}, got {kind!r}.")
    if isinstance(table.get("shards"), str):
        table["shards"] = [table["shards"]]
    return _from_table(kinds[kind], table, where)


def _from_table(kind: type, table: dict[str, Any], where: str) -> Any:
    """A dataclass from a table of TOML, each key and type checked."""
    known = {each.name: each for each in fields(kind)}
    types = get_type_hints(kind)
    for name in table:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Expected one of {', '.join(known)}."
            raise ValueError(f"{where}: there is no key {name!r}. {hint}")
    for name, each in known.items():
        if name not in table and each.default is MISSING and each.default_factory is MISSING:
            raise ValueError(f"{where}: expected a key {name!r}, got none.")
    typed = {name: _typed(value, types[name], f"{where}: {name}") for name, value in table.items()}
    try:
        return kind(**typed)
    except ValueError as error:
        raise ValueError(f"{where}: {str(error).removeprefix('[model]: ')}") from error


def _typed(value: Any, expected: Any, where: str) -> Any:
    """A value of TOML as a field's type: a list becomes a tuple, an integer a float where one is expected."""
    if get_origin(expected) is tuple and isinstance(value, list):
        return tuple(_typed(each, get_args(expected)[0], where) for each in value)
    kinds = get_args(expected) if isinstance(expected, UnionType) else (expected,)
    plain = next((kind for kind in (bool, int, float, str) if kind in kinds), None)
    if plain is float and type(value) is int and abs(value) < 2**1023:
        return float(value)
    if get_origin(expected) is tuple and not isinstance(value, tuple):
        raise ValueError(f"{where}: expected a list, got {value!r}.")
    if get_origin(expected) is dict and not isinstance(value, dict):
        raise ValueError(f"{where}: expected a table, got {value!r}.")
    if plain is not None and type(value) is not plain:
        raise ValueError(f"{where}: expected {plain.__name__}, got {value!r}.")
    return value
