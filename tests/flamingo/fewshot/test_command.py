"""`python -m flamingo evaluate` on published layouts: what it asks for, refuses and leaves on the disk.

A stand-in answers, so that no model is built; the runner has tests of its own.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flamingo import Flamingo, FlamingoConfig
from flamingo.__main__ import main
from flamingo.fewshot import command
from flamingo.fewshot.benchmarks import BENCHMARKS
from flamingo.generation import Latents
from flamingo.media import Segment
from flamingo.processor import Processor
from flamingo.training import processes
from tests.helpers import published
from tests.helpers.scripted import SHADES, Namer, write_images
from tests.helpers.wordnet import write_tagger, write_wordnet

ALONE = {"coco", "flickr30k", "youcook2"}  # whose files have a part for shots


@dataclass
class Found:
    """What a run finds."""

    task: str
    metric: str
    value: float | None
    samples: int
    shots: int
    broken: int = 0


class StandIn:
    """Answers every query by its first candidate or with "a dog", as a run would write it."""

    def __init__(self):
        self.prepared: list[dict[str, Any]] = []
        self.asked: dict[str, Any] = {}
        self.built = 0  # models

    def make(self):
        assert len(self.prepared) == self.built + 1  # all that can be refused was looked at
        self.built += 1
        return Namer(), Processor(image_size=8)

    def prepare(self, task, queries, support, output, **how):
        self.prepared.append(how)

    def evaluate(self, model, processor, task, queries, support, output, **how):
        self.asked = {"processor": processor, "task": task, "queries": queries, "support": support, **how}
        records = [
            {
                "id": query.id,
                "prediction": query.candidates[0] if query.candidates else "a dog",
                "references": list(query.references),
                **({"details": dict(query.details)} if query.details else {}),
                "shots": [],
                "scores": [-float(place) for place in range(len(query.candidates))],
            }
            for query in queries
        ]
        output.write_text("".join(json.dumps(line) + "\n" for line in [{"task": task.name}, *records]))
        return Found(task.name, task.metric, task.score(records), len(queries), how["shots"])


@pytest.fixture
def stand_in(monkeypatch):
    found = StandIn()
    monkeypatch.setattr(command, "prepare", found.prepare)
    monkeypatch.setattr(command, "evaluate", found.evaluate)
    monkeypatch.setattr("tests.helpers.scripted.namer", found.make)
    return found


@pytest.fixture
def ask(stand_in, tmp_path):
    """The status of a command about a published set, with its own files for the shots where it needs some."""

    def run(name: str, *more: str, without: tuple[str, ...] = (), support: bool = True) -> int:
        files = {key: path for key, path in published_files(name, tmp_path).items() if key not in without}
        prefixes = ("", "support-") if support and name not in ALONE else ("",)
        paths = [
            part
            for prefix in prefixes
            for key, path in files.items()
            for part in (f"--{prefix}{key.replace('_', '-')}", str(path))
        ]
        output = ("--output", str(tmp_path / "out.jsonl"))
        return main(["evaluate", name, "--model", "tests.helpers.scripted:namer", *output, *paths, *more])

    return run


def write_video(path, greys):
    """Ten frames a second, each of one grey, without losses."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "bgr0"
        for grey in greys:
            frame = np.full((16, 16, 3), grey, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def published_files(name, folder):
    return getattr(published, name)(folder / "data")


@pytest.fixture
def wordnet(tmp_path, monkeypatch):
    data = pytest.importorskip("nltk.data")
    monkeypatch.setattr(data, "path", [])
    return write_wordnet(tmp_path / "nltk")


def refused(capsys, message):
    said = capsys.readouterr().err
    assert said.startswith("evaluate: ")
    assert said.count("\n") == 1
    assert message in said
    return True


class TestList:
    def test_it_says_of_each_where_to_get_it_and_how_it_lies(self, capsys):
        with pytest.raises(SystemExit) as stop:
            main(["evaluate", "--list"])
        assert stop.value.code == 0
        said = capsys.readouterr().out
        for name, benchmark in BENCHMARKS.items():
            assert f"{name}: {benchmark.title}, {benchmark.task.metric}\n" in said
            assert benchmark.source in " ".join(said.split())
            assert all(line in said for line in benchmark.layout.splitlines())

    @pytest.mark.parametrize("name", BENCHMARKS)
    def test_the_help_of_a_task_says_it_too(self, capsys, name):
        with pytest.raises(SystemExit):
            main(["evaluate", name, "--help"])
        assert command.describe(name) in capsys.readouterr().out


class TestBenchmarks:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("coco", 0.0),
            ("flickr30k", 0.0),
            ("vqav2", 0.0),
            ("okvqa", 0.0),
            ("textvqa", 0.0),
            ("vizwiz", 0.0),
            ("visdial", 100 * 0.4 / (1 + 0.4 * 0.6309297535714575)),
            ("hatefulmemes", 50.0),
            ("msvdqa", 100.0),
            ("msrvttqa", 100.0),
            ("ivqa", 0.0),
            ("star", 0.0),
            ("vatex", 0.0),
            ("youcook2", 0.0),
            ("rareact", 100.0),
            ("imagenet", 50.0),
            ("kinetics", 50.0),
        ],
    )
    def test_each_is_asked_and_measured(self, ask, stand_in, tmp_path, name, value):
        if name == "okvqa":
            pytest.importorskip("nltk")
        if name in ("hatefulmemes", "rareact"):
            pytest.importorskip("sklearn")
        result = tmp_path / "result.json"
        assert ask(name, "--json", str(result)) == 0
        found = json.loads(result.read_text())
        assert (found["task"], found["metric"]) == (name, BENCHMARKS[name].task.metric)
        assert found["value"] == pytest.approx(value)
        assert len(stand_in.asked["support"]) > 0
        assert {*stand_in.prepared[0]} >= {"shots", "select", "seed", "num_beams", "settings"}

    def test_nextqa(self, ask, wordnet, tmp_path):
        result = tmp_path / "result.json"
        assert ask("nextqa", "--nltk-data", str(wordnet), "--json", str(result)) == 0
        assert json.loads(result.read_text())["value"] == 0

    def test_only_closed_ended_ones_have_permutations_and_only_others_beams(self, ask, stand_in):
        assert ask("imagenet", "--permutations", "6") == 0
        assert stand_in.asked["permutations"] == 6
        assert ask("coco", "--beams", "2", "--max-new-tokens", "7") == 0
        assert "permutations" not in stand_in.asked
        assert (stand_in.asked["num_beams"], stand_in.asked["task"].max_new_tokens) == (2, 7)
        for more in (["coco", "--permutations", "6"], ["imagenet", "--beams", "2"]):
            with pytest.raises(SystemExit):
                ask(*more)


class TestShots:
    def test_of_files_that_have_all_splits_they_need_no_other(self, ask, stand_in):
        assert ask("coco") == 0
        assert [sample.id for sample in stand_in.asked["queries"]] == [391895]
        assert [sample.id for sample in stand_in.asked["support"]] == [60623, 57870]

    def test_but_other_files_may_be_given(self, ask, stand_in, tmp_path):
        other = published.coco(tmp_path / "other")
        images = ["--support-images", str(other["images"])]
        assert ask("coco", "--support-annotations", str(other["annotations"]), *images) == 0
        assert all(tmp_path / "other" in sample.image.parents for sample in stand_in.asked["support"])

    def test_their_images_are_where_the_queries_are_unless_told(self, ask, stand_in, tmp_path):
        support = published.vqav2(tmp_path / "data")
        more = [f"--support-{name}" for name in ("questions", "annotations")]
        paths = [str(support["questions"]), str(support["annotations"])]
        assert ask("vqav2", more[0], paths[0], more[1], paths[1], support=False) == 0
        assert len(stand_in.asked["support"]) == 2

    def test_their_images_may_be_elsewhere(self, ask, capsys, tmp_path):
        other = published.okvqa(tmp_path / "other")
        more = [
            part for name in ("questions", "annotations") for part in (f"--support-{name}", str(other[name]))
        ]
        assert ask("vqav2", *more, support=False) == 2
        assert refused(capsys, "number 297147 in ")
        assert ask("vqav2", *more, support=False) == 2
        assert refused(capsys, "Name the folder of the shots' images: --support-images.")
        assert ask("vqav2", *more, "--support-images", str(other["images"]), support=False) == 0

    def test_zero_of_a_closed_ended_one_need_no_files(self, ask, stand_in):
        assert ask("imagenet", "--shots", "0", support=False) == 0
        assert stand_in.asked["support"] == []
        assert ask("rareact", support=False) == 0
        assert stand_in.asked["shots"] == 0  # the paper has none for it

    def test_classes_have_as_many_each(self, ask, stand_in, tmp_path):
        train = published.touch(tmp_path / "train", *(f"{name}/{n}.mp4" for name in "ab" for n in range(40)))
        assert ask("kinetics", "--support-videos", str(train), support=False) == 0
        answers = [sample.answer for sample in stand_in.asked["support"]]
        assert (answers.count("a"), answers.count("b")) == (32, 32)
        more = ["--support-videos", str(train), "--support-samples", "5"]
        assert ask("kinetics", *more, support=False) == 0
        assert len(stand_in.asked["support"]) == 5

    @pytest.mark.parametrize(
        ("name", "more", "message"),
        [
            ("vqav2", [], "expected --support-questions, where shots come from, got none"),
            ("imagenet", [], "expected --support-images, where shots come from"),
            ("rareact", ["--shots", "4"], "expected --support-annotations, where shots come from"),
        ],
    )
    def test_without_files_for_them(self, ask, stand_in, capsys, name, more, message):
        assert ask(name, *more, support=False) == 2
        assert refused(capsys, message)
        assert not stand_in.built

    def test_queries_are_not_their_own_shots(self, ask, stand_in, capsys, tmp_path):
        """COCO's own file has no splits."""
        files = published_files("coco", tmp_path)
        image = {"id": 1, "file_name": "val2014/COCO_val2014_000000391895.jpg"}
        content = {"images": [image], "annotations": [{"image_id": 1, "caption": "a man"}]}
        coco = str(published.write_json(tmp_path / "captions_val2014.json", content))
        arguments = ["evaluate", "coco", "--model", "tests.helpers.scripted:namer", "--annotations", coco]
        arguments += ["--images", str(files["images"]), "--output", str(tmp_path / "out.jsonl")]
        assert main(arguments) == 2
        assert refused(
            capsys, "expected --support-annotations or --support-images, where shots come from, as "
        )
        assert main([*arguments, "--support-annotations", coco]) == 0  # who says so gets it

    def test_they_have_answers(self, ask, capsys, tmp_path):
        questions = published_files("vqav2", tmp_path)["questions"]
        assert ask("vqav2", "--support-questions", str(questions), support=False) == 2
        assert refused(capsys, f"{questions}, found none to 262148000")


class TestVideos:
    def test_those_that_are_gone_are_counted(self, ask, stand_in, tmp_path, capsys):
        assert ask("vatex", "--json", str(tmp_path / "result.json")) == 0
        said = capsys.readouterr().err
        assert said.count("evaluate: 1 of 2 samples of ") == 2  # of the queries and of the shots
        assert "vatex_public_test_english_v1.1.json have no video in " in said
        assert [sample.id for sample in stand_in.asked["queries"]] == ["G9zN5TTuGO4_000179_000189"]
        assert json.loads((tmp_path / "result.json").read_text())["missing"] == 1

    def test_unless_all_are_wanted(self, ask, stand_in, capsys):
        assert ask("vatex", "--all-videos") == 2
        assert refused(capsys, "found 1: the first to lack one is '-8o6bzBhKfE_000010_000020'")
        assert not stand_in.built

    def test_none_at_all_is_an_error(self, ask, capsys, tmp_path):
        (tmp_path / "empty").mkdir()
        assert ask("vatex", "--videos", str(tmp_path / "empty")) == 2
        assert refused(capsys, "found none")

    def test_frames_are_taken_as_often_as_asked(self, ask, stand_in):
        assert ask("youcook2", "--fps", "3", "--max-frames", "30") == 0
        assert (stand_in.asked["processor"].fps, stand_in.asked["processor"].max_frames) == (3, 30)
        assert {"fps": 3, "max_frames": 30}.items() <= stand_in.asked["settings"].items()  # of the run
        assert all(isinstance(sample.image, Segment) for sample in stand_in.asked["queries"])


class TestOutputs:
    @pytest.mark.parametrize("option", ["--json", "--predictions"])
    def test_each_has_a_file_of_its_own(self, ask, stand_in, capsys, tmp_path, option):
        output = tmp_path / "one"
        assert ask("coco", "--output", str(output), option, str(tmp_path / "." / "one")) == 2
        assert refused(capsys, "expected a file for each of what is written")
        assert not stand_in.built
        assert not output.exists()

    @pytest.mark.parametrize(
        ("output", "expected"), [("vqa.4", "vqa.4.predictions.json"), ("a.jsonl", "a.predictions.json")]
    )
    def test_predictions_are_named_after_it(self, output, expected):
        assert command._beside(Path(output)) == Path(expected)


class TestScoring:
    def test_another_script_measures_the_same_answers(self, ask, stand_in, tmp_path):
        result = tmp_path / "result.json"
        question = {"image": "VizWiz_val_00000000.jpg", "question": "What?"}
        said = [{"answer": "a dog", "answer_confidence": "yes"}] * 10
        published_files("vizwiz", tmp_path)
        changed = published.write_json(tmp_path / "val.json", [{**question, "answers": said}])
        values = {}
        for scoring in (None, "open_flamingo", "official"):
            more = [] if scoring is None else ["--scoring", scoring]
            assert ask("vizwiz", "--questions", str(changed), "--json", str(result), *more) == 0
            values[scoring] = json.loads(result.read_text())["value"]
        assert values == {None: 100, "open_flamingo": 0, "official": 100}
        assert stand_in.prepared[0] == stand_in.prepared[1]  # so no answer is computed again

    def test_words_of_the_official_script_are_tagged(self, ask, wordnet, capsys, stand_in):
        more = ["--nltk-data", str(wordnet), "--scoring", "official"]
        assert ask("nextqa", *more) == 2
        assert refused(capsys, "averaged_perceptron_tagger_eng among nltk's data, found none")
        assert not stand_in.built
        write_tagger(wordnet, {"dog": "NN", "spoon": "NN", "no": "DT"})
        assert ask("nextqa", *more) == 0

    def test_memes_of_one_label(self, ask, capsys, stand_in):
        pytest.importorskip("sklearn")
        assert ask("hatefulmemes", "--limit", "1") == 2
        assert refused(capsys, "expected labels of both kinds, got only [")
        assert not stand_in.built

    def test_without_wordnet(self, ask, capsys, monkeypatch, stand_in):
        monkeypatch.setattr(pytest.importorskip("nltk.data"), "path", [])
        assert ask("nextqa") == 2
        assert refused(capsys, "Get it by python -m nltk.downloader wordnet")
        assert ask("nextqa", "--nltk-data", "gone") == 2
        assert refused(capsys, "expected --nltk-data that is a folder, got gone")
        assert not stand_in.built


class TestWritten:
    def test_answers_for_a_server_where_none_are_known(self, ask, tmp_path, capsys):
        support = published.vqav2(tmp_path / "support")
        more = [part for name, path in support.items() for part in (f"--support-{name}", str(path))]
        assert ask("vqav2", *more, without=("annotations",), support=False) == 0
        path = tmp_path / "out.predictions.json"
        assert json.loads(path.read_text()) == [
            {"question_id": 262148000, "answer": "a dog"},
            {"question_id": 393225001, "answer": "a dog"},
        ]
        assert f"answers for a server that measures: {path}\n" in capsys.readouterr().out

    def test_a_question_that_was_not_answered_has_an_empty_answer(self, ask, stand_in, tmp_path, monkeypatch):
        answer = stand_in.evaluate

        def broken(*given, **how):
            result = answer(*given, **how)
            lines = (tmp_path / "out.jsonl").read_text().splitlines(keepends=True)
            (tmp_path / "out.jsonl").write_text("".join([*lines[:-1], '{"id": 393225001, "error": "?"}\n']))
            return result

        monkeypatch.setattr(command, "evaluate", broken)
        assert ask("vqav2", "--predictions", str(tmp_path / "mine.json")) == 0
        said = json.loads((tmp_path / "mine.json").read_text())
        assert [one["answer"] for one in said] == ["a dog", ""]

    def test_and_where_they_are_asked_for(self, ask, tmp_path):
        path = tmp_path / "mine.json"
        assert ask("vatex") == 0
        assert not (tmp_path / "out.predictions.json").exists()
        assert ask("vatex", "--predictions", str(path)) == 0
        assert json.loads(path.read_text()) == {"G9zN5TTuGO4_000179_000189": "a dog"}

    def test_a_result_has_all_its_settings(self, ask, tmp_path):
        path = tmp_path / "result.json"
        more = ["--shots", "8", "--select", "rices", "--seed", "3", "--limit", "1", "--no-kernels"]
        assert ask("vqav2", "--json", str(path), *more) == 0
        found = json.loads(path.read_text())
        assert (found["samples"], found["shots"], found["broken"], found["missing"]) == (1, 8, 0, 0)
        settings = found["settings"]
        expected = {"task": "vqav2", "shots": 8, "select": "rices", "seed": 3, "limit": 1, "beams": 3}
        expected |= {"batch_size": 8, "max_new_tokens": 10, "device": "cpu", "no_kernels": True}
        assert settings | expected == settings
        assert settings["images"] == str(tmp_path / "data" / "val2014")
        assert settings["model"] == "tests.helpers.scripted:namer"

    @pytest.mark.parametrize("option", ["--json", "--predictions"])
    @pytest.mark.parametrize(
        "content", [b"my notes", b"3", b"\xff\xfe", b'"a text"', b'[{"id": 3}]', b'{"a": 1}']
    )
    def test_another_file_stays_as_it_is(self, ask, stand_in, capsys, tmp_path, option, content):
        path = tmp_path / "mine"
        path.write_bytes(content)
        assert ask("coco", option, str(path)) == 2
        assert refused(capsys, f"expected {path} to be new or of a run like this")
        assert path.read_bytes() == content
        assert not stand_in.built

    def test_a_result_is_not_written_over_other_json(self, ask, capsys, tmp_path):
        path = published.write_json(tmp_path / "package.json", {"name": "mine", "task": 1})
        assert ask("coco", "--json", str(path)) == 2
        assert refused(capsys, "package.json to be new or of a run like this")
        assert ask("coco", "--json", str(tmp_path / "gone" / "result.json")) == 2
        assert refused(capsys, "expected the folder of")

    @pytest.mark.parametrize("name", ["coco", "vizwiz", "msrvttqa"])
    def test_what_is_read_is_not_written_over(self, ask, capsys, tmp_path, name):
        path = next(iter(published_files(name, tmp_path).values()))
        before = path.read_bytes()
        assert ask(name, "--predictions", str(path)) == 2
        assert refused(capsys, f"expected {path} to be new or of a run like this")
        assert path.read_bytes() == before

    @pytest.mark.parametrize("name", ["coco", "vizwiz", "vatex", "visdial", "vqav2", "star"])
    def test_predictions_are_written_over_others(self, ask, tmp_path, name):
        for _ in range(2):
            assert ask(name, "--predictions", str(tmp_path / "mine.json")) == 0
        assert json.loads((tmp_path / "mine.json").read_text())

    def test_a_result_is_written_over_one(self, ask, stand_in, tmp_path):
        path = tmp_path / "result.json"
        assert ask("coco", "--json", str(path)) == 0
        assert ask("coco", "--json", str(path), "--seed", "5") == 0
        assert json.loads(path.read_text())["settings"]["seed"] == 5

    def test_one_process_of_several_speaks(self, ask, monkeypatch, capsys, tmp_path):
        for each in (command, processes):
            monkeypatch.setattr(each, "rank", lambda: 1)
        assert ask("vatex", "--json", str(tmp_path / "result.json")) == 0
        assert capsys.readouterr() == ("", "")
        assert not (tmp_path / "result.json").exists()


class TestWhole:
    """Nothing stands in for the run: the model names the shade of an image."""

    @pytest.fixture
    def arguments(self, tmp_path):
        pytest.importorskip("PIL")
        for split in ("val", "train"):
            (tmp_path / split).mkdir()
            for shade in SHADES:
                write_images(tmp_path / split / shade, [shade] * 3, "{}.png")
        (tmp_path / "val" / "white" / "2.png").write_bytes(b"<html>gone</html>")
        files = ["--images", str(tmp_path / "val"), "--support-images", str(tmp_path / "train")]
        files += ["--output", str(tmp_path / "out.jsonl"), "--json", str(tmp_path / "result.json")]
        return ["evaluate", "imagenet", "--model", "tests.helpers.scripted:namer", *files]

    @pytest.mark.parametrize(
        "more",
        [["--shots", "0"], ["--shots", "2", "--permutations", "2"], ["--shots", "3", "--select", "rices"]],
    )
    def test_candidates_are_ranked(self, arguments, tmp_path, capsys, more):
        assert main([*arguments, *more]) == 0
        shots = more[1]
        assert (
            capsys.readouterr().out
            == f"imagenet: top-1 accuracy 100.00 (9 samples, {shots} shots, 1 broken)\n"
        )
        found = json.loads((tmp_path / "result.json").read_text())
        assert (found["value"], found["samples"], found["broken"]) == (100, 9, 1)
        _, *records = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
        named = {record["id"]: record["prediction"] for record in records if "prediction" in record}
        assert named == {
            f"{shade}/{n}.png": shade for shade in SHADES for n in range(3) if (shade, n) != ("white", 2)
        }

    def test_a_run_goes_on_and_may_be_measured_anew(self, arguments, tmp_path, capsys):
        assert main([*arguments, "--shots", "1"]) == 0
        whole = (tmp_path / "out.jsonl").read_text()
        (tmp_path / "out.jsonl").write_text("".join(whole.splitlines(keepends=True)[:4]))
        assert main([*arguments, "--shots", "1"]) == 0
        assert (tmp_path / "out.jsonl").read_text() == whole
        first, second = capsys.readouterr().out.splitlines()
        assert first == second

    def test_segments_of_one_video(self, tmp_path, capsys):
        """White for a second and black for another. A video that cannot be read is counted."""
        data = tmp_path / "data"
        film = [SHADES["white"]] * 10 + [SHADES["black"]] * 10
        files = published.youcook2(data)
        content = json.loads(files["annotations"].read_text())
        for video in content["database"].values():
            for part, span, said in zip(
                video["annotations"], [[0, 1], [1, 2]], ["white", "black"], strict=True
            ):
                part.update(segment=span, sentence=f"{said} all over")
        content["database"]["broken"] = content["database"]["GLd3aX16zBg"]
        published.write_json(files["annotations"], content)
        for path in (data / "raw_videos").rglob("*.m*"):
            write_video(path, film)
        (data / "raw_videos" / "broken.mp4").write_bytes(b"<html>gone</html>")
        paths = [part for name, path in files.items() for part in (f"--{name}", str(path))]
        arguments = ["evaluate", "youcook2", "--model", "tests.helpers.scripted:namer", *paths]
        assert main([*arguments, "--output", str(tmp_path / "out.jsonl"), "--shots", "1"]) == 0
        _, *records = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
        named = {record["id"]: record["prediction"] for record in records if "prediction" in record}
        assert named == {"GLd3aX16zBg_0": "white", "GLd3aX16zBg_1": "black"}
        assert "(4 samples, 1 shots, 2 broken)" in capsys.readouterr().out

    def test_what_images_are_to_the_model_is_kept(self, arguments, tmp_path, monkeypatch):
        pytest.importorskip("safetensors")
        model = Flamingo(FlamingoConfig.preset("tiny")).eval()
        monkeypatch.setattr("tests.helpers.scripted.namer", lambda: (model, Processor(image_size=32)))
        kept = []
        monkeypatch.setattr(
            command, "Latents", lambda *given, **how: kept.append(Latents(*given, **how)) or kept[-1]
        )
        for shots in ("0", "1"):
            more = ["--shots", shots, "--latents", str(tmp_path / "latents"), "--no-kernels"]
            assert main([*arguments, *more, "--output", str(tmp_path / f"{shots}.jsonl")]) == 0
        assert [latents.encoded for latents in kept] == [3, 0]  # images that are alike are one


class TestMistakes:
    """Each is one line, said before a model is built."""

    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("--shots", "-1", "expected shots of 0 or more, got --shots -1"),
            ("--limit", "0", "expected limit of 1 or more, got --limit 0"),
            ("--samples", "-1", "expected limit of 1 or more, got --limit -1"),
            ("--support-samples", "-1", "expected support_samples of 0 or more"),
            ("--batch-size", "0", "expected batch_size of 1 or more, got --batch-size 0"),
            ("--beams", "0", "expected beams of 1 or more, got --beams 0"),
            ("--max-new-tokens", "0", "expected max_new_tokens of 1 or more, got --max-new-tokens 0"),
            ("--max-pixels", "0", "expected max_pixels of 1 or more"),
            ("--max-frames", "0", "expected max_frames of 1 or more"),
            ("--fps", "0", "expected --fps above 0, got 0.0"),
            ("--fps", "nan", "expected --fps above 0, got nan"),
            ("--device", "gpu", 'expected device to be "auto", "cpu" or a GPU of this machine'),
            ("--device", "cpu:x", 'as "cuda:0", got "cpu:x"'),
            ("--device", "meta", 'got "meta"'),
            ("--model", "json", "got 'json', which is none of them"),
            ("--model", "json:gone", "expected a function gone in json"),
            ("--model", "json:dumps", "expected json:dumps to be a function without arguments"),
            ("--model", "no_module:make", "No module named 'no_module'"),
            ("--model", "gone.toml", "gone.toml"),
            ("--model", "gone.pt", "expected --preset, --vision, --language beside gone.pt"),
            ("--videos", "gone", "expected a folder of videos, found none at gone"),
            ("--annotations", "gone.json", "expected a JSON file, found none at gone.json"),
        ],
    )
    def test_options(self, ask, stand_in, capsys, option, value, message):
        assert ask("youcook2", option, value) == 2
        assert refused(capsys, message)
        assert not stand_in.built

    def test_permutations(self, ask, capsys):
        assert ask("imagenet", "--permutations", "0") == 2
        assert refused(capsys, "expected permutations of 1 or more, got --permutations 0")

    def test_a_function_that_makes_something_else(self, ask, capsys, monkeypatch):
        monkeypatch.setattr("tests.helpers.scripted.namer", lambda: None)
        assert ask("coco") == 2
        assert refused(capsys, "scripted:namer to return (model, Processor), got NoneType")
