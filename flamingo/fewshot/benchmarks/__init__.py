"""The paper's benchmarks, as they are published: what is read, asked and measured.

files      JSON, CSV and folders, checked
benchmark  what there is to know of one
questions  VQAv2, OK-VQA, TextVQA, VizWiz
captions   COCO, Flickr30k, VATEX, YouCook2
videos     MSVD-QA, MSRVTT-QA, iVQA, NExT-QA, STAR
dialogue   VisDial
memes      Hateful Memes
classes    ImageNet, Kinetics, RareAct

A new one is a reader and a `Benchmark` in the file of its kind, a row in `BENCHMARKS`, a small set in its
published layout in `tests/helpers/published.py`, and a command in `docs/evaluating.md`.
"""

from flamingo.fewshot.benchmarks import captions, classes, dialogue, memes, questions, videos
from flamingo.fewshot.benchmarks.benchmark import Benchmark, option
from flamingo.fewshot.benchmarks.captions import read_captions, read_vatex, read_youcook2
from flamingo.fewshot.benchmarks.classes import read_imagenet, read_kinetics, read_rareact
from flamingo.fewshot.benchmarks.dialogue import read_visdial
from flamingo.fewshot.benchmarks.files import present
from flamingo.fewshot.benchmarks.memes import read_hateful_memes
from flamingo.fewshot.benchmarks.questions import read_textvqa, read_vizwiz, read_vqa
from flamingo.fewshot.benchmarks.videos import read_ivqa, read_nextqa, read_star, read_video_qa

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.task.name: benchmark
    for benchmark in (
        captions.COCO,
        captions.FLICKR30K,
        questions.VQAV2,
        questions.OK_VQA,
        questions.TEXTVQA,
        questions.VIZWIZ,
        dialogue.VISDIAL,
        memes.HATEFUL,
        videos.MSVD_QA,
        videos.MSRVTT_QA,
        videos.IVQA,
        videos.NEXT_QA,
        videos.STAR,
        captions.VATEX,
        captions.YOUCOOK2,
        classes.RAREACT,
        classes.IMAGENET,
        classes.KINETICS,
        # Files of one's own.
        questions.ANY_VQA,
        captions.ANY_CAPTIONS,
    )
}

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "option",
    "present",
    "read_captions",
    "read_hateful_memes",
    "read_imagenet",
    "read_ivqa",
    "read_kinetics",
    "read_nextqa",
    "read_rareact",
    "read_star",
    "read_textvqa",
    "read_vatex",
    "read_video_qa",
    "read_visdial",
    "read_vizwiz",
    "read_vqa",
    "read_youcook2",
]
