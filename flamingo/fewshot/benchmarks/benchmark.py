"""What there is to know of a benchmark before it is run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flamingo.fewshot.prompts import Sample
from flamingo.fewshot.runner import Task

Records = Sequence[dict[str, Any]]


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


def _nothing(scoring: str | None) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A dataset, how it is asked, and how answers are measured."""

    title: str
    task: Task
    split: str  # that the paper reports, or chose its settings by
    source: str  # where the files come from
    layout: str  # of the files, drawn
    files: Mapping[str, str]  # what has to be given: the name of an option, and what is there
    more_files: Mapping[str, str] = field(default_factory=dict)  # what may be given besides
    read: Callable[..., list[Sample]]  # given the files by their names: what is asked
    # Likewise: what shots are taken from. None: by `read`, from other files.
    read_support: Callable[..., list[Sample]] | None = None
    scorings: Mapping[str, Callable[[Records], float | None]] = field(
        default_factory=dict
    )  # others', by name
    upload: Callable[[Records], Any] = plain_answers  # JSON of answers that a server measures
    upload_keys: tuple[str, ...] | None = ("id", "answer")  # of each answer in it; None: answers by their ids
    needs: Callable[[str | None], Any] = _nothing  # fails where what a scoring reads is not installed
    reads_wordnet: bool = False
    shots: int = 4  # unless something else is asked for
    support_per_answer: int | None = None  # how many of each class shots are taken from; None: 2048 in all
    # Files of the queries that are also the shots', if no others are given.
    shared: frozenset[str] = frozenset({"images", "videos", "mapping", "classes"})

    @property
    def media(self) -> str:
        """The option that names the folder of images or videos."""
        return "videos" if "videos" in self.files else "images"
