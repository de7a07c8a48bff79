"""A WordNet of a few words, in WordNet's own files, and a tagger of a few words, in nltk's."""

import json
from pathlib import Path

# A noun's meaning: its words, and the meaning above it.
NOUNS = {
    "entity": (["entity"], None),
    "animal": (["animal", "beast"], "entity"),
    "dog": (["dog"], "animal"),
    "cat": (["cat"], "animal"),
    "thing": (["thing"], "entity"),
    "saw": (["saw"], "thing"),
}
VERBS = {"see": (["see"], None), "run": (["run"], None)}
_EMPTY = ("index.adj", "index.adv", "data.adj", "data.adv", "adj.exc", "adv.exc", "noun.exc", "index.sense")


def write_wordnet(data: Path) -> Path:
    """Writes `corpora/wordnet` into a folder of nltk's data, and returns that folder."""
    folder = data / "corpora" / "wordnet"
    folder.mkdir(parents=True)
    for name in (*_EMPTY, "cntlist.rev"):
        (folder / name).touch()
    (folder / "verb.exc").write_text("saw see\nran run\n")
    (folder / "lexnames").write_text("00\tadj.all\t3\n01\tadj.pert\t3\n02\tadv.all\t4\n03\tnoun.Tops\t1\n")
    _write_kind(folder, "noun", "n", NOUNS)
    _write_kind(folder, "verb", "v", VERBS)
    return data


def _write_kind(folder: Path, kind: str, letter: str, meanings: dict) -> None:
    places: dict[str, int] = {}
    for _ in range(2):  # a line names places in the file, which have one width
        lines, place = [], 0
        for name, (words, above) in meanings.items():
            pointer = f"001 @ {places.get(above, 0):08d} {letter} 0000" if above else "000"
            frames = " 01 + 02 00" if letter == "v" else ""
            said = " ".join(f"{word} 0" for word in words)
            line = f"{place:08d} 03 {letter} {len(words):02x} {said} {pointer}{frames} | {name}  \n"
            places[name] = place
            lines.append(line)
            place += len(line)
    (folder / f"data.{kind}").write_text("".join(lines))
    index = {word: name for name, (words, _) in meanings.items() for word in words}
    (folder / f"index.{kind}").write_text(
        "".join(f"{word} {letter} 1 1 @ 1 0 {places[name]:08d}  \n" for word, name in sorted(index.items()))
    )


def write_tagger(data: Path, tags: dict[str, str]) -> Path:
    """Writes `taggers/averaged_perceptron_tagger_eng` that knows these words and no others."""
    name = "averaged_perceptron_tagger_eng"
    folder = data / "taggers" / name
    folder.mkdir(parents=True)
    contents = {"weights": {}, "tagdict": tags, "classes": sorted({*tags.values()})}
    for part, content in contents.items():
        (folder / f"{name}.{part}.json").write_text(json.dumps(content))
    return data
