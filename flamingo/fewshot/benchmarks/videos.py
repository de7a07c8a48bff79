"""Questions about videos: MSVD-QA, MSRVTT-QA, iVQA, NExT-QA and STAR."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from flamingo.fewshot import metrics
from flamingo.fewshot.benchmarks.benchmark import Benchmark, Records, details_of, per_cent
from flamingo.fewshot.benchmarks.classes import top_one_score
from flamingo.fewshot.benchmarks.files import (
    ID,
    LIST,
    NUMBER,
    TABLE,
    TEXT,
    Videos,
    all_or_none_answered,
    checked,
    entries,
    expect,
    read_json,
    seconds,
    span,
    table,
    with_ids,
)
from flamingo.fewshot.benchmarks.questions import most_common
from flamingo.fewshot.prompts import QUESTION, Sample
from flamingo.fewshot.runner import Task
from flamingo.text_files import lines


def _sample(name: int | str, video: object, question: str, answers: Sequence[str]) -> Sample:
    return Sample(
        id=name,
        image=video,
        fields={"question": question},
        answer=most_common(answers) if answers else "",
        references=tuple(answers),
    )


class _Names:
    """Names of questions. Another question under a name that is taken gets a number behind it.

    NExT-QA's training split, as it is published, has three of them. A question that is there twice keeps its
    name, to be refused.
    """

    def __init__(self) -> None:
        self._asked: dict[str, list[str]] = {}

    def of(self, name: str, question: str) -> str:
        asked = self._asked.setdefault(name, [])
        if question not in asked:
            asked.append(question)
        place = asked.index(question) + 1
        return name if place == 1 else f"{name}_{place}"


def read_video_qa(annotations: Path, videos: Path, mapping: Path | None = None) -> list[Sample]:
    """MSVD-QA and MSRVTT-QA: one sample a question, which has one answer.

    ::

        annotations  [{"id": 36000, "video_id": 1301, "question": "...", "answer": "dog"}, ...]
        mapping      -4wsuPCjDBc_5_15 vid1

    Args:
        annotations: `test_qa.json`, or another split's.
        videos: a folder; the video is the file in it, or in a folder below, called `video1301`, `vid1301` or
            `1301`, and a suffix.
        mapping: MSVD's `youtube_mapping.txt`, where the files have their names on YouTube.

    Raises:
        FileNotFoundError: if a file or the folder does not exist. A video that is not there is no error here:
            many are gone from the web.
        ValueError: if a file is of another format, or an id is there twice.

    Source: github.com/xudejing/video-question-answering.
    """
    found, named = Videos(videos), _mapping(mapping)
    samples = []
    for entry in entries(annotations, None, id=ID, video_id=ID, question=TEXT, answer=TEXT):
        number = entry["video_id"]
        names = [f"video{number}", f"vid{number}", str(number)]
        path = found.find(*names, *(named[name] for name in names if name in named))
        samples.append(_sample(entry["id"], path, entry["question"], [entry["answer"]]))
    return with_ids(samples, annotations)


def _mapping(path: Path | None) -> dict[str, str]:
    """The name on YouTube of each number of MSVD."""
    if path is None:
        return {}
    pairs = [line.split() for line in lines(path, "a file of names and numbers") if line.strip()]
    for number, line in enumerate(pairs, start=1):
        if len(line) != 2:
            raise ValueError(
                f"expected a name and a number in line {number} of {path}, got {' '.join(line)!r}."
            )
    return {number: name for name, number in pairs}


def read_ivqa(annotations: Path, videos: Path) -> list[Sample]:
    """iVQA: one sample a clip, with the answers of five annotators.

    ::

        annotations  video_id,start,end,question,answer1,answer2,answer3,answer4,answer5

    Args:
        annotations: `test.csv`, or another split's. Other columns are not looked at. Without `start` and
            `end` the file of a video is the clip.
        videos: a folder; the video is the file in it, or in a folder below, called by its `video_id`, and a
            clip cut out beforehand `VIDEO_START_END`.

    Raises:
        FileNotFoundError: if the file or the folder does not exist. A video that is not there is no error
            here: many are gone from the web.
        ValueError: if the file is of another format, or a question is there twice.

    Source: antoyang.github.io/just-ask.html.
    """
    found, names = Videos(videos), _Names()
    answers = [f"answer{number}" for number in range(1, 6)]
    samples = []
    for row in table(annotations, "video_id", "question", *answers):
        name, clip = row["video_id"], None
        if "start" in row and "end" in row:
            name = f"{row['video_id']}_{row['start']}_{row['end']}"
            times = (seconds(annotations, row, column) for column in ("start", "end"))
            clip = found.segment(name, row["video_id"], *span(annotations, name, *times))
        given = [row[answer].strip() for answer in answers if row[answer].strip()]
        if not given:
            raise ValueError(f"expected answers to the question about {name} in {annotations}, found none.")
        clip = clip or found.find(name)
        samples.append(_sample(names.of(name, row["question"]), clip, row["question"], given))
    return with_ids(samples, annotations)


def read_nextqa(annotations: Path, videos: Path, more_answers: Path | None = None) -> list[Sample]:
    """NExT-QA's open-ended questions: one sample a question, with one answer or two.

    ::

        annotations   video,frame_count,width,height,question,answer,qid,type
        more_answers  {"5772591393": {"2": "home", ...}}

    Args:
        annotations: `test.csv`, or another split's. In a file of the multiple-choice questions (`a0` to `a4`)
            the answer is the choice that `answer` counts to.
        videos: a folder; the video is the file in it, or in a folder below, called by its number, as
            `1164/5772591393.mp4`.
        more_answers: `add_reference_answer_test.json`, the second answers of the test split.

    Raises:
        FileNotFoundError: if a file or the folder does not exist. A video that is not there is no error here.
        ValueError: if a file is of another format, or a question is there twice.

    Source: github.com/doc-doc/NExT-OE; the same videos' choices are in github.com/doc-doc/NExT-QA.
    """
    found, names = Videos(videos), _Names()
    more = _more_answers(more_answers)
    samples = []
    for row in table(annotations, "video", "question", "answer", "qid", "type"):
        video, name = row["video"], names.of(f"{row['video']}_{row['qid']}", row["question"])
        answers = [_nextqa_answer(row, annotations)]
        if row["qid"] in more.get(video, {}):
            answers.append(more[video][row["qid"]])
        sample = _sample(name, found.find(video), row["question"], answers)
        samples.append(replace(sample, details={"type": row["type"]}))
    return with_ids(samples, annotations)


def _nextqa_answer(row: dict[str, str], path: Path) -> str:
    if "a0" not in row:
        return row["answer"]
    if (choice := row.get(f"a{row['answer']}")) is None:
        raise ValueError(
            f"expected 'answer' in {path} to count to a choice, as 0 to a0, got {row['answer']!r}."
        )
    return choice


def _more_answers(path: Path | None) -> dict[str, dict[str, str]]:
    if path is None:
        return {}
    more = read_json(path)
    if not TABLE.holds(more) or not all(TABLE.holds(each) for each in more.values()):
        raise ValueError(f"expected JSON with an object for each video in {path}, got something else.")
    for each in more.values():
        for name in each:
            expect(each, name, TEXT, path)
    return more


def read_star(annotations: Path, videos: Path) -> list[Sample]:
    """STAR: one sample a question, which has four choices.

    ::

        annotations  [{"question_id": "Interaction_T1_13", "question": "...", "answer": "The book.",
                       "video_id": "6H78U", "start": 11.1, "end": 19.6,
                       "choices": [{"choice_id": 0, "choice": "The book."}, ...]}],
                     without answers in the test split

    Args:
        annotations: `STAR_val.json`, or another split's.
        videos: a folder; the video is the file in it, or in a folder below, called by its id, as `6H78U.mp4`,
            and a clip cut out beforehand by its question's id.

    Raises:
        FileNotFoundError: if the file or the folder does not exist. A video that is not there is no error
            here.
        ValueError: if the file is of another format, an id is there twice, or an answer is no choice.

    Source: bobbywu.com/STAR.
    """
    found = Videos(videos)
    kinds = {"question_id": ID, "question": TEXT, "video_id": TEXT, "start": NUMBER, "end": NUMBER}
    samples = []
    for entry in entries(annotations, None, **kinds, choices=LIST):
        name = entry["question_id"]
        given = checked(entry["choices"], annotations, "choices", choice=TEXT)
        choices = tuple(choice["choice"] for choice in given)
        answers = [expect(entry, "answer", TEXT, annotations)] if "answer" in entry else []
        if not choices or not {*answers} <= {*choices}:
            raise ValueError(
                f"expected the answer of {name} in {annotations} to be a choice of it, got {choices}."
            )
        times = span(annotations, name, entry["start"], entry["end"])
        clip = found.segment(str(name), entry["video_id"], *times)
        sample = _sample(name, clip, entry["question"], answers)
        samples.append(replace(sample, candidates=choices))
    return with_ids(all_or_none_answered(samples, annotations), annotations)


def exact_score(records: Records) -> float | None:
    """The share of answers that are the right one, both normalised, in per cent; None without answers."""
    return per_cent(
        records, lambda record: bool(metrics.answer_matches(record["prediction"], record["references"]))
    )


def ivqa_score(records: Records) -> float | None:
    """The mean accuracy of iVQA in per cent; None without answers."""
    return per_cent(records, lambda record: metrics.ivqa_accuracy(record["prediction"], record["references"]))


def wups_score(records: Records, *, tagged: bool = False) -> float | None:
    """The mean WUPS at 0 in per cent, the better of two answers counting; None without answers.

    Yes or no (DB) and numbers (DC) are right or wrong, as in NExT-QA's script.
    """

    def score(record: dict[str, Any]) -> float:
        exact = details_of(record)["type"] in ("DB", "DC")
        return max(
            metrics.wups(record["prediction"], answer, tagged=tagged, exact=exact)
            for answer in record["references"]
        )

    return per_cent(records, score)


_FILES = {"annotations": "the file of questions and answers", "videos": "the folder of the videos"}

MSVD_QA = Benchmark(
    title="MSVD-QA",
    task=Task("msvdqa", QUESTION, "top-1 accuracy", exact_score),
    split="test; validation, to choose settings by",
    source="github.com/xudejing/video-question-answering (questions) and "
    "cs.utexas.edu/users/ml/clamp/videoDescription (videos)",
    layout="""\
test_qa.json                                  --annotations
youtube_mapping.txt                           --mapping, if files are called -4wsuPCjDBc_5_15.avi
video/vid1.avi ...                            --videos""",
    files=_FILES,
    more_files={"mapping": "youtube_mapping.txt, where files have their names on YouTube"},
    read=read_video_qa,
)

MSRVTT_QA = Benchmark(
    title="MSRVTT-QA",
    task=Task("msrvttqa", QUESTION, "top-1 accuracy", exact_score),
    split="test",
    source="github.com/xudejing/video-question-answering (questions); the videos are MSR-VTT's",
    layout="""\
test_qa.json                                  --annotations
video/video7010.mp4 ...                       --videos""",
    files=_FILES,
    read=read_video_qa,
)

IVQA = Benchmark(
    title="iVQA",
    task=Task("ivqa", QUESTION, "iVQA accuracy", ivqa_score),
    split="test",
    source="antoyang.github.io/just-ask.html (questions); the videos are YouTube's, of HowTo100M",
    layout="""\
test.csv                                      --annotations
video/Z5pmS7hbQSQ.mp4 ...                     --videos""",
    files=_FILES,
    read=read_ivqa,
)

NEXT_QA = Benchmark(
    title="NExT-QA, open-ended",
    task=Task("nextqa", QUESTION, "WUPS", wups_score),
    split="test",
    source="github.com/doc-doc/NExT-OE (questions) and NExT-QA (videos, of VidOR)",
    layout="""\
test.csv                                      --annotations
add_reference_answer_test.json                --more-answers
NExTVideo/1164/5772591393.mp4 ...             --videos""",
    files=_FILES,
    more_files={"more_answers": "add_reference_answer_test.json, the second answers of the test split"},
    read=read_nextqa,
    scorings={"official": partial(wups_score, tagged=True)},
    reads_wordnet=True,
    check=lambda scoring, _: metrics.load_words(tagged=scoring == "official"),
)

STAR = Benchmark(
    title="STAR",
    task=Task("star", QUESTION, "top-1 accuracy", top_one_score, closed=True),
    split="test, which has no answers; validation has",
    source="bobbywu.com/STAR (questions); the videos are Charades' (prior.allenai.org/projects/charades)",
    layout="""\
STAR_val.json                                 --annotations
Charades_v1_480/6H78U.mp4 ...                 --videos""",
    files=_FILES,
    read=read_star,
)
