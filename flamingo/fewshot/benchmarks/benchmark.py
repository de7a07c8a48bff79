"""What there is to know of a benchmark before it is run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flamingo.fewshot.prompts import Sample
from flamingo.fewshot.runner import Records, Task


def option(name: str) -> str:
    """The option of the command that has a name in Python.

    >>> option("support_images")
    '--support-images'
    """
    return f"--{name.replace('_', '-')}"


def plain_answers(records: Records) -> Any:
    """What is written of answers that cannot be measured here, where nobody has fixed a form."""
    return [{"id": record["id"], "answer": record["prediction"]} for record in records]


def details_of(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The details of a sample, which a record lacks where there are none."""
    return record.get("details", {})


def are_answered(records: Records) -> bool:
    """Whether there are records, and answers to hold them against: a split has all or none."""
    return bool(records) and bool(records[0]["references"])


def per_cent(records: Records, score: Callable[[Any], float]) -> float | None:
    """100 times the mean of a score of each record; None where no answers are known."""
    return 100 * sum(map(score, records)) / len(records) if are_answered(records) else None


def _nothing(scoring: str | None, queries: Sequence[Sample]) -> None:
    pass


Read = Callable[..., list[Sample]]  # given files by the names of their options
Score = Callable[[Records], float | None]  # None where no answers are known


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A dataset, how it is asked, and how answers are measured.

    Attributes:
        title: its name.
        task: how it is asked and measured.
        split: that the paper reports.
        source: where the files come from.
        layout: of the files, drawn.
        files: what has to be given: the name of an option, and what is there.
        more_files: what may be given besides.
        read: reads what is asked.
        read_support: reads what shots are taken from, where files have a part for them. None: they come from
            other files, by `read`.
        shared: files of the queries that are the shots' too, if no others are given.
        shots: how many are shown, unless something else is asked for.
        support_per_answer: how many samples of each class shots are taken from; None for 2048 in all.
        scorings: what other scripts measure, by their names.
        check: is given the name of a scoring, or None, and what is asked, and fails where that cannot be
            measured, as something is not installed.
        reads_wordnet: whether that is data of nltk's.
        upload: makes JSON of answers for the server that measures them.
        upload_keys: of each answer in it; None for an object of answers by their ids.
    """

    title: str
    task: Task
    split: str
    source: str
    layout: str
    files: Mapping[str, str]
    more_files: Mapping[str, str] = field(default_factory=dict)
    read: Read
    read_support: Read | None = None
    shared: frozenset[str] = frozenset({"images", "videos", "mapping", "classes"})
    shots: int = 4
    support_per_answer: int | None = None
    scorings: Mapping[str, Score] = field(default_factory=dict)
    check: Callable[[str | None, Sequence[Sample]], Any] = _nothing
    reads_wordnet: bool = False
    upload: Callable[[Records], Any] = plain_answers
    upload_keys: tuple[str, ...] | None = ("id", "answer")
