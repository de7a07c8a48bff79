"""Samples to prompts: documents in which a few answered samples come before the one that is asked.

::

    <image>Output: a cat on a mat.<EOC><image>Output: two dogs.<EOC><image>Output:
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, eq=False)  # an image may be an array, which has no one equality
class Sample:
    """An image or a clip, what is asked about it, and the answer."""

    image: Any  # a medium of `Processor`
    answer: str = ""  # what it shows as a shot
    fields: Mapping[str, str] = field(default_factory=dict)  # what the template names, as question
    references: tuple[str, ...] = ()  # the answers that a prediction is held against
    candidates: tuple[str, ...] = ()  # of a closed-ended task: what it is to choose from
    details: Mapping[str, Any] = field(default_factory=dict)  # what else its metric asks for, as JSON
    id: int | str = ""  # its name in a run


@dataclass(frozen=True)
class Template:
    """The text between an image and its answer.

    Args:
        ask: a format string over the fields of a sample, for `str.format`.

    Source: arXiv 2204.14198, appendix B.1.4.

    >>> shot = Sample(image="(a cat)", fields={"question": "What is it?"}, answer="a cat")
    >>> query = Sample(image="(a dog)", fields={"question": "Is it big?"})
    >>> QUESTION.prompt(query, [shot])
    ['(a cat)', 'Question: What is it? Answer: a cat<EOC>', '(a dog)', 'Question: Is it big? Answer:']
    """

    ask: str

    def prompt(self, query: Sample, shots: Sequence[Sample] = (), *, text_only: bool = False) -> list:
        """The document that asks the query after showing the shots.

        Args:
            query: its answer is not looked at.
            shots: in order; the last is the nearest to the query.
            text_only: leave the images of the shots out. The paper's zero-shot prompt has two such shots,
                which show the form of an answer and no image.

        Raises:
            KeyError: if a sample lacks a field that the template names.
        """
        return [*self.shown(shots, text_only=text_only), *self.asked(query)]

    def shown(self, shots: Sequence[Sample], *, text_only: bool = False) -> list:
        """The beginning of `prompt`, which many queries can share."""
        document: list = []
        for shot in shots:
            text = f"{self.ask.format(**shot.fields)} {shot.answer}<EOC>"
            document += [text] if text_only else [shot.image, text]
        return document

    def asked(self, query: Sample) -> list:
        """The end of `prompt`."""
        return [query.image, self.ask.format(**query.fields)]


CAPTION = Template("Output:")
QUESTION = Template("Question: {question} Answer:")
# The caption and the turns so far, see `dialogue_history`, come before the question.
VISUAL_DIALOGUE = Template("{history} Question: {question} Answer:")
HATEFUL_MEMES = Template('is an image with written: "{meme_text}" on it. Is it hateful? Answer:')
# Candidates are those of `action`.
ACTION = Template("Caption:")
# The paper prints none for ImageNet and Kinetics; this is that of captions.
CLASSIFICATION = Template("Output:")

_SIBILANT = re.compile(r"(?:s|x|z|ch|sh|o)$")  # a verb's ending that takes "es"


def action(verb: str, noun: str) -> str:
    """The caption of an action, a candidate of `ACTION`: the verb in the third person, and an article.

    Source: arXiv 2204.14198, appendix B.1.4, which gives the form and no rules. A noun that ends in one s has
    no article.

    >>> action("cut", "apple"), action("fry", "eggs"), action("wash", "car")
    ('a person cuts an apple', 'a person fries eggs', 'a person washes a car')
    """
    says = f"{verb}es" if _SIBILANT.search(verb) else f"{verb}s"
    if re.search("[^aeiou]y$", verb):
        says = f"{verb[:-1]}ies"
    article = "" if re.search("[^s]s$", noun) else "an " if noun[:1] in "aeiou" else "a "
    return f"a person {says} {article}{noun}"


_KEYWORDS = re.compile("Question:|Answer:|Output:|Caption:|<EOC>|<image>")


def trim(text: str) -> str:
    """What was generated up to the first keyword of a prompt: `<EOC>` is sometimes not produced.

    Source: arXiv 2204.14198, v1, section 4.4.1.

    >>> trim(" two dogs. Output: a cat")
    'two dogs.'
    """
    return _KEYWORDS.split(text, maxsplit=1)[0].strip()


def dialogue_history(caption: str, turns: Sequence[tuple[str, str]]) -> str:
    """The field of `VISUAL_DIALOGUE`: the caption as it is, then (question, answer) pairs.

    >>> dialogue_history("two dogs", [("Are they big?", "yes")])
    'two dogs Question: Are they big? Answer: yes'
    """
    asked = [f"{QUESTION.ask.format(question=question)} {answer}" for question, answer in turns]
    return " ".join([caption, *asked])


CONVERSATION = (
    "This is a conversation between a human, User, and an intelligent visual AI, Flamingo. User sends "
    "images, and Flamingo describes them."
)


def conversation(turns: Sequence[tuple[Any, str]], user: Any, *, introduction: str = CONVERSATION) -> list:
    """A chat so far, and what the user now says, as a document for Flamingo to answer.

    Args:
        turns: pairs of what the user said and what Flamingo answered. The user says a text, a medium, or a
            list of texts and media. The paper begins with three such turns about images of its own choice.
        user: said last.
        introduction: the first line.

    Source: arXiv 2204.14198, appendix B.1.6.

    >>> conversation([("(a cat)", "That is a cat.")], "Is it big?", introduction="A chat.")
    ['A chat.\\nUser: ', '(a cat)', '\\nFlamingo: That is a cat.\\nUser: ', 'Is it big?', '\\nFlamingo:']
    """
    document = [f"{introduction}\nUser: "]
    for said, answer in turns:
        document += [*_parts(said), f"\nFlamingo: {answer}\nUser: "]
    return [*document, *_parts(user), "\nFlamingo:"]


def _parts(said: Any) -> list:
    return said if isinstance(said, list) else [said]
