"""Prompts, letter by letter as in the paper, and as tokens."""

import numpy as np
import pytest

from flamingo import Processor
from flamingo.fewshot import Sample, conversation, trim
from flamingo.fewshot.prompts import (
    ACTION,
    CAPTION,
    CLASSIFICATION,
    CONVERSATION,
    HATEFUL_MEMES,
    QUESTION,
    VISUAL_DIALOGUE,
    action,
    dialogue_history,
)

IMAGE = np.zeros((4, 4, 3), dtype=np.uint8)


def written(document):
    """A document as the paper prints it, from its tokens."""
    processor = Processor(image_size=8)
    return processor.tokenizer.decode(processor.lay_out(document, prompt=True).ids)


def sample(answer="", **fields):
    return Sample(image=IMAGE, answer=answer, fields=fields)


@pytest.mark.parametrize(
    ("template", "shot", "query", "expected"),
    [
        (CAPTION, sample("A."), sample(), "<image>Output: A.<EOC><image>Output:"),
        (CLASSIFICATION, sample("tench"), sample(), "<image>Output: tench<EOC><image>Output:"),
        (
            QUESTION,
            sample("yes", question="Is it?"),
            sample("never shown", question="Why {so}?"),
            "<image>Question: Is it? Answer: yes<EOC><image>Question: Why {so}? Answer:",
        ),
        (
            HATEFUL_MEMES,
            sample("no", meme_text="hello"),
            sample(meme_text="bye"),
            '<image>is an image with written: "hello" on it. Is it hateful? Answer: no<EOC>'
            '<image>is an image with written: "bye" on it. Is it hateful? Answer:',
        ),
        (
            ACTION,
            sample("a person opens a door"),
            sample(),
            "<image>Caption: a person opens a door<EOC><image>Caption:",
        ),
        (
            VISUAL_DIALOGUE,
            sample("no", history="a cat", question="Is it big?"),
            sample(history=dialogue_history("dogs", [("two?", "yes"), ("big?", "no")]), question="old?"),
            "<image>a cat Question: Is it big? Answer: no<EOC>"
            "<image>dogs Question: two? Answer: yes Question: big? Answer: no Question: old? Answer:",
        ),
    ],
)
def test_templates(template, shot, query, expected):
    assert written(template.prompt(query, [shot])) == expected
    assert written(template.prompt(query)) == expected.partition("<EOC>")[2]


def test_shots_come_in_their_order():
    prompt = CAPTION.prompt(sample(), [sample("A."), sample("B."), sample("C.")])
    assert (
        written(prompt) == "<image>Output: A.<EOC><image>Output: B.<EOC><image>Output: C.<EOC><image>Output:"
    )


def test_zero_shot_is_two_shots_without_images():
    prompt = CAPTION.prompt(sample(), [sample("A."), sample("B.")], text_only=True)
    assert written(prompt) == "Output: A.<EOC>Output: B.<EOC><image>Output:"
    assert Processor(image_size=8)([prompt], prompt=True).num_media.tolist() == [1]


def test_a_missing_field_is_named():
    with pytest.raises(KeyError, match="question"):
        QUESTION.prompt(sample())


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (" a dog<EOC><EOC>", "a dog"),
        ("a dog", "a dog"),
        (" yes Question: why? Answer: so", "yes"),
        ("two Answer: three", "two"),
        ("a dog.\nOutput: a cat", "a dog."),
        ("Caption: a cat", ""),
        ("an Output without a colon", "an Output without a colon"),
        ("a<image>b", "a"),
    ],
)
def test_trim(text, kept):
    assert trim(text) == kept


def test_a_conversation():
    turns = [(IMAGE, "That is a cat."), ([IMAGE, "And this?"], "A dog.")]
    document = conversation(turns, "Which is older?")
    assert written(document) == (
        f"{CONVERSATION}\nUser: <EOC><image>\nFlamingo: That is a cat.\nUser: <EOC><image>And this?\n"
        "Flamingo: A dog.\nUser: Which is older?\nFlamingo:"
    )
    assert CONVERSATION.startswith(
        "This is a conversation between a human, User, and an intelligent visual AI, Flamingo."
    )


@pytest.mark.parametrize(
    ("verb", "noun", "said"),
    [
        ("cut", "laptop", "a person cuts a laptop"),
        ("wash", "apple", "a person washes an apple"),
        ("fry", "eggs", "a person fries eggs"),
        ("spray", "shoes", "a person sprays shoes"),
        ("unplug", "oven", "a person unplugs an oven"),
        ("close", "glass", "a person closes a glass"),
    ],
)
def test_an_action_is_in_the_third_person_and_has_an_article(verb, noun, said):
    assert action(verb, noun) == said
