"""Unusual actions: RareAct's mean weighted average precision."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from flamingo.fewshot.metrics.ranking import weighted_ap

_KIND = (2, 0, 1, 1, 1)  # of an annotation: 0 right, 1 hard to tell, 2 wrong


class Action(NamedTuple):
    """What RareAct says of a clip and of the class it was looked at for."""

    video: str
    label: int  # of the class, a column of the scores
    verb: str
    noun: str
    annotation: int  # 1: it is seen; 2, 3, 4: parts of it are; 0: nothing is


def mean_weighted_ap(scores: Sequence[Sequence[float]] | Tensor, clips: Sequence[Action]) -> float:
    """RareAct's mWAP: the mean over classes of the average precision of finding their clips.

    ::

        right          clips that were looked at for the class and show it (annotation 1)
        hard to tell   clips that were looked at for the class and show its verb, its noun, or both apart
                       (2, 3, 4), and clips that show another class of the same verb or noun
        wrong          clips that were looked at for the class and show nothing of it (0), and clips that
                       show a class of another verb and noun

        weight of a clip = 1 / clips of the same video in its row of this table

    Classes that no clip shows are left out.

    Args:
        scores: `[N, C]`, of each clip for each class.
        clips: N of them.

    Returns:
        A number in 0..1; papers print 100 times it.

    Raises:
        ImportError: without scikit-learn.
        ValueError: if the two differ in length, or no clip shows its class.

    Source: arXiv 2008.01018, section 4, and its script (github.com/antoine77340/RareAct).
    """
    classes = {clip.label: (clip.verb, clip.noun) for clip in clips}
    shown = {clip.label for clip in clips if clip.annotation == 1}
    if len(scores) != len(clips) or not shown:
        raise ValueError(
            "mean_weighted_ap: expected scores of as many clips, one or more that show their class, got "
            f"{len(scores)} and {len(clips)}, of which {sum(clip.annotation == 1 for clip in clips)} do."
        )
    precisions = []
    for label in sorted(shown):
        rows: tuple[list[int], list[int], list[int]] = ([], [], [])  # right, hard to tell, wrong
        for place, clip in enumerate(clips):
            if clip.label == label:
                rows[_KIND[clip.annotation]].append(place)
            elif clip.annotation == 1:
                verb, noun = classes[label]
                rows[1 if clip.verb == verb or clip.noun == noun else 2].append(place)
        ranked = [[float(scores[place][label]) for place in row] for row in rows]
        weights = [_of_videos([clips[place].video for place in row]) for row in rows]
        precisions.append(weighted_ap(ranked[0], ranked[1:], weights))
    return sum(precisions) / len(precisions)


def _of_videos(videos: Sequence[str]) -> list[float]:
    """A weight for each clip, so that every video weighs 1."""
    count = Counter(videos)
    return [1 / count[video] for video in videos]
