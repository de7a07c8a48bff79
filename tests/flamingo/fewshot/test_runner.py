"""Runs whose result is known, and runs that are killed halfway."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flamingo import Flamingo, FlamingoConfig, Processor, complete
from flamingo.__main__ import main
from flamingo.fewshot import (
    CAPTIONS,
    CLASSIFICATION,
    QUESTION,
    VQA,
    Sample,
    Task,
    cider,
    command,
    evaluate,
    log_likelihoods,
    trim,
    vqa_accuracy,
)
from flamingo.fewshot.scoring import batches
from tests.helpers import ROOT
from tests.helpers.kernels import has_kernels
from tests.helpers.scripted import PROCESSOR, SHADES, Namer, picture, write_captions, write_vqa
from tests.helpers.weights import randomise

QUERIES = ["white", "black", "grey", "white", "black"]


def sample(shade, name):
    return Sample(
        id=name,
        image=picture(shade),
        fields={"question": "What colour?"},
        answer=shade,
        references=(shade,) * 10,
    )


QUERY_SAMPLES = [sample(shade, number) for number, shade in enumerate(QUERIES)]
SUPPORT = [sample(shade, f"support {number}") for number, shade in enumerate([*SHADES] * 3)]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class TestEvaluate:
    def run(self, path, queries=QUERY_SAMPLES, task=VQA, model=None, **options):
        return evaluate(model or Namer(), PROCESSOR, task, queries, SUPPORT, path, batch_size=2, **options)

    def test_writes_a_line_a_sample_and_measures(self, tmp_path):
        wrong = sample("white", "wrong")
        answers = ("white",) * 2 + ("black",) * 8
        wrong = Sample(id="wrong", image=wrong.image, fields=wrong.fields, references=answers)
        result = self.run(tmp_path / "out.jsonl", [*QUERY_SAMPLES, wrong], shots=3)
        expected = 100 * (5 + vqa_accuracy("white", answers)) / 6
        assert result.value == pytest.approx(expected)
        assert str(result) == f"vqa: VQA accuracy {expected:.2f} (6 samples, 3 shots)"
        header, *records = lines(tmp_path / "out.jsonl")
        how = {"task": "vqa", "max_new_tokens": 10, "num_beams": 3}
        assert header == how | {"shots": 3, "select": "random", "seed": 0, "samples": 6}
        assert [record["id"] for record in records] == [0, 1, 2, 3, 4, "wrong"]
        assert [record["prediction"] for record in records] == [*QUERIES, "white"]
        assert all(len(set(record["shots"])) == 3 for record in records)

    @pytest.mark.parametrize(("options", "num_beams"), [({}, 3), ({"num_beams": 1}, 1)])
    def test_answers_by_beam_search(self, tmp_path, options, num_beams):
        model = Namer()
        self.run(tmp_path / "out.jsonl", model=model, **options)
        assert model.num_beams == num_beams

    def test_every_batch_is_on_the_disk_before_the_next(self, tmp_path, monkeypatch):
        """Lines of the file, its settings' included, at each flush."""
        output, flushed, fsync = tmp_path / "out.jsonl", [], os.fsync
        monkeypatch.setattr(os, "fsync", lambda file: flushed.append(len(lines(output))) or fsync(file))
        self.run(output)
        assert flushed == [3, 5, 6]

    def test_captions(self, tmp_path):
        queries = [
            Sample(id=number, image=picture(shade), references=(f"{shade}", f"a {shade} wall"))
            for number, shade in enumerate(QUERIES)
        ]
        result = self.run(tmp_path / "out.jsonl", queries, CAPTIONS)
        assert result.value == pytest.approx(100 * cider(QUERIES, [query.references for query in queries])[0])
        assert result.value > 0

    def test_shots_are_the_querys_own_whatever_comes_before(self, tmp_path):
        shots = {}
        for name, queries in (("all", QUERY_SAMPLES), ("last", QUERY_SAMPLES[3:])):
            self.run(tmp_path / name, queries, shots=2)
            shots[name] = {record["id"]: record["shots"] for record in lines(tmp_path / name)[1:]}
        assert shots["last"] == {name: shots["all"][name] for name in (3, 4)}
        assert len({tuple(few) for few in shots["all"].values()}) > 2
        self.run(tmp_path / "seed", shots=2, seed=1)
        assert {record["id"]: record["shots"] for record in lines(tmp_path / "seed")[1:]} != shots["all"]

    def test_zero_shots_are_two_without_images(self, tmp_path):
        model, prompts = Namer(), []
        generate = model.generate
        model.generate = lambda ids, pixels, mask, **options: (
            prompts.extend(row[real].tolist() for row, real in zip(ids, mask, strict=True)),
            generate(ids, pixels, mask, **options),
        )[1]
        self.run(tmp_path / "out.jsonl", shots=0, model=model)
        assert len(prompts) == 5
        for ids, query in zip(prompts, QUERIES, strict=True):
            text = PROCESSOR.tokenizer.decode(ids)
            asked = "Question: What colour? Answer:"
            first, second, last = text.split("<EOC>")
            assert first in {f"{asked} {shade}" for shade in SHADES}
            assert second in {f"{asked} {shade}" for shade in SHADES}
            assert last == f"<image>{asked}", query
        assert model.encoded == 3  # white and black come twice

    def test_rices_puts_the_most_alike_last(self, tmp_path):
        self.run(tmp_path / "out.jsonl", shots=5, select="rices")
        named = {one.id: one.answer for one in SUPPORT}
        for record, shade in zip(lines(tmp_path / "out.jsonl")[1:], QUERIES, strict=True):
            away = [abs(SHADES[named[name]] - SHADES[shade]) for name in record["shots"]]
            assert away == sorted(away, reverse=True)
            assert away[-3:] == [0, 0, 0]

    @pytest.mark.parametrize("select", ["random", "rices"])
    def test_a_query_is_not_shown_its_own_answer(self, tmp_path, select):
        pillow = pytest.importorskip("PIL.Image")
        samples = []
        for shade in SHADES:
            pillow.fromarray(picture(shade)).save(tmp_path / f"{shade}.png")
            one = sample(shade, shade)
            path = tmp_path / f"{shade}.png"
            samples.append(Sample(id=shade, image=path, fields=one.fields, answer=shade, references=(shade,)))
        support = [
            replace(one, image=Path(str(one.image))) for one in samples
        ]  # other objects, the same files
        evaluate(Namer(), PROCESSOR, VQA, samples, support, tmp_path / "out", shots=2, select=select)
        for record in lines(tmp_path / "out")[1:]:
            assert sorted([record["id"], *record["shots"]]) == sorted(SHADES)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"select": "best"}, "select 'random', 'fixed' or 'rices', got 'best'"),
            ({"shots": 10}, "10 samples or more in the support .* query 0, got 9"),
            ({"queries": []}, "one query or more, each with its own id, got 0"),
            ({"queries": QUERY_SAMPLES[:1] * 2}, "each with its own id, got 2 with 1 ids"),
        ],
    )
    def test_errors(self, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            self.run(tmp_path / "out.jsonl", **options)
        assert not (tmp_path / "out.jsonl").exists()


class TestClosed:
    """Candidates are ranked: the shade that the image has."""

    TASK = Task("shades", CLASSIFICATION, "top-1", lambda records: hits(records), closed=True)

    def queries(self, candidates=tuple(SHADES)):
        return [replace(one, candidates=candidates, details={"n": one.id}) for one in QUERY_SAMPLES]

    def run(self, path, queries=None, **options):
        queries = self.queries() if queries is None else queries
        return evaluate(
            Namer(), PROCESSOR, self.TASK, queries, SUPPORT, path, batch_size=2, **{"shots": 2, **options}
        )

    @pytest.mark.parametrize("select", ["random", "fixed", "rices"])
    @pytest.mark.parametrize("permutations", [1, 3])
    def test_the_likeliest_is_the_prediction(self, tmp_path, select, permutations):
        result = self.run(tmp_path / "out", select=select, permutations=permutations)
        assert result.value == 100
        header, *records = lines(tmp_path / "out")
        assert header["permutations"] == permutations
        for record in records:
            assert record["prediction"] == list(SHADES)[record["scores"].index(max(record["scores"]))]
            assert record["details"] == {"n": record["id"]}

    def test_no_shots_are_none_at_all(self, tmp_path):
        self.run(tmp_path / "out", shots=0)
        assert [record["shots"] for record in lines(tmp_path / "out")[1:]] == [[]] * 5

    def test_every_query_may_have_its_own(self, tmp_path):
        queries = [replace(query, candidates=(query.answer, f"not {query.id}")) for query in self.queries()]
        self.run(tmp_path / "out", queries)
        records = lines(tmp_path / "out")[1:]
        assert [record["prediction"] for record in records] == QUERIES

    @pytest.mark.parametrize("select", ["random", "fixed"])
    def test_an_ensemble_is_the_mean_over_orders(self, tmp_path, select):
        torch.manual_seed(0)
        model = randomise(Flamingo(FlamingoConfig.preset("tiny", tie_embeddings=False)), std=0.2).eval()
        processor, query = Processor(image_size=32), self.queries()[:1]
        how = {"shots": 3, "select": select, "permutations": 4}
        evaluate(model, processor, self.TASK, query, SUPPORT, tmp_path / "out", **how)
        _, record = lines(tmp_path / "out")
        shots = [next(one for one in SUPPORT if one.id == name) for name in record["shots"]]
        name = "shared" if select == "fixed" else "0"
        draw = random.Random(f"0/{name}/orders")
        orders = [draw.sample(shots, 3) for _ in range(4)]
        documents = [CLASSIFICATION.prompt(query[0], order) for order in orders]
        each = log_likelihoods(model, processor, documents, list(SHADES))
        assert record["scores"] == pytest.approx(each.mean(dim=0).tolist(), rel=1e-4)
        assert each.std(dim=0).min() > 1e-4

    def test_orders_are_counted_from_one(self, tmp_path):
        with pytest.raises(ValueError, match="expected 1 permutation or more, got 0"):
            self.run(tmp_path / "out", permutations=0)


def hits(records):
    return 100 * sum(record["prediction"] == record["references"][0] for record in records) / len(records)


class TestShared:
    """Fixed shots are read once, and answers are as if they were read for every query."""

    @pytest.mark.parametrize("shots", [0, 3])
    def test_as_one_document_each(self, tmp_path, shots):
        torch.manual_seed(0)
        model = randomise(Flamingo(FlamingoConfig.preset("tiny", tie_embeddings=False)), std=0.2).eval()
        processor, read = Processor(image_size=32), []
        model.language.layers[0].register_forward_pre_hook(
            lambda module, args: read.append(args[0].shape[0] * args[0].shape[1])
        )
        queries = [
            replace(one, fields={"question": "What?" * (1 + place % 2)})
            for place, one in enumerate(QUERY_SAMPLES)
        ]
        how = {"shots": shots, "select": "fixed", "num_beams": 1, "batch_size": 2}
        evaluate(model, processor, VQA, queries, SUPPORT, tmp_path / "out", **how)
        total, read[:] = sum(read), []
        _, *records = lines(tmp_path / "out")
        assert [record["id"] for record in records] == [0, 2, 4, 1, 3]  # those of one length together
        few = [next(one for one in SUPPORT if one.id == name) for name in records[0]["shots"]]
        for record in records:
            document = QUESTION.prompt(queries[record["id"]], few, text_only=shots == 0)
            (answer,) = complete(model, processor, [document], max_new_tokens=10)
            assert record["prediction"] == trim(answer)
        assert total < 0.6 * sum(read)


class TestBroken:
    """An image that cannot be read costs its own sample alone."""

    @pytest.fixture
    def broken(self, tmp_path):
        pytest.importorskip("PIL")
        (tmp_path / "broken.png").write_bytes(b"no image")
        return tmp_path / "broken.png"

    @pytest.mark.parametrize("select", ["random", "fixed", "rices"])
    def test_a_query_is_counted(self, tmp_path, capsys, broken, select):
        queries = [*QUERY_SAMPLES[:2], replace(QUERY_SAMPLES[2], image=broken), *QUERY_SAMPLES[3:]]
        output = tmp_path / "out"
        result = evaluate(Namer(), PROCESSOR, VQA, queries, SUPPORT, output, shots=1, select=select)
        assert (result.value, result.samples, result.broken) == (100, 5, 1)
        assert str(result) == "vqa: VQA accuracy 100.00 (5 samples, 1 shots, 1 broken)"
        found = {record["id"]: record for record in lines(output)[1:]}
        assert "broken.png" in found[2]["error"]
        assert "vqa: 2: " in capsys.readouterr().err
        again = evaluate(Namer(), PROCESSOR, VQA, queries, SUPPORT, output, shots=1, select=select)
        assert again == result

    def test_none_that_can_be_read_is_an_error(self, tmp_path, broken):
        queries = [replace(one, image=broken) for one in QUERY_SAMPLES]
        with pytest.raises(ValueError, match=r"image can be read, got 5 that cannot \(.*broken\.png"):
            evaluate(Namer(), PROCESSOR, VQA, queries, SUPPORT, tmp_path / "out", shots=1)


class TestResume:
    def run(self, path, model=None, **options):
        model = model or Namer()
        options = {"batch_size": 2} | options
        return evaluate(model, PROCESSOR, VQA, QUERY_SAMPLES, SUPPORT, path, shots=1, **options), model

    @pytest.fixture
    def finished(self, tmp_path):
        result, model = self.run(tmp_path / "whole.jsonl")
        assert (model.answered, model.encoded) == (5, 3)  # of three pictures
        return result, (tmp_path / "whole.jsonl").read_text()

    @pytest.mark.parametrize("kept", range(7))
    @pytest.mark.parametrize("torn", [0, 1, 17, -1])
    def test_computes_what_is_missing_and_no_more(self, finished, tmp_path, kept, torn):
        """Some lines, and of the next so many characters, or all but its end."""
        result, whole = finished
        path = tmp_path / "out.jsonl"
        lines = [*whole.splitlines(keepends=True), '{"id": 9, "predict\n']
        path.write_text("".join(lines[:kept]) + lines[kept][:torn])
        again, model = self.run(path)
        assert again == result
        assert path.read_text() == whole
        assert model.answered == 5 - max(kept - 1, 0)

    def test_another_run_is_not_gone_on_with(self, finished, tmp_path):
        path = tmp_path / "whole.jsonl"
        for options in ({"seed": 1}, {"select": "rices"}, {"num_beams": 1}, {"settings": {"model": "other"}}):
            with pytest.raises(
                ValueError, match=r"expected .*whole\.jsonl to be of a run with .*, got one with"
            ):
                self.run(path, **options)
        assert path.read_text() == finished[1]

    @pytest.mark.parametrize(
        "content",
        [
            b'{"questions": []}',
            b'{"questions": []}\n',
            b'{"task": "vqa", "notes": "my own"}',
            b"id,answer\n1,white\n",
            b"a word",
            b"\n",
            b"[1]\n",
            b"null\n",
            b"[" * 100_000,
            bytes(100),
            bytes(range(256)),
        ],
    )
    def test_a_file_of_something_else_stays_as_it_is(self, tmp_path, content):
        path, model = tmp_path / "mine", Namer()
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"expected .*mine to be new, empty or .* Name another output"):
            self.run(path, model)
        assert path.read_bytes() == content
        assert model.encoded == 0

    @pytest.mark.parametrize(
        "line",
        [
            b"[1]\n",
            b"\n",
            bytes(64) + b"\n",
            b'{"prediction": "white"}\n',
            b'{"id": 2, "prediction": null, "references": [], "shots": []}\n',
            b'{"id": [2], "prediction": "white", "references": [], "shots": []}\n',
        ],
    )
    def test_a_line_that_is_no_answer_is_named(self, finished, tmp_path, line):
        path = tmp_path / "whole.jsonl"
        content = b"".join([*finished[1].encode().splitlines(keepends=True)[:2], line])
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"expected line 3 of .*whole\.jsonl to be an answer, got b'"):
            self.run(path)
        assert path.read_bytes() == content

    def test_what_is_no_file_is_refused(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "folder").mkdir()
        for name in ("pipe", "folder"):
            with pytest.raises(ValueError, match=rf"expected .*{name} to be a file"):
                self.run(tmp_path / name)
        with pytest.raises(ValueError, match=r"expected the folder of .*gone/out, got none\. Make it first"):
            self.run(tmp_path / "gone" / "out")


class TestKilled:
    """`kill -9` in the middle of a batch, on a real model in a process of its own."""

    @pytest.fixture
    def arguments(self, tmp_path):
        pytest.importorskip("PIL")
        shades = [*SHADES] * 4
        query, support = (write_vqa(tmp_path / name, shades) for name in ("query", "support"))
        files = {**query, **{f"support-{name}": path for name, path in support.items()}}
        return [
            *("evaluate", "vqa", "--model", "tests.helpers.scripted:watched"),
            *(part for name, path in files.items() for part in (f"--{name}", str(path))),
            *("--shots", "1", "--batch-size", "2"),
        ]

    def start(self, arguments, output, log, stop_after=-1):
        environment = os.environ | {
            "FLAMINGO_TEST_LOG": str(log),
            "FLAMINGO_TEST_STOP_AFTER": str(stop_after),
        }
        command = [sys.executable, "-m", "flamingo", *arguments, "--output", str(output)]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def test_ends_as_if_it_had_not_been(self, arguments, tmp_path):
        whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
        undisturbed = self.start(arguments, whole, tmp_path / "whole.log")
        killed = self.start(arguments, output, tmp_path / "killed.log", stop_after=2)
        try:
            while (
                not output.exists() or output.read_text().count("\n") < 5
            ):  # its settings, two batches of two
                assert killed.poll() is None, killed.communicate()
                time.sleep(0.01)
        finally:
            killed.send_signal(signal.SIGKILL)
            killed.communicate()
        kept = output.read_text()
        resumed = self.start(arguments, output, tmp_path / "resumed.log")
        said, errors = resumed.communicate()
        expected, _ = undisturbed.communicate()
        assert resumed.returncode == undisturbed.returncode == 0, errors
        assert said == expected
        assert "(12 samples, 1 shots)" in said
        assert output.read_text() == whole.read_text()
        assert kept == "".join(whole.read_text().splitlines(keepends=True)[:5])
        answered = sum(map(int, (tmp_path / "resumed.log").read_text().split()))
        assert answered == 8
        assert len({record["prediction"] for record in lines(output)[1:]}) > 1


class TestCommand:
    def test_vqa(self, tmp_path, capsys):
        pytest.importorskip("PIL")
        answers = {0: ["white"] * 3 + ["black"] * 7}
        query = write_vqa(tmp_path / "query", QUERIES, answers)
        support = write_vqa(tmp_path / "support", ["white", "black", "grey"])
        status = main(
            [*self.arguments("vqa", query, support), "--output", str(tmp_path / "out"), "--shots", "2"]
        )
        value = 100 * (4 + vqa_accuracy("white", answers[0])) / 5
        assert (status, capsys.readouterr().out) == (
            0,
            f"vqa: VQA accuracy {value:.2f} (5 samples, 2 shots)\n",
        )
        assert [one["prediction"] for one in lines(tmp_path / "out")[1:]] == QUERIES

    def test_captions_of_some_samples_zero_shot_on_rices(self, tmp_path, capsys):
        pytest.importorskip("PIL")
        written = [(shade, [shade, f"a {shade} wall"]) for shade in [*SHADES] * 3]
        query, support = (write_captions(tmp_path / name, written) for name in ("query", "support"))
        options = ["--output", str(tmp_path / "out"), "--shots", "0", "--select", "rices"]
        some = [
            "--samples",
            "4",
            "--support-samples",
            "5",
            "--seed",
            "3",
            "--max-new-tokens",
            "5",
            "--beams",
            "2",
        ]
        assert main([*self.arguments("captions", query, support), *options, *some]) == 0
        header, *records = lines(tmp_path / "out")
        chosen = sorted(random.Random(3).sample(range(9), 4))
        assert [record["id"] for record in records] == chosen
        shades = [written[place][0] for place in chosen]
        assert (header["support_samples"], header["num_beams"]) == (5, 2)
        assert [record["prediction"] for record in records] == [shade[:4] for shade in shades]
        value = 100 * cider([shade[:4] for shade in shades], [written[place][1] for place in chosen])[0]
        assert value > 0  # only "grey" and its space are short enough
        assert capsys.readouterr().out == f"captions: CIDEr {value:.2f} (4 samples, 0 shots)\n"

    def arguments(self, task, query, support):
        files = {**query, **{f"support-{name}": path for name, path in support.items()}}
        paths = [part for name, path in files.items() for part in (f"--{name}", str(path))]
        return ["evaluate", task, "--model", "tests.helpers.scripted:namer", *paths]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (["--model", "tests.flamingo"], "got 'tests.flamingo', which is none of them"),
            (["--model", "no.such:thing"], "No module named 'no'"),
            (["--model", "gone.toml"], "gone.toml: No such file or directory"),
            (["--shots", "9"], "expected 9 samples or more in the support"),
            (["--questions", "gone.json"], "expected a JSON file, found none at gone.json"),
        ],
    )
    def test_mistakes_are_said_in_a_line(self, tmp_path, capsys, change, message):
        pytest.importorskip("PIL")
        paths = write_vqa(tmp_path / "data", QUERIES)
        arguments = [*self.arguments("vqa", paths, paths), "--output", str(tmp_path / "out"), *change]
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith("evaluate: ")
        assert message in said
        assert said.count("\n") == 1


@pytest.mark.parametrize("of", ["questions", "annotations", "images", "link"])
def test_an_input_is_no_output_and_this_is_said_before_the_model_is_loaded(tmp_path, capsys, of):
    pytest.importorskip("PIL")
    paths = write_vqa(tmp_path / "data", QUERIES)
    (tmp_path / "link").symlink_to(paths["questions"])
    before = {name: path.read_bytes() for name, path in paths.items() if path.is_file()}
    output = paths.get(of, tmp_path / of)
    arguments = [*TestCommand().arguments("vqa", paths, paths), "--model", "no.such:model"]
    assert main([*arguments, "--output", str(output)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"evaluate: expected {output} to be ")
    assert said.endswith("Name another output.\n")
    assert said.count("\n") == 1
    assert {name: path.read_bytes() for name, path in paths.items() if path.is_file()} == before


def test_a_model_is_evaluated_in_eval_mode(tmp_path, monkeypatch):
    pytest.importorskip("PIL")
    model, paths = Namer().train(), write_vqa(tmp_path / "data", QUERIES)
    monkeypatch.setattr("tests.helpers.scripted.namer", lambda: (model, PROCESSOR))
    arguments = TestCommand().arguments("vqa", paths, paths)
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    assert not any(module.training for module in model.modules())


class TestKernels:
    """A small Flamingo whose answers differ from image to image."""

    @pytest.fixture
    def evaluated(self, monkeypatch):
        """Whether each model had the kernels when it was asked."""
        models, of_command = [], command.evaluate
        monkeypatch.setattr(
            command,
            "evaluate",
            lambda model, *rest, **how: models.append(has_kernels(model)) or of_command(model, *rest, **how),
        )
        return models

    @pytest.fixture
    def ask(self, tmp_path, monkeypatch):
        pytest.importorskip("PIL")
        monkeypatch.setenv("FLAMINGO_TEST_LOG", str(tmp_path / "log"))
        paths = write_vqa(tmp_path / "data", QUERIES)
        arguments = TestCommand().arguments("vqa", paths, paths)
        arguments += ["--model", "tests.helpers.scripted:watched", "--shots", "1"]
        return lambda name, *more: main([*arguments, "--output", str(tmp_path / name), *more])

    @pytest.mark.parametrize(
        ("more", "kernels", "line"),
        [
            ([], True, "with kernels: 7 modules and 46 linear layers are swapped"),
            (["--no-kernels"], False, "without kernels: they are switched off"),
        ],
    )
    def test_they_are_on_unless_switched_off(self, ask, evaluated, capsys, more, kernels, line):
        assert ask("out", *more) == 0
        assert evaluated == [kernels]
        assert capsys.readouterr().err.count(f"evaluate: {line}\n") == 1

    def test_without_the_package_it_says_so_and_goes_on(self, ask, evaluated, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "flamingo_kernels", None)
        assert ask("out") == 0
        assert evaluated == [False]
        assert "evaluate: without kernels: import of flamingo_kernels halted" in capsys.readouterr().err

    def test_answers_are_the_same_with_and_without(self, ask, tmp_path, capsys):
        assert ask("with") == ask("without", "--no-kernels") == 0
        found, expected = (lines(tmp_path / name) for name in ("with", "without"))
        assert found == expected
        assert len({record["prediction"] for record in found[1:]}) > 1
        first, second = capsys.readouterr().out.splitlines()
        assert first == second

    def test_a_run_goes_on_with_the_switch_turned(self, ask, evaluated, tmp_path):
        assert ask("out", "--batch-size", "2", "--no-kernels") == 0
        whole = (tmp_path / "out").read_text()
        (tmp_path / "out").write_text("".join(whole.splitlines(keepends=True)[:3]))
        assert ask("out", "--batch-size", "2") == 0
        assert (tmp_path / "out").read_text() == whole
        assert evaluated == [False, True]


def test_the_user_says_how_large_an_image_may_be(tmp_path, capsys):
    """Those of the data set have 8 x 8 pixels."""
    pytest.importorskip("PIL")
    paths = write_vqa(tmp_path / "data", QUERIES)
    arguments = [*TestCommand().arguments("vqa", paths, paths), "--model", f"{__name__}:namer"]
    for name, size, status in (("refused", "63", 2), ("taken", "64", 0)):
        assert main([*arguments, "--output", str(tmp_path / name), "--max-pixels", size]) == status
    assert "at most 63 pixels" in capsys.readouterr().err


def namer():
    """With a processor of its own, as its limit is changed."""
    return Namer(), Processor(image_size=8)


def test_batches():
    assert list(batches([1, 2, 3, 4, 5], 2)) == [[1, 2], [3, 4], [5]]
    assert list(batches([], 2)) == []
