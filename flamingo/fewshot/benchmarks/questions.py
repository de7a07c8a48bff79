"""Questions about images: VQAv2, OK-VQA, TextVQA and VizWiz, and any files in VQAv2's format."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from flamingo.fewshot import metrics
from flamingo.fewshot.benchmarks.benchmark import Benchmark, Records, details_of, per_cent
from flamingo.fewshot.benchmarks.files import (
    ID,
    LIST,
    TEXT,
    TEXTS,
    Entry,
    Folder,
    all_or_none_answered,
    by_id,
    checked,
    entries,
    expect,
    images_in,
    read_json,
    with_ids,
)
from flamingo.fewshot.prompts import QUESTION, Sample
from flamingo.fewshot.runner import Task


def read_vqa(questions: Path, annotations: Path | None, images: Path) -> list[Sample]:
    """Questions in VQAv2's format: one sample a question, its answer the one most annotators gave.

    ::

        questions    {"questions": [{"question_id": 9, "image_id": 4, "question": "..."}]}
        annotations  {"annotations": [{"question_id": 9, "multiple_choice_answer": "...",
                                       "answers": [{"answer": "..."}, ...]}]}

    Where an answer has a `raw_answer`, as in OK-VQA, that is what was said, and `answer` is its stem.

    Args:
        questions, annotations: JSON files. Without annotations, or where the file has none at all, as for a
            test split, nothing is known of the answers, and samples have no references.
        images: a folder. An image is the file in it, or in a folder below, whose name ends in its number, as
            `COCO_val2014_000000000004.jpg` or `4.png`; or, if its id is a text, that has this name with or
            without its suffix.

    Raises:
        FileNotFoundError: if a file does not exist, or an image is not in the folder.
        ValueError: if a file is of another format, has an id twice, or some questions alone have answers.

    Source: visualqa.org/download.
    """
    answered = {} if annotations is None else _annotated(annotations)
    folder = images_in(images)
    found = entries(questions, "questions", question_id=ID, image_id=ID, question=TEXT)
    samples = []
    for entry in found:
        answers = answered.get(entry["question_id"])
        if answered and answers is None:
            raise ValueError(_unanswered(entry["question_id"], answered, annotations))
        samples.append(_sample(entry, _image(folder, entry["image_id"]), answers, annotations))
    return with_ids(samples, questions)


def _annotated(annotations: Path) -> dict[Any, Entry]:
    found = entries(annotations, "annotations", question_id=ID, answers=LIST)
    for entry in found:
        checked(entry["answers"], annotations, "answers", answer=TEXT)
    return by_id(found, lambda entry: entry["question_id"], annotations)


def _unanswered(name: int | str, answered: Mapping[Any, Entry], annotations: Path | None) -> str:
    twin = int(name) if isinstance(name, str) and name.isdecimal() else str(name)
    but = f" It has {twin!r}, and a number is not a text." if twin in answered else ""
    shown = name if isinstance(name, int) else repr(name)
    return f"read_vqa: expected answers to question {shown} in {annotations}, found none.{but}"


def _sample(entry: Entry, image: Path, annotation: Entry | None, path: Path | None) -> Sample:
    """A question, and if they are known its answers."""
    sample = Sample(id=entry["question_id"], image=image, fields={"question": entry["question"]})
    if annotation is None or path is None:
        return sample
    given = annotation["answers"]
    if not given:
        raise ValueError(_unanswered(sample.id, {}, path))
    said = tuple(
        expect(one, "raw_answer", TEXT, path) if "raw_answer" in one else one["answer"] for one in given
    )
    if "multiple_choice_answer" in annotation:
        shown = expect(annotation, "multiple_choice_answer", TEXT, path)
    else:
        shown = most_common(said)
    details: dict[str, Any] = {}
    if any("raw_answer" in one for one in given):
        details["stems"] = [one["answer"] for one in given]
    if not all("answer_id" in one for one in given):  # all that tells annotators apart
        details["confidences"] = [str(one.get("answer_confidence", "")) for one in given]
    return replace(sample, answer=shown, references=said, details=details)


def most_common(answers: Sequence[str]) -> str:
    """The answer that was given most often, of equals the first.

    >>> most_common(["a cat", "cat", "cat"])
    'cat'
    """
    return Counter(answers).most_common(1)[0][0]


def _image(folder: Folder, name: int | str) -> Path:
    if isinstance(name, int):
        found = folder.numbered(name)
        hint = "file whose name ends in the image's number"
    else:
        path = folder.path / name
        found = path if path.is_file() else folder.named(name, Path(name).stem)
        hint = "file with the image's name"
    if found is None:
        raise FileNotFoundError(f"expected a {hint} {name} in {folder.path}, found none.")
    return found


def read_textvqa(questions: Path, images: Path, annotations: Path | None = None) -> list[Sample]:
    """TextVQA as it is published, or in VQAv2's format, as open_flamingo has it.

    ::

        questions  {"data": [{"question_id": 34602, "image_id": "003a8ae2ef43b901", "question": "...",
                              "answers": ["dakota", ...]}]}, without answers in the test split

    Args:
        questions: `TextVQA_0.5.1_val.json`, or a file of VQAv2's format.
        images: a folder; images are found as by `read_vqa`.
        annotations: of VQAv2's format, if the questions are.

    Raises:
        FileNotFoundError, ValueError: as `read_vqa`.

    Source: textvqa.org/dataset.
    """
    if annotations is not None or "data" not in _keys(questions):
        return read_vqa(questions, annotations, images)
    folder = images_in(images)
    samples = []
    for entry in entries(questions, "data", question_id=ID, image_id=ID, question=TEXT):
        answers = expect(entry, "answers", TEXTS, questions) if "answers" in entry else ()
        sample = _sample(entry, _image(folder, entry["image_id"]), None, None)
        shown = most_common(answers) if answers else ""
        samples.append(replace(sample, answer=shown, references=tuple(answers)))
    return with_ids(all_or_none_answered(samples, questions), questions)


def read_vizwiz(questions: Path, images: Path, annotations: Path | None = None) -> list[Sample]:
    """VizWiz as it is published, or in VQAv2's format, as open_flamingo has it.

    ::

        questions  [{"image": "VizWiz_val_00000000.jpg", "question": "...",
                     "answers": [{"answer": "unanswerable", "answer_confidence": "yes"}, ...]}],
                   without answers in the test split

    The id of a question is the name of its image, which has one question.

    Args:
        questions: `val.json`, `test.json` or `train.json`, or a file of VQAv2's format.
        images: the folder of the images, or of the folders `train`, `val` and `test`.
        annotations: of VQAv2's format, if the questions are.

    Raises:
        FileNotFoundError, ValueError: as `read_vqa`.

    Source: vizwiz.org/tasks-and-datasets/vqa.
    """
    if annotations is not None or "questions" in _keys(questions):
        samples = read_vqa(questions, annotations, images)
        named = [{**sample.details, "image": sample.image.name} for sample in samples]
        return [replace(sample, details=one) for sample, one in zip(samples, named, strict=True)]
    folder = images_in(images)
    samples = []
    for entry in entries(questions, None, image=TEXT, question=TEXT):
        entry = {**entry, "question_id": entry["image"]}
        if "answers" in entry:
            checked(expect(entry, "answers", LIST, questions), questions, "answers", answer=TEXT)
        annotation = entry if "answers" in entry else None
        sample = _sample(entry, _image(folder, entry["image"]), annotation, questions)
        samples.append(replace(sample, details={**sample.details, "image": entry["image"]}))
    return with_ids(all_or_none_answered(samples, questions), questions)


def _keys(path: Path) -> set[str]:
    found = read_json(path)
    return {*found} if isinstance(found, dict) else set()


def vqa_score(records: Records, *, unanimous_as_written: bool = False) -> float | None:
    """The mean VQA accuracy in per cent; None where no answers are known."""

    def score(record: dict[str, Any]) -> float:
        said, answers = record["prediction"], record["references"]
        return metrics.vqa_accuracy(said, answers, unanimous_as_written=unanimous_as_written)

    return per_cent(records, score)


VQA = Task("vqa", QUESTION, "VQA accuracy", vqa_score, max_new_tokens=10)


def ok_vqa_score(records: Records) -> float | None:
    """The mean accuracy of stems in per cent; None where no answers are known."""

    def score(record: dict[str, Any]) -> float:
        stems = details_of(record).get("stems", ())
        return metrics.stem_accuracy(record["prediction"], record["references"], stems)

    return per_cent(records, score)


def open_flamingo_score(records: Records) -> float | None:
    """VQA accuracy in per cent as open_flamingo's script has it, which drops annotators of VizWiz.

    From the annotators that one is held against it takes out all entries that equal his, not his alone. In
    VQAv2 an entry has its number. In VizWiz it is an answer and a confidence, so whoever said the same as
    surely goes with him: ten who agree score 0.
    """

    def score(record: dict[str, Any]) -> float:
        said, answers = record["prediction"], record["references"]
        if "confidences" in details_of(record):
            return metrics.open_flamingo_accuracy(said, answers, details_of(record)["confidences"])
        return metrics.vqa_accuracy(said, answers)

    return per_cent(records, score)


def upload_vqa(records: Records) -> list[dict[str, Any]]:
    """The form of the server for VQAv2, which wants every question of the file."""
    return [{"question_id": record["id"], "answer": record["prediction"]} for record in records]


def upload_vizwiz(records: Records) -> list[dict[str, Any]]:
    """The form of VizWiz's server."""
    return [{"image": details_of(record)["image"], "answer": record["prediction"]} for record in records]


_OFFICIAL = {"official": partial(vqa_score, unanimous_as_written=True)}
_FILES = {"questions": "JSON of the questions", "images": "the folder of the images"}
_ANSWERS = {"annotations": "JSON of the answers; without it answers are written for a server"}
_ONE_FILE = {"questions": "JSON of questions and answers", "images": "the folder of the images"}
_OR_TWO = {"annotations": "JSON of the answers, where the questions are in VQAv2's format"}


def _read(questions: Path, images: Path, annotations: Path | None = None) -> list[Sample]:
    return read_vqa(questions, annotations, images)


VQAV2 = Benchmark(
    title="VQAv2",
    task=replace(VQA, name="vqav2"),
    split="test-dev, which has no answers; validation, to choose settings by",
    source="visualqa.org/download (questions, annotations) and cocodataset.org (images)",
    layout="""\
v2_OpenEnded_mscoco_val2014_questions.json    --questions
v2_mscoco_val2014_annotations.json            --annotations
val2014/COCO_val2014_000000000042.jpg ...     --images""",
    files=_FILES,
    more_files=_ANSWERS,
    read=_read,
    scorings=_OFFICIAL,
    upload=upload_vqa,
    upload_keys=("question_id", "answer"),
)

OK_VQA = Benchmark(
    title="OK-VQA",
    task=replace(VQA, name="okvqa", metric="VQA accuracy of stems", score=ok_vqa_score),
    split="validation",
    source="okvqa.allenai.org/download.html (questions, annotations) and cocodataset.org (images)",
    layout="""\
OpenEnded_mscoco_val2014_questions.json       --questions
mscoco_val2014_annotations.json               --annotations
val2014/COCO_val2014_000000000042.jpg ...     --images""",
    files=_FILES,
    more_files=_ANSWERS,
    read=_read,
    upload=upload_vqa,
    upload_keys=("question_id", "answer"),
    check=lambda scoring, _: metrics.stem("stem"),
)

TEXTVQA = Benchmark(
    title="TextVQA",
    task=replace(VQA, name="textvqa"),
    split="validation",
    source="textvqa.org/dataset; the images are OpenImages' train_val_images.zip, linked there",
    layout="""\
TextVQA_0.5.1_val.json                        --questions
train_images/003a8ae2ef43b901.jpg ...         --images""",
    files=_ONE_FILE,
    more_files=_OR_TWO,
    read=read_textvqa,
    scorings=_OFFICIAL,
    upload=upload_vqa,
    upload_keys=("question_id", "answer"),
)

VIZWIZ = Benchmark(
    title="VizWiz",
    task=replace(VQA, name="vizwiz"),
    split="test-dev, which has no answers; validation, to choose settings by",
    source="vizwiz.org/tasks-and-datasets/vqa",
    layout="""\
val.json                                      --questions
val/VizWiz_val_00000000.jpg ...               --images""",
    files=_ONE_FILE,
    more_files=_OR_TWO,
    read=read_vizwiz,
    scorings={**_OFFICIAL, "open_flamingo": open_flamingo_score},
    upload=upload_vizwiz,
    upload_keys=("image", "answer"),
)

# Files of one's own in VQAv2's format.
ANY_VQA = Benchmark(
    title="files in VQAv2's format",
    task=VQA,
    split="yours",
    source="your own",
    layout=VQAV2.layout,
    files=_FILES,
    more_files=_ANSWERS,
    read=_read,
    scorings=_OFFICIAL,
    upload=upload_vqa,
    upload_keys=("question_id", "answer"),
)
