"""Things and actions to be named: ImageNet, Kinetics and RareAct."""

import re
from collections.abc import Sequence
from pathlib import Path

from flamingo.fewshot import metrics
from flamingo.fewshot.benchmarks.benchmark import Benchmark, Records, details_of, per_cent
from flamingo.fewshot.benchmarks.files import (
    IMAGES,
    TEXTS,
    Videos,
    by_id,
    read_json,
    seconds,
    span,
    table,
    with_ids,
)
from flamingo.fewshot.prompts import ACTION, CLASSIFICATION, Sample, action
from flamingo.fewshot.runner import Task
from flamingo.media import VIDEOS
from flamingo.text_files import lines

_WORDNET_ID = re.compile(r"n\d{8}")


def read_imagenet(images: Path, classes: Path | None = None) -> list[Sample]:
    """ImageNet: one sample an image, in a folder for each class.

    ::

        images    n01440764/ILSVRC2012_val_00000293.JPEG ...
        classes   n01440764 tench, Tinca tinca          (LOC_synset_mapping.txt; the first name counts)
                  {"0": ["n01440764", "tench"], ...}    (imagenet_class_index.json)

    Args:
        images: the folder of the classes' folders.
        classes: a name for each folder. Without it a folder's own name is its class's.

    Raises:
        FileNotFoundError: if a file or folder does not exist.
        ValueError: if there is no image, a folder is not among the classes, or folders are called by
            WordNet's numbers, which say nothing, and there are no names for them.

    Source: arXiv 1409.0575; image-net.org.
    """
    return _in_folders(images, IMAGES, "images", _names(classes), classes)


def read_kinetics(videos: Path, classes: Path | None = None) -> list[Sample]:
    """Kinetics: one sample a clip, in a folder for each class.

    ::

        videos    riding a bike/0Yxc5wY8JqA_000005_000015.mp4 ...

    Args:
        videos: the folder of the classes' folders.
        classes: see `read_imagenet`; folders of Kinetics are called by their classes.

    Raises:
        FileNotFoundError, ValueError: as `read_imagenet`.

    Source: arXiv 1907.06987; github.com/cvdfoundation/kinetics-dataset.
    """
    return _in_folders(videos, VIDEOS, "videos", _names(classes), classes)


def _in_folders(
    folder: Path, suffixes: frozenset[str], what: str, names: dict[str, str], of: Path | None
) -> list[Sample]:
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a folder of {what}, found none at {folder}.")
    folders = sorted(path for path in folder.iterdir() if path.is_dir())
    if not of and any(_WORDNET_ID.fullmatch(path.name) for path in folders):
        raise ValueError(
            f"expected names for folders like {folders[0].name} in {folder}: give --classes "
            "LOC_synset_mapping.txt or imagenet_class_index.json."
        )
    if of and (stray := [path.name for path in folders if path.name not in names]):
        raise ValueError(f"expected a name of the folder {stray[0]!r} of {folder} in {of}, found none.")
    named = {path: names.get(path.name, path.name.replace("_", " ")) for path in folders}
    # One object, by which those who rank candidates see that all samples have the same.
    candidates = tuple(names.values()) if of else tuple(named.values())
    samples = [
        Sample(
            id=f"{path.name}/{file.name}", image=file, answer=name, references=(name,), candidates=candidates
        )
        for path, name in named.items()
        for file in sorted(path.iterdir())
        if file.suffix.lower() in suffixes and not file.name.startswith(".")
    ]
    return with_ids(samples, folder)


def _names(path: Path | None) -> dict[str, str]:
    """The name of each folder, in the order of the file."""
    if path is None:
        return {}
    if path.suffix.lower() == ".json":
        return _indexed(path)
    pairs = []
    for number, line in enumerate(lines(path, "a file of folders and their names"), start=1):
        folder, _, names = line.strip().partition(" ")
        name = names.split(",")[0].strip()
        if folder and not name:
            raise ValueError(f"expected a folder and its name in line {number} of {path}, got {line!r}.")
        if folder:
            pairs.append((folder, name))
    return _once(pairs, path)


def _once(pairs: Sequence[tuple[str, str]], path: Path) -> dict[str, str]:
    """The name of each folder, which is there once."""
    return dict(by_id(pairs, lambda pair: pair[0], path).values())


def _indexed(path: Path) -> dict[str, str]:
    found = read_json(path)
    pairs = list(found.values()) if isinstance(found, dict) else []
    if not pairs or not all(TEXTS.holds(pair) and len(pair) == 2 for pair in pairs):
        raise ValueError(f'expected JSON like {{"0": ["n01440764", "tench"]}} in {path}, got something else.')
    return _once([(folder, name.replace("_", " ")) for folder, name in pairs], path)


def read_rareact(annotations: Path, videos: Path) -> list[Sample]:
    """RareAct: one sample a clip, to be named by one of all the classes' actions.

    ::

        annotations  id,video_id,start,end,class_id,verb,noun,annotation

    Args:
        annotations: `rareact.csv`.
        videos: a folder; the video is the file in it, or in a folder below, called by its `video_id`, and a
            clip cut out beforehand by its `id`.

    Raises:
        FileNotFoundError: if the file or the folder does not exist. A video that is not there is no error
            here: many are gone from the web.
        ValueError: if the file is of another format, an id is there twice, or a class has two actions.

    Source: arXiv 2008.01018; github.com/antoine77340/RareAct.
    """
    found = Videos(videos)
    columns = ("id", "video_id", "start", "end", "class_id", "verb", "noun", "annotation")
    rows = table(annotations, *columns)
    actions: dict[int, tuple[str, str]] = {}
    for row in rows:
        number, said = _whole(annotations, row, "class_id"), (row["verb"], row["noun"])
        if actions.setdefault(number, said) != said:
            raise ValueError(f"expected one verb and noun of class {number} in {annotations}, got two.")
    order = sorted(actions)
    candidates = tuple(action(*actions[number]) for number in order)
    samples = []
    for row in rows:
        times = (seconds(annotations, row, column) for column in ("start", "end"))
        start, end = span(annotations, f"id {row['id']}", *times)
        name, annotation = _whole(annotations, row, "id"), _whole(annotations, row, "annotation")
        if annotation not in range(5):
            raise ValueError(
                f"expected 'annotation' of id {name} in {annotations} in 0..4, got {annotation}."
            )
        label = order.index(int(row["class_id"]))
        samples.append(
            Sample(
                id=name,
                image=found.segment(str(name), row["video_id"], start, end),
                answer=candidates[label],
                references=(candidates[label],),
                candidates=candidates,
                details={
                    "video": row["video_id"],
                    "label": label,
                    "verb": row["verb"],
                    "noun": row["noun"],
                    "annotation": annotation,
                },
            )
        )
    return with_ids(samples, annotations)


def _whole(path: Path, row: dict[str, str], column: str) -> int:
    try:
        return int(row[column])
    except ValueError as error:
        raise ValueError(f"expected {column} in {path} to be a whole number, got {row[column]!r}.") from error


def top_one_score(records: Records) -> float | None:
    """The share of samples whose likeliest candidate is the right one, in per cent; None without answers.

    Candidates of one text are one: ImageNet has two cranes.
    """
    return per_cent(records, lambda record: record["prediction"] == record["references"][0])


def mwap_score(records: Records) -> float | None:
    """RareAct's mWAP in per cent; None if no clip shows its action."""
    clips = [metrics.Action(**details_of(record)) for record in records]
    if not any(clip.annotation == 1 for clip in clips):
        return None
    return 100 * metrics.mean_weighted_ap([record["scores"] for record in records], clips)


IMAGENET = Benchmark(
    title="ImageNet",
    task=Task("imagenet", CLASSIFICATION, "top-1 accuracy", top_one_score, closed=True),
    split="validation, 10 images a class",
    source="image-net.org (images); LOC_synset_mapping.txt is in Kaggle's copy",
    layout="""\
LOC_synset_mapping.txt                        --classes
val/n01440764/ILSVRC2012_val_00000293.JPEG ...--images
train/n01440764/n01440764_18.JPEG ...         --support-images""",
    files={"images": "the folder of the classes' folders"},
    more_files={"classes": "names of the folders: LOC_synset_mapping.txt or imagenet_class_index.json"},
    read=read_imagenet,
    support_per_answer=32,
    shared=frozenset({"classes"}),
)

KINETICS = Benchmark(
    title="Kinetics",
    task=Task("kinetics", CLASSIFICATION, "top-1 accuracy", top_one_score, closed=True),
    split="validation of Kinetics700, 10 clips a class",
    source="github.com/cvdfoundation/kinetics-dataset",
    layout="""\
val/riding a bike/0Yxc5wY8JqA_000005_000015.mp4 ...   --videos
train/riding a bike/...                       --support-videos""",
    files={"videos": "the folder of the classes' folders"},
    more_files={"classes": "names of the folders, where these are not the classes'"},
    read=read_kinetics,
    support_per_answer=32,
    shared=frozenset({"classes"}),
)

RAREACT = Benchmark(
    title="RareAct",
    task=Task("rareact", ACTION, "mWAP", mwap_score, closed=True),
    split="all of it, without shots",
    source="github.com/antoine77340/RareAct (annotations); the videos are YouTube's",
    layout="""\
rareact.csv                                   --annotations
rareact/7frRY7aGwMU.mp4 ...                   --videos""",
    files={"annotations": "CSV of the clips", "videos": "the folder of the videos"},
    read=read_rareact,
    shots=0,
    check=lambda scoring, _: metrics.weighted_ap([1.0], [], [[1.0]]),
)
