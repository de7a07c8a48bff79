"""The language model's training: lessons that end when they are learnt.

::

    repeats        lamp is nine is river lamp is nine is river ...          to 85 % right
    pairs          lamp nine river two lamp nine ...                        to 90 %
    lists          lamp is nine <EOC> river is two <EOC> lamp is nine ...   to 95 %
    and in each    Question: is nine odd? Answer: yes <EOC> ...             to the same

Lists alone do not teach to look up whose number is asked for. To guess a number said lately is right half of
the time, no small change makes it better, and there a model stays for more than a thousand steps. In repeats
nearly every word can be looked up, so that is learnt there, all at once; pairs and lists then take few steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from flamingo.demo.stages import CONFIG, LENGTH, update
from flamingo.demo.words import Text, facts, lists, pairs, repeats
from flamingo.language import LanguageModel
from flamingo.model import language_model

FACTS_LENGTH = 5
MEASURED = 30  # steps from one measurement of recall to the next
WARM_UP = 30  # steps in which the rates rise


@dataclass(frozen=True)
class Lesson:
    """Texts that a language model reads until it knows what they say again.

    Attributes:
        name: of the lesson.
        texts: makes so many of a length.
        length: of its texts.
        enough: what share of the known words must be right, of its texts and of the facts.
    """

    name: str
    texts: Callable[[int, int, torch.Generator], Text]
    length: int
    enough: float


LESSONS = (
    Lesson("repeats", repeats, 32, 0.85),
    Lesson("pairs", pairs, 16, 0.90),
    Lesson("lists", lists, LENGTH, 0.95),
)


@dataclass
class Course:
    """How the lessons went.

    Attributes:
        ends: by lesson, the step after which it was learnt; "all" is the last step.
        recall: by step, every 30 and the last, what `recall` measured.
    """

    ends: dict[str, int] = field(default_factory=dict)
    recall: dict[int, float] = field(default_factory=dict)


class NotLearntError(RuntimeError):
    """A lesson that was not learnt within the limit of steps."""


Report = Callable[[int, str, float], None]


def pretrain_language(
    lessons: Sequence[Lesson] = LESSONS,
    *,
    limit: int = 1500,
    last: int = 100,
    seed: int = 0,
    report: Report = lambda *_: None,
) -> tuple[LanguageModel, Course]:
    """A language model that looks up what a text has said before, and knows facts about numbers.

    A lesson ends by the running mean of what is right while it learns. No text but a fact is read twice, so
    that is what it knows of texts it has not seen.

    Args:
        lessons: in their order; fewer texts of each are read in those that follow.
        limit: steps of all lessons at most.
        last: steps after them on whole texts, in which the rates fall.
        seed: of the texts.
        report: is told the step, the lesson and the recall, every 30 steps.

    Raises:
        NotLearntError: at the limit.
    """
    reader, course = _Reader(seed), Course()
    for count, lesson in enumerate(lessons, 1):
        right, learnt = torch.zeros(2), False  # of its own texts, and of the facts
        while not learnt:
            if reader.steps == limit:
                raise NotLearntError(
                    f'lesson "{lesson.name}": expected {lesson.enough:.0%} right by step {limit}, got '
                    f"{right[0]:.0%}, and {right[1]:.0%} of the facts; another seed may learn it."
                )
            right += 0.1 * (reader.read(lessons[:count]) - right)
            learnt = bool(right.min() >= lesson.enough)
            _measure(reader, course, lesson.name, report)
        course.ends[lesson.name] = reader.steps
    for left in range(last, 0, -1):
        reader.read(lessons, rate=left / last, whole=True)
        _measure(reader, course, "all", report)
    course.ends["all"] = reader.steps
    course.recall[reader.steps] = recall(reader.model)
    return reader.model, course


@torch.no_grad()
def recall(model: LanguageModel, *, seed: int = 1) -> float:
    """How often a language model knows the number of a noun that a list has said before, of 10 numbers."""
    return _read(model, lists(200, LENGTH, torch.Generator().manual_seed(seed)))[1]


@torch.no_grad()
def knowledge(model: LanguageModel, *, seed: int = 1) -> float:
    """How often a language model knows whether something is true of a number."""
    return _read(model, facts(200, FACTS_LENGTH, torch.Generator().manual_seed(seed)))[1]


class _Reader:
    """A language model, what it learns by, and how many steps it has."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.model = language_model(CONFIG)
        self.steps = 0
        matrices = [p for p in self.model.layers.parameters() if p.ndim == 2]
        others = [p for p in self.model.parameters() if all(p is not each for each in matrices)]
        self.optimizers = (
            torch.optim.Muon(matrices, lr=2e-2, weight_decay=0.01),
            torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.99), weight_decay=0.01),
        )
        self.rates = [optimizer.defaults["lr"] for optimizer in self.optimizers]

    def read(self, lessons: Sequence[Lesson], *, rate: float = 1.0, whole: bool = False) -> Tensor:
        """One step by facts and all the lessons, the last of them most.

        Args:
            lessons: that have begun.
            rate: factor of the learning rates.
            whole: learn every word, not the known ones alone. Guesses at nouns, which are drawn, would hide
                the way to look up their numbers.

        Returns:
            What was right of the last lesson's known words, and of the facts.
        """
        counts = [16] * (len(lessons) - 1) + [64]
        texts = [facts(8, FACTS_LENGTH, self.generator)]
        texts += [
            each.texts(count, each.length, self.generator)
            for count, each in zip(counts, lessons, strict=True)
        ]
        losses, right = zip(*(_read(self.model, text, whole=whole) for text in texts), strict=True)
        for optimizer, full in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = full * rate * min(1.0, (self.steps + 1) / WARM_UP)
        update(torch.stack(losses).sum(), *self.optimizers)
        self.steps += 1
        return torch.tensor([right[-1], right[0]])


def _read(model: LanguageModel, text: Text, *, whole: bool = False) -> tuple[Tensor, float]:
    """The loss of the known words, and of all if the whole is learnt; and how many known ones are right."""
    logits, words, known = model(text.ids)[:, :-1], text.ids[:, 1:], text.known[:, 1:]
    loss = F.cross_entropy(logits[known], words[known])
    if whole:
        loss = loss + F.cross_entropy(logits.flatten(0, 1), words.flatten())
    return loss, (logits.argmax(dim=-1) == words)[known].float().mean().item()


def _measure(reader: _Reader, course: Course, lesson: str, report: Report) -> None:
    if reader.steps % MEASURED == 0:
        course.recall[reader.steps] = recall(reader.model)
        report(reader.steps, lesson, course.recall[reader.steps])
