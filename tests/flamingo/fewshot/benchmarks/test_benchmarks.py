"""The table of benchmarks, and what all of them have in common."""

import pytest

from flamingo.fewshot.benchmarks import BENCHMARKS
from tests.helpers import published

# The paper's sixteen, and its two classifications.
PUBLISHED = {
    "coco": "CIDEr",
    "flickr30k": "CIDEr",
    "vqav2": "VQA accuracy",
    "okvqa": "VQA accuracy of stems",
    "textvqa": "VQA accuracy",
    "vizwiz": "VQA accuracy",
    "visdial": "NDCG",
    "hatefulmemes": "ROC AUC",
    "msvdqa": "top-1 accuracy",
    "msrvttqa": "top-1 accuracy",
    "ivqa": "iVQA accuracy",
    "nextqa": "WUPS",
    "star": "top-1 accuracy",
    "vatex": "CIDEr",
    "youcook2": "CIDEr",
    "rareact": "mWAP",
    "imagenet": "top-1 accuracy",
    "kinetics": "top-1 accuracy",
}


def test_all_are_there_and_measured_as_in_the_paper():
    found = {name: benchmark.task.metric for name, benchmark in BENCHMARKS.items()}
    assert found == PUBLISHED | {"vqa": "VQA accuracy", "captions": "CIDEr"}
    assert all(name == benchmark.task.name for name, benchmark in BENCHMARKS.items())


def test_closed_ended_are_those_of_the_paper():
    closed = {name for name, benchmark in BENCHMARKS.items() if benchmark.task.closed}
    assert closed == {"visdial", "hatefulmemes", "star", "rareact", "imagenet", "kinetics"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_sample_has_all_that_its_prompt_and_its_run_ask_for(tmp_path, name):
    benchmark = BENCHMARKS[name]
    files = getattr(published, name)(tmp_path)
    assert set(benchmark.files) <= set(files) <= {*benchmark.files, *benchmark.more_files}
    samples = (benchmark.read_support or benchmark.read)(**files)
    assert len({sample.id for sample in samples}) == len(samples) > 0
    for sample in samples:
        document = benchmark.task.template.prompt(sample, [sample])
        assert document[1].endswith(f" {sample.answer}<EOC>")
        assert "{" not in document[1].replace("{x}", "")
        assert sample.answer
        assert bool(sample.candidates) == benchmark.task.closed
        assert sample.answer in sample.candidates or not benchmark.task.closed


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_layout_names_every_option(name):
    benchmark = BENCHMARKS[name]
    for option in benchmark.files:
        assert f"--{option.replace('_', '-')}" in benchmark.layout


@pytest.mark.parametrize("name", PUBLISHED)
def test_files_that_are_not_there_are_named(tmp_path, name):
    files = getattr(published, name)(tmp_path)
    for option, path in files.items():
        with pytest.raises(FileNotFoundError, match=f"{path.name}_gone"):
            BENCHMARKS[name].read(**files | {option: path.with_name(f"{path.name}_gone")})
