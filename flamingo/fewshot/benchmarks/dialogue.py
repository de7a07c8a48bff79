"""Questions in a dialogue: VisDial."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flamingo.fewshot import metrics
from flamingo.fewshot.benchmarks.benchmark import Benchmark, Records, details_of
from flamingo.fewshot.benchmarks.files import (
    ID,
    INDEX,
    LIST,
    SHARES,
    TABLE,
    TEXT,
    Entry,
    by_id,
    checked,
    entries,
    expect,
    images_in,
    read_json,
    with_ids,
)
from flamingo.fewshot.prompts import VISUAL_DIALOGUE, Sample, dialogue_history
from flamingo.fewshot.runner import Task


def read_visdial(dialogues: Path, images: Path, annotations: Path | None = None) -> list[Sample]:
    """VisDial v1.0: one sample a dialogue, about the question of one of its rounds.

    ::

        dialogues    {"data": {"questions": ["is it day", ...], "answers": ["yes", ...],
                               "dialogs": [{"image_id": 185565, "caption": "...", "dialog": [
                                   {"question": 0, "answer": 0, "answer_options": [7, ...]}, ...]}]}}
        annotations  [{"image_id": 185565, "round_id": 5, "gt_relevance": [0.0, 0.5, ...]}]

    With annotations the round is theirs, counted from 1. Without them it is the last that has options in a
    test split, and the n-th dialogue's is its n-th round elsewhere, from the first again after its last, so
    that shots have histories of every length.

    Args:
        dialogues: `visdial_1.0_val.json`, or another split's.
        images: a folder; an image is the file in it, or in a folder below, whose name ends in its number.
        annotations: `visdial_1.0_val_dense_annotations.json`, how right each option is. Without them there
            are answers, and no NDCG.

    Raises:
        FileNotFoundError: if a file does not exist, or an image is not in the folder.
        ValueError: if a file is of another format, has an id twice, or an annotation has no dialogue.

    Source: visualdialog.org/data.
    """
    data = _data(dialogues)
    folder = images_in(images)
    dense = {} if annotations is None else _dense(annotations)
    found = checked(data["dialogs"], dialogues, "dialogs", image_id=ID, caption=TEXT, dialog=LIST)
    by_image = by_id(found, lambda entry: entry["image_id"], dialogues)
    if annotations is not None and (stray := [name for name in dense if name not in by_image]):
        raise ValueError(
            f"expected a dialogue about image {stray[0]!r} of {annotations} in {dialogues}, found none."
        )
    samples = []
    for place, (name, entry) in enumerate(by_image.items()):
        if annotations is not None and name not in dense:
            continue
        rounds = _rounds(entry, data, dialogues)
        number = dense[name]["round_id"] if name in dense else _choose(rounds, place)
        image = folder.numbered(name) if isinstance(name, int) else folder.named(name)
        if image is None:
            raise FileNotFoundError(
                f"expected a file whose name ends in the image's number {name} in {images}."
            )
        samples.append(_sample(entry, rounds, number, image, dense.get(name), annotations or dialogues))
    return with_ids(samples, annotations or dialogues)


def _data(path: Path) -> Entry:
    found = read_json(path)
    data = found.get("data") if TABLE.holds(found) else None
    if not isinstance(data, dict):
        raise ValueError(f"expected JSON with an object 'data' in {path}, got none.")
    for key in ("questions", "answers", "dialogs"):
        expect(data, key, LIST, path)
    return data


def _dense(path: Path) -> dict[Any, Entry]:
    found = entries(path, None, image_id=ID, round_id=INDEX, gt_relevance=SHARES)
    return by_id(found, lambda entry: entry["image_id"], path)


def _rounds(entry: Entry, data: Entry, path: Path) -> list[Entry]:
    """The rounds of a dialogue with texts for the places of texts."""

    def text(key: str, place: Any) -> str:
        texts = data[key]
        if not INDEX.holds(place) or not 0 <= place < len(texts) or not TEXT.holds(texts[place]):
            raise ValueError(f"expected the place of a text in 'data' {key!r} of {path}, got {place!r:.40}.")
        return texts[place]

    rounds = []
    for each in checked(entry["dialog"], path, "dialog", question=INDEX):
        one: Entry = {"question": text("questions", each["question"])}
        if "answer" in each:
            one["answer"] = text("answers", each["answer"])
        if "answer_options" in each:
            options = expect(each, "answer_options", LIST, path)
            one["options"] = tuple(text("answers", option) for option in options)
        rounds.append(one)
    if not rounds:
        raise ValueError(
            f"expected a round in the dialogue about image {entry['image_id']} in {path}, got none."
        )
    return rounds


def _choose(rounds: Sequence[Entry], place: int) -> int:
    """Which round of a dialogue is asked about, from 1, where no annotation says."""
    return len(rounds) if "answer" not in rounds[-1] else place % len(rounds) + 1


def _sample(
    entry: Entry, rounds: Sequence[Entry], number: int, image: Path, dense: Entry | None, path: Path
) -> Sample:
    name = entry["image_id"]
    if not 1 <= number <= len(rounds):
        raise ValueError(f"expected 'round_id' of image {name} in {path} in 1..{len(rounds)}, got {number}.")
    asked = rounds[number - 1]
    turns = [(one["question"], one.get("answer", "")) for one in rounds[: number - 1]]
    details: dict[str, Any] = {"image_id": name, "round_id": number}
    if dense is not None:
        details["relevance"] = dense["gt_relevance"]
        options = len(asked.get("options", ()))
        if len(dense["gt_relevance"]) != options:
            raise ValueError(
                f"expected a relevance for each of {options} options of image {name} in {path}, got "
                f"{len(dense['gt_relevance'])}."
            )
    return Sample(
        id=f"{name}_{number}",
        image=image,
        fields={"history": dialogue_history(entry["caption"], turns), "question": asked["question"]},
        answer=asked.get("answer", ""),
        references=(asked["answer"],) if "answer" in asked else (),
        candidates=asked.get("options", ()),
        details=details,
    )


def ndcg_score(records: Records) -> float | None:
    """The mean NDCG in per cent; None where nobody has said how right the options are.

    Questions of which no option is relevant are left out: they have no NDCG.
    """
    scores = [
        metrics.ndcg(record["scores"], details_of(record)["relevance"])
        for record in records
        if any(details_of(record).get("relevance", ()))
    ]
    return 100 * sum(scores) / len(scores) if scores else None


def upload_visdial(records: Records) -> list[dict[str, Any]]:
    """The form of the challenge's server: the rank of every option, from 1."""
    return [
        {
            "image_id": details_of(record)["image_id"],
            "round_id": details_of(record)["round_id"],
            "ranks": [*_ranks(record["scores"])],
        }
        for record in records
    ]


def _ranks(scores: Sequence[float]) -> Iterator[int]:
    order = sorted(range(len(scores)), key=lambda place: -scores[place])
    place = {option: rank for rank, option in enumerate(order, start=1)}
    return (place[option] for option in range(len(scores)))


VISDIAL = Benchmark(
    title="VisDial v1.0",
    task=Task("visdial", VISUAL_DIALOGUE, "NDCG", ndcg_score, closed=True),
    split="validation",
    source="visualdialog.org/data (dialogues, dense annotations, images of val2018); the images of training "
    "are COCO's",
    layout="""\
visdial_1.0_val.json                          --dialogues
visdial_1.0_val_dense_annotations.json        --annotations
VisualDialog_val2018/VisualDialog_val2018_000000185565.jpg ...   --images""",
    files={"dialogues": "JSON of the dialogues", "images": "the folder of the images"},
    more_files={"annotations": "JSON of how right each option is; without it ranks are written for a server"},
    read=read_visdial,
    upload=upload_visdial,
    upload_keys=("image_id", "round_id", "ranks"),
)
