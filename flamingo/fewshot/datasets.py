"""Datasets on disk, in the public formats of VQAv2 and of COCO's captions."""

import json
import re
from pathlib import Path
from typing import Any

from flamingo.fewshot.prompts import Sample


def read_vqa(questions: Path, annotations: Path, images: Path) -> list[Sample]:
    """Questions in VQAv2's format: one sample a question, its answer the one most annotators gave.

    ::

        questions    {"questions": [{"question_id": 9, "image_id": 4, "question": "..."}]}
        annotations  {"annotations": [{"question_id": 9, "multiple_choice_answer": "...",
                                       "answers": [{"answer": "..."}, ...]}]}

    Args:
        questions, annotations: JSON files.
        images: a folder; an image is the file whose name ends in its number, as
            `COCO_val2014_000000000004.jpg` or `4.png`.

    Raises:
        FileNotFoundError: if a file does not exist, or an image is not in the folder.
        ValueError: if a file is of another format, or a question has no answers.

    Source: visualqa.org/download.
    """
    answered = {
        one["question_id"]: one for one in _entries(annotations, "annotations", "question_id", "answers")
    }
    files = _images(images)
    samples = []
    for entry in _entries(questions, "questions", "question_id", "image_id", "question"):
        name = entry["question_id"]
        answers = tuple(one["answer"] for one in answered.get(name, {}).get("answers", ()))
        if not answers:
            raise ValueError(f"read_vqa: expected answers to question {name} in {annotations}, found none.")
        samples.append(
            Sample(
                id=name,
                image=_image(files, entry["image_id"], images),
                fields={"question": entry["question"]},
                answer=answered[name].get("multiple_choice_answer", answers[0]),
                references=answers,
            )
        )
    return samples


def read_captions(captions: Path, images: Path) -> list[Sample]:
    """Captions in COCO's format: one sample an image, its answer the first of its captions.

    ::

        captions     {"images": [{"id": 4, "file_name": "..."}],
                      "annotations": [{"image_id": 4, "caption": "..."}, ...]}

    Args:
        captions: a JSON file.
        images: the folder of the file names.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if a file is of another format, or an image has no caption.

    Source: cocodataset.org, data format.
    """
    written: dict[Any, list[str]] = {}
    for entry in _entries(captions, "annotations", "image_id", "caption"):
        written.setdefault(entry["image_id"], []).append(entry["caption"].strip())
    samples = []
    for entry in _entries(captions, "images", "id", "file_name"):
        if entry["id"] not in written:
            raise ValueError(
                f"read_captions: expected a caption of image {entry['id']} in {captions}, found none."
            )
        path = images / entry["file_name"]
        if not path.is_file():
            raise FileNotFoundError(f"read_captions: expected image {entry['id']} at {path}, found none.")
        references = tuple(written[entry["id"]])
        samples.append(Sample(id=entry["id"], image=path, answer=references[0], references=references))
    return samples


def _entries(path: Path, key: str, *fields: str) -> list[dict[str, Any]]:
    """The list under a key of a JSON file; every entry must have these fields."""
    if not path.is_file():
        raise FileNotFoundError(f"expected a JSON file, found none at {path}.")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))[key]
        missing = [field for field in fields for entry in entries if field not in entry]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"expected JSON with a list {key!r} in {path}, got {error!r}.") from error
    if missing:
        raise ValueError(
            f"expected every one of the {key} in {path} to have {missing[0]!r}, which one lacks."
        )
    return entries


def _images(folder: Path) -> dict[int, Path]:
    """The files of a folder by the number that their names end in."""
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a folder of images, found none at {folder}.")
    numbered = ((re.search(r"\d+$", path.stem), path) for path in sorted(folder.iterdir()))
    return {int(number[0]): path for number, path in numbered if number}


def _image(files: dict[int, Path], number: int, folder: Path) -> Path:
    if number not in files:
        raise FileNotFoundError(
            f"expected a file whose name ends in the image's number {number} in {folder}, found none."
        )
    return files[number]
