"""Captions of images and videos: COCO, Flickr30k, VATEX and YouCook2, and any files in COCO's format."""

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from flamingo.fewshot import metrics
from flamingo.fewshot.benchmarks.benchmark import Benchmark, Records, are_answered
from flamingo.fewshot.benchmarks.files import (
    ID,
    INDEX,
    LIST,
    NUMBERS,
    TABLE,
    TEXT,
    TEXTS,
    Entry,
    Videos,
    all_or_none_answered,
    checked,
    entries,
    expect,
    image_file,
    read_json,
    span,
    with_ids,
)
from flamingo.fewshot.prompts import CAPTION, Sample
from flamingo.fewshot.runner import Task

TRAIN = ("train", "restval")  # of Karpathy's splits


def read_captions(captions: Path, images: Path, splits: Collection[str] = ("test",)) -> list[Sample]:
    """Captions in COCO's format or Karpathy's: one sample an image, its answer the first of its captions.

    ::

        COCO's       {"images": [{"id": 4, "file_name": "..."}],
                      "annotations": [{"image_id": 4, "caption": "..."}, ...]}
        Karpathy's   {"images": [{"filename": "...", "filepath": "val2014", "imgid": 0, "cocoid": 391895,
                                  "split": "test", "sentences": [{"raw": "..."}, ...]}]}

    Args:
        captions: a JSON file, told by what is in it.
        images: the folder of the file names, or of the folders (`filepath`) that have them.
        splits: which images of Karpathy's are read: the test split, or `("train", "restval")` for shots.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if a file is of another format, an id is there twice, or an image has no caption.

    Source: cocodataset.org, data format; arXiv 1412.2306 for Karpathy's splits.
    """
    found = entries(captions, "images")
    if any("sentences" in entry for entry in found):
        return _read_karpathy(captions, images, splits)
    written: dict[Any, list[str]] = {}
    for entry in entries(captions, "annotations", image_id=ID, caption=TEXT):
        written.setdefault(entry["image_id"], []).append(entry["caption"].strip())
    samples = []
    for entry in checked(found, captions, "images", id=ID, file_name=TEXT):
        if entry["id"] not in written:
            raise ValueError(
                f"read_captions: expected a caption of image {entry['id']} in {captions}, found none."
            )
        path = images / entry["file_name"]
        if not path.is_file():
            raise FileNotFoundError(f"read_captions: expected image {entry['id']} at {path}, found none.")
        samples.append(_sample(entry["id"], path, written[entry["id"]]))
    return with_ids(samples, captions)


def _read_karpathy(captions: Path, images: Path, splits: Collection[str]) -> list[Sample]:
    found = entries(captions, "images", filename=TEXT, split=TEXT, sentences=LIST)
    chosen = [entry for entry in found if entry["split"] in splits]
    if not chosen:
        raise ValueError(
            f"expected images of the split {' or '.join(splits)} in {captions}, got "
            f"{', '.join(sorted({entry['split'] for entry in found})) or 'no image'}."
        )
    samples = []
    for entry in chosen:
        sentences = checked(entry["sentences"], captions, "sentences", raw=TEXT)
        if not sentences:
            raise ValueError(f"expected a sentence about {entry['filename']} in {captions}, found none.")
        name = next((key for key in ("cocoid", "imgid") if key in entry), "filename")
        below = expect(entry, "filepath", TEXT, captions) if "filepath" in entry else "."
        path = image_file(images, str(Path(below, entry["filename"])), entry["filename"])
        written = [sentence["raw"].strip() for sentence in sentences]
        samples.append(_sample(expect(entry, name, ID, captions), path, written))
    return with_ids(samples, captions)


def _sample(name: int | str, medium: Any, captions: list[str]) -> Sample:
    return Sample(id=name, image=medium, answer=captions[0] if captions else "", references=tuple(captions))


def read_vatex(annotations: Path, videos: Path) -> list[Sample]:
    """VATEX: one sample a clip, its answer the first of its ten English captions.

    ::

        annotations  [{"videoID": "G9zN5TTuGO4_000179_000189", "enCap": ["...", ...]}],
                     without enCap in the private test split

    Args:
        annotations: a JSON file.
        videos: a folder; a clip is the file in it, or in a folder below, that is named by its `videoID`.

    Raises:
        FileNotFoundError: if the file or the folder does not exist. A clip that is not there is no error
            here: many are gone from the web.
        ValueError: if the file is of another format, or an id is there twice.

    Source: eric-xw.github.io/vatex-website/download.html.
    """
    found = Videos(videos)
    samples = []
    for entry in entries(annotations, None, videoID=TEXT):
        captions = expect(entry, "enCap", TEXTS, annotations) if "enCap" in entry else []
        if "enCap" in entry and not captions:
            raise ValueError(f"expected a caption of {entry['videoID']} in {annotations}, found none.")
        name = entry["videoID"]
        samples.append(_sample(name, found.find(name), [caption.strip() for caption in captions]))
    return with_ids(all_or_none_answered(samples, annotations), annotations)


def read_youcook2(annotations: Path, videos: Path, subset: str = "validation") -> list[Sample]:
    """YouCook2: one sample a segment of a video, its answer the sentence about it.

    ::

        annotations  {"database": {"GLd3aX16zBg": {"subset": "validation", "annotations": [
                          {"id": 0, "segment": [90, 102], "sentence": "..."}, ...]}}}

    Args:
        annotations: `youcookii_annotations_trainval.json`.
        videos: a folder; a video is the file in it, or in a folder below, that is named by its id, as
            `GLd3aX16zBg.mp4`. A segment cut out beforehand is `GLd3aX16zBg_0.mp4`.
        subset: "validation", or "training" for shots.

    Raises:
        FileNotFoundError: if the file or the folder does not exist. A video that is not there is no error
            here: many are gone from the web.
        ValueError: if the file is of another format.

    Source: youcook2.eecs.umich.edu/download.
    """
    found = Videos(videos)
    samples = []
    for video, entry in _database(annotations).items():
        if entry["subset"] != subset:
            continue
        said = expect(entry, "annotations", LIST, annotations)
        for part in checked(said, annotations, "annotations", id=INDEX, segment=NUMBERS, sentence=TEXT):
            name, segment = f"{video}_{part['id']}", part["segment"]
            if len(segment) != 2:
                raise ValueError(
                    f"expected 'segment' of {name} in {annotations} to be [start, end], got {segment}."
                )
            clip = found.segment(name, video, *span(annotations, name, *segment))
            samples.append(_sample(name, clip, [part["sentence"].strip()]))
    return with_ids(samples, annotations)


def _database(annotations: Path) -> dict[str, Entry]:
    found = read_json(annotations)
    if not isinstance(found, dict) or not TABLE.holds(found.get("database")):
        raise ValueError(f"expected JSON with an object 'database' in {annotations}, got none.")
    checked([*found["database"].values()], annotations, "videos", subset=TEXT)
    return found["database"]


def caption_score(records: Records) -> float | None:
    """CIDEr, times 100 as papers have it; None where no captions are known."""
    if not are_answered(records):
        return None
    predictions = [record["prediction"] for record in records]
    return 100 * metrics.cider(predictions, [record["references"] for record in records])[0]


CAPTIONS = Task("captions", CAPTION, "CIDEr", caption_score, max_new_tokens=32)


def upload_captions(records: Records) -> list[dict[str, Any]]:
    """The form of COCO's server."""
    return [{"image_id": record["id"], "caption": record["prediction"]} for record in records]


def upload_vatex(records: Records) -> dict[str, str]:
    """The form of VATEX's server."""
    return {record["id"]: record["prediction"] for record in records}


def _karpathy(annotations: Path, images: Path) -> list[Sample]:
    return read_captions(annotations, images)


def _karpathy_support(annotations: Path, images: Path) -> list[Sample]:
    return read_captions(annotations, images, TRAIN)


_FILES = {"annotations": "JSON of the captions", "images": "the folder of the images"}
_VIDEO_FILES = {"annotations": "JSON of the captions", "videos": "the folder of the videos"}

COCO = Benchmark(
    title="COCO captions",
    task=replace(CAPTIONS, name="coco"),
    split="Karpathy's test split, 5000 images",
    source="cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip (captions) and "
    "cocodataset.org (images: train2014, val2014)",
    layout="""\
dataset_coco.json                             --annotations
coco/                                         --images
  train2014/COCO_train2014_000000000009.jpg ...
  val2014/COCO_val2014_000000000042.jpg ...""",
    files=_FILES,
    read=_karpathy,
    read_support=_karpathy_support,
    upload=upload_captions,
    upload_keys=("image_id", "caption"),
)

FLICKR30K = Benchmark(
    title="Flickr30k",
    task=replace(CAPTIONS, name="flickr30k"),
    split="Karpathy's test split, 1000 images",
    source="cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip (captions) and "
    "shannon.cs.illinois.edu/DenotationGraph (images)",
    layout="""\
dataset_flickr30k.json                        --annotations
flickr30k-images/1000092795.jpg ...           --images""",
    files=_FILES,
    read=_karpathy,
    read_support=_karpathy_support,
    upload=upload_captions,
    upload_keys=("image_id", "caption"),
)

VATEX = Benchmark(
    title="VATEX",
    task=replace(CAPTIONS, name="vatex"),
    split="test; validation, to choose settings by",
    source="eric-xw.github.io/vatex-website/download.html (captions); the videos are YouTube's",
    layout="""\
vatex_public_test_english_v1.1.json           --annotations
videos/G9zN5TTuGO4_000179_000189.mp4 ...      --videos""",
    files=_VIDEO_FILES,
    read=read_vatex,
    upload=upload_vatex,
    upload_keys=None,
)

YOUCOOK2 = Benchmark(
    title="YouCook2",
    task=replace(CAPTIONS, name="youcook2"),
    split="validation",
    source="youcook2.eecs.umich.edu/download (captions); the videos are YouTube's",
    layout="""\
youcookii_annotations_trainval.json           --annotations
raw_videos/validation/101/GLd3aX16zBg.mp4 ... --videos""",
    files=_VIDEO_FILES,
    read=read_youcook2,
    read_support=partial(read_youcook2, subset="training"),
)

# Files of one's own in COCO's format or Karpathy's.
ANY_CAPTIONS = Benchmark(
    title="files in COCO's format, or Karpathy's",
    task=CAPTIONS,
    split="yours, or Karpathy's test split",
    source="your own",
    layout="""\
captions.json                                 --captions
images/0001.jpg ...                           --images""",
    files={"captions": "JSON of the captions", "images": "the folder of the images"},
    read=read_captions,
    read_support=partial(read_captions, splits=TRAIN),
    upload=upload_captions,
    upload_keys=("image_id", "caption"),
)
