"""The results of several processes, joined to those of one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

from flamingo import Flamingo, FlamingoConfig, Processor
from flamingo.fewshot import VQA, Sample, Task, evaluate
from flamingo.fewshot.prompts import CLASSIFICATION
from flamingo.fewshot.records import Results
from tests.helpers.weights import randomise

HEADER = {
    "task": "vqa",
    "max_new_tokens": 3,
    "num_beams": 1,
    "shots": 2,
    "select": "random",
    "seed": 0,
    "samples": 5,
}
CLOSED = Task("colours", CLASSIFICATION, "top-1", lambda records: float(len(records)), closed=True)
RUNS = {
    "random": (VQA, {}),
    "fixed": (VQA, {"select": "fixed"}),
    "rices": (VQA, {"select": "rices"}),
    "closed": (CLOSED, {"select": "fixed", "permutations": 2}),
}


def record(name):
    return {"id": name, "prediction": "white", "references": [], "shots": []}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def samples(seed, count):
    images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    questions = [{"question": "What?" * (1 + number % 2)} for number in range(count)]
    return [
        Sample(
            id=f"{seed}-{number}",
            image=image,
            fields=fields,
            answer="a",
            references=("a",) * 10,
            candidates=("a", "bc"),
        )
        for number, (image, fields) in enumerate(zip(images, questions, strict=True))
    ]


def run(folder: Path, name: str):
    torch.manual_seed(0)
    model = randomise(Flamingo(FlamingoConfig.preset("tiny", tie_embeddings=False)), std=0.2).eval()
    task, options = RUNS[name]
    how = {"shots": 2, "batch_size": 2, "num_beams": 1} | options
    return evaluate(model, Processor(32), task, samples(1, 7), samples(2, 6), folder / name, **how)


def work(me: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=me, world_size=2)
    found = [run(folder, name) for name in RUNS]
    (folder / f"said-{me}").write_text(repr(found))
    distributed.barrier()
    distributed.destroy_process_group()


def test_two_processes_find_what_one_does(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    torch.multiprocessing.spawn(work, (tmp_path / "two",), nprocs=2)
    expected = repr([run(tmp_path / "one", name) for name in RUNS])
    for me in range(2):
        assert (tmp_path / "two" / f"said-{me}").read_text() == expected
    for name in RUNS:
        header, *found = lines(tmp_path / "two" / name)
        its_header, *of_one = lines(tmp_path / "one" / name)
        assert header == its_header
        assert [each["id"] for each in found] == [sample.id for sample in samples(1, 7)]
        by_id = {each["id"]: each for each in of_one}
        for each in found:
            scores, its_scores = each.pop("scores", []), by_id[each["id"]].pop("scores", [])
            assert scores == pytest.approx(its_scores, rel=1e-4)
            assert each == by_id[each["id"]]
    left = {path.name for path in (tmp_path / "two").iterdir()} - {"rendezvous"}
    assert left == {*RUNS, "said-0", "said-1"}


class TestParts:
    """What a run of several processes that was killed has left."""

    def write(self, path, names, header=HEADER, torn=""):
        content = [json.dumps(header), *(json.dumps(record(name)) for name in names)]
        path.write_text("\n".join(content) + "\n" + torn)

    def test_are_joined_when_a_run_goes_on(self, tmp_path):
        output = tmp_path / "out"
        self.write(output, [3])
        self.write(tmp_path / "out.0", [0, 4])
        self.write(tmp_path / "out.1", [2], torn='{"id": 1, "predic')
        results = Results(output, HEADER)
        assert sorted(results.records) == [0, 2, 3, 4]
        results.open([0, 1, 2, 3, 4])
        results.add([record(1)])
        results.close([0, 1, 2, 3, 4])
        assert [each["id"] for each in lines(output)[1:]] == [0, 2, 3, 4, 1]
        assert list(tmp_path.iterdir()) == [output]

    def test_a_name_is_no_pattern(self, tmp_path):
        output = tmp_path / "out[1]*.jsonl"
        self.write(tmp_path / "out[1]*.jsonl.0", [1])
        self.write(tmp_path / "out1.jsonl.1", [2])
        assert sorted(Results(output, HEADER).records) == [1]

    def test_those_of_another_run_are_refused(self, tmp_path):
        self.write(tmp_path / "out.1", [2], header=HEADER | {"seed": 1})
        with pytest.raises(ValueError, match=r"out\.1 to be of a run with .*'seed': 0"):
            Results(tmp_path / "out", HEADER)
        assert lines(tmp_path / "out.1")[0]["seed"] == 1

    def test_a_file_of_another_name_is_nobodys(self, tmp_path):
        for name in ("out.txt", "out.1.txt", "out1"):
            (tmp_path / name).write_text("mine")
        results = Results(tmp_path / "out", HEADER)
        results.open([1])
        results.close([1])
        assert {path.name for path in tmp_path.iterdir()} == {"out", "out.txt", "out.1.txt", "out1"}


def test_a_broken_image_is_tried_again_when_a_run_goes_on(tmp_path):
    results = Results(tmp_path / "out", HEADER)
    results.open([1, 2])
    results.add([{"id": 1, "error": "no image"}, record(2)])
    results.close([1, 2])
    assert sorted(results.records) == [1, 2]
    again = Results(tmp_path / "out", HEADER)
    assert sorted(again.records) == [2]
    again.open([1, 2])
    again.add([record(1)])
    again.close([1, 2])
    assert Results(tmp_path / "out", HEADER).records == {1: record(1), 2: record(2)}


def test_a_second_run_in_another_process_is_refused(tmp_path):
    hold = "import fcntl, sys; file = open(sys.argv[1], 'ab'); fcntl.lockf(file, 2); print(); input()"
    output = tmp_path / "out"
    output.touch()
    command = [sys.executable, "-c", hold, str(output)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match=r"expected .*out to be this run's alone"):
            Results(output, HEADER).open([1])
        other.communicate("\n")
    Results(output, HEADER).open([1])


def test_settings_are_compared_as_they_are_written(tmp_path):
    header = HEADER | {"sizes": (1, 2)}
    for _ in range(2):
        results = Results(tmp_path / "out", header)
        results.open([1])
        results.close([1])
