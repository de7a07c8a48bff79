"""Answers of a few words by how near their meanings are: WUPS, by nltk and WordNet."""

import re
import warnings
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

from flamingo.command_line import remedy

# Words that say nothing, as NExT-QA's script has them; those of order, place and number stay.
_STOPPED = frozenset(
    re.findall(
        r"\S+",
        """
        i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her
        hers herself it its itself they them their theirs themselves
        what which who whom this that these those here there when where why how
        am is are was were be been being have has had having do does did doing can will just should now
        a an the and but if or because as until while than so too very only own such some any all each most
        other of at for with about into through during from to again further then
        s t d m o y ma ll re ve don ain you're you've you'll you'd she's it's that'll don't should've
        """,
    )
) | {
    f"{word}{ending}"
    for word in re.findall(
        r"\w+",
        "aren couldn didn doesn hadn hasn haven isn mightn mustn needn shan shouldn wasn weren won wouldn",
    )
    for ending in ("", "'t")
}
_CORPUS = "wordnet"
_TAGGER = "averaged_perceptron_tagger_eng"
_KINDS = {"NN": "n", "VB": "v", "JJ": "a", "RB": "r"}  # the tags of parts of speech, and WordNet's letters


class Words(NamedTuple):
    """WordNet, and where lemmas follow the parts of speech of a text, what tags these."""

    wordnet: Any
    tag: Any = None


def wups(
    prediction: str, answer: str, *, threshold: float = 0.0, tagged: bool = False, exact: bool = False
) -> float:
    """How near two answers are in meaning, word by word: NExT-QA's WUPS.

    ::

        near(a, b) = 1 if the words are equal, else the Wu-Palmer similarity of the first meaning of each,
                     a tenth of it below the threshold, 0 for words that WordNet lacks
        one_way(A, B) = product over the words a of A of max over b of B of near(a, b), without the zeros;
                        0 if there are only zeros
        WUPS = min(one_way(prediction, answer), one_way(answer, prediction))

    Words are lemmas, and those that say nothing are left out. NExT-QA's script finds lemmas by the part of
    speech that a tagger gives each word (`tagged`); without it a word has the first part of speech that
    WordNet knows it by, as "saw" is a tool. Meanings that WordNet does not join count as 0 here and there.

    Args:
        prediction: the model's answer.
        answer: the right one.
        threshold: 0 for NExT-QA's WUPS; 0.9 is used too.
        tagged: find lemmas by nltk's tagger, as the script.
        exact: 1 if the words are equal, else 0: what the script does for yes or no, and for numbers.

    Returns:
        A number in 0..1; papers print 100 times its mean.

    Raises:
        ImportError: without nltk.
        ValueError: if nltk finds no WordNet, or no tagger.

    Limits: a text without a word that says something, as "it is", has 0, also against itself, as in the
        script.

    Source: arXiv 2105.08276; github.com/doc-doc/NExT-OE; arXiv 1410.0210 for WUPS.
    """
    words = load_words(tagged=tagged)
    said, right = (_meaningful(text, words) for text in (prediction, answer))
    if exact:
        return float(said == right)
    return min(_one_way(said, right, words, threshold), _one_way(right, said, words, threshold))


def _one_way(some: Sequence[str], others: Sequence[str], words: Words, threshold: float) -> float:
    nearest = [max((_near(a, b, words.wordnet, threshold) for b in others), default=0.0) for a in some]
    found = [each for each in nearest if each]
    product = float(bool(found))
    for each in found:
        product *= each
    return product


def _near(a: str, b: str, wordnet: Any, threshold: float) -> float:
    if a == b:
        return 1.0
    meanings = [wordnet.synsets(word)[:1] for word in (a, b)]
    if not all(meanings):
        return 0.0
    near = meanings[0][0].wup_similarity(meanings[1][0]) or 0.0
    return near if near >= threshold else 0.1 * near


def _meaningful(text: str, words: Words) -> list[str]:
    """The lemmas of a text that say something."""
    tokens = import_nltk("nltk.tokenize").word_tokenize(text, preserve_line=True)
    tags = [tag for _, tag in words.tag(tokens)] if words.tag else [None] * len(tokens)
    lemmas = [_lemma(token, tag, words) for token, tag in zip(tokens, tags, strict=True)]
    return [lemma for lemma in lemmas if lemma not in _STOPPED]


def _lemma(token: str, tag: str | None, words: Words) -> str:
    """A word as WordNet has it, or if it lacks that, its stem, or itself."""
    word, wordnet = token.lower(), words.wordnet
    if tag is not None:
        kind = _KINDS.get(tag[:2]) or _KINDS.get(words.tag([word])[0][1][:2], "n")
    elif word in _STOPPED:
        return word  # WordNet would make "wa" of "was"
    else:
        kind = next((kind for kind in _KINDS.values() if wordnet.morphy(word, kind)), "n")
    lemma = min(wordnet._morphy(word, kind) or [word], key=len)  # as nltk's lemmatizer
    if wordnet.synsets(lemma):
        return lemma
    stem = import_nltk("nltk.stem.porter").PorterStemmer().stem(word)
    return stem if wordnet.synsets(stem) else word


def load_words(*, tagged: bool = False) -> Words:
    """WordNet, and if asked for a tagger, where nltk finds its data.

    Raises:
        ImportError: without nltk.
        ValueError: if nltk does not find them.
    """
    wordnet = _wordnet(_found(f"corpora/{_CORPUS}"))
    if not tagged:
        return Words(wordnet)
    return Words(wordnet, _tagger(_found(f"taggers/{_TAGGER}")).tag)


def _found(resource: str) -> Any:
    """Where nltk has a part of its data, unpacked or not."""
    data, name = import_nltk("nltk.data"), resource.rpartition("/")[2]
    for form in (f"{resource}/", f"{resource}.zip/{name}/"):
        try:
            return data.find(form)
        except LookupError:
            continue
    raise ValueError(
        f"wups: expected {resource} among nltk's data, found none. Get it by python -m nltk.downloader "
        f"{name}, or name the folder of the data, with --nltk-data or in NLTK_DATA."
    )


@lru_cache(maxsize=2)
def _wordnet(root: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other languages are not there
        return import_nltk("nltk.corpus.reader.wordnet").WordNetCorpusReader(root, None)


@lru_cache(maxsize=2)
def _tagger(root: Any) -> Any:
    return import_nltk("nltk.tag.perceptron").PerceptronTagger(loc=root)


def import_nltk(module: str) -> Any:
    """A module of nltk.

    Raises:
        ImportError: without nltk.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{module}: needs nltk. {remedy('evaluate')}") from error
