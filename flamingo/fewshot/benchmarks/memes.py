"""Pictures with words on them: Hateful Memes."""

from collections.abc import Sequence
from pathlib import Path

from flamingo.fewshot import metrics
from flamingo.fewshot.benchmarks.benchmark import Benchmark, Records, details_of
from flamingo.fewshot.benchmarks.files import ID, TEXT, YES_NO, expect, image_file, json_lines, with_ids
from flamingo.fewshot.prompts import HATEFUL_MEMES, Sample
from flamingo.fewshot.runner import Task

ANSWERS = ("yes", "no")


def read_hateful_memes(annotations: Path, images: Path) -> list[Sample]:
    """Hateful Memes: one sample a meme, to be answered with yes or no.

    ::

        annotations  {"id": 8291, "img": "img/08291.png", "label": 1, "text": "..."}    one a line,
                     without labels where they are secret

    Args:
        annotations: `test_seen.jsonl`, or another split's.
        images: the folder that has the folder `img`, or that is it.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if the file is of another format, or has an id twice.

    Source: arXiv 2005.04790; ai.meta.com/tools/hatefulmemes.
    """
    samples = []
    for entry in json_lines(annotations, id=ID, img=TEXT, text=TEXT):
        path = image_file(images, entry["img"], Path(entry["img"]).name)
        label = expect(entry, "label", YES_NO, annotations) if "label" in entry else None
        answers = () if label is None else ("yes" if label else "no",)
        samples.append(
            Sample(
                id=entry["id"],
                image=path,
                fields={"meme_text": entry["text"]},
                answer="".join(answers),
                references=answers,
                candidates=ANSWERS,
                details={} if label is None else {"label": label},
            )
        )
    return with_ids(samples, annotations)


def auc_score(records: Records) -> float | None:
    """Area under the ROC curve in per cent, by how much likelier yes is than no; None without labels.

    Raises:
        ValueError: if all memes have one label.
    """
    labels = [details_of(record)["label"] for record in records if "label" in details_of(record)]
    if not labels or len(labels) < len(records):
        return None
    scores = [record["scores"][0] - record["scores"][1] for record in records]
    return 100 * metrics.roc_auc(scores, labels)


def _check(scoring: str | None, queries: Sequence[Sample]) -> None:
    labels = [query.details["label"] for query in queries if "label" in query.details]
    if labels:
        metrics.roc_auc(range(len(labels)), labels)  # refuses labels of one kind


HATEFUL = Benchmark(
    title="Hateful Memes",
    task=Task("hatefulmemes", HATEFUL_MEMES, "ROC AUC", auc_score, closed=True),
    split="seen test",
    source="hatefulmemeschallenge.com",
    layout="""\
test_seen.jsonl                               --annotations
img/08291.png ...                             --images (the folder above img, or img)""",
    files={"annotations": "JSON lines of the memes", "images": "the folder of img"},
    read=read_hateful_memes,
    check=_check,
)
