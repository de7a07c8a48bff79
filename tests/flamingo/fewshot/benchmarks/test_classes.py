"""Folders of classes, and RareAct, as they are published."""

import pytest

from flamingo.fewshot.benchmarks import present, read_imagenet, read_kinetics, read_rareact
from flamingo.fewshot.benchmarks.classes import mwap_score
from flamingo.media import Segment
from tests.flamingo.fewshot.benchmarks.test_questions import records, score
from tests.helpers import published


class TestImageNet:
    def test_as_published(self, tmp_path):
        files = published.imagenet(tmp_path)
        fish, machine = read_imagenet(**files)
        assert fish.id == "n01440764/ILSVRC2012_val_00000293.JPEG"
        assert (fish.answer, fish.references) == ("tench", ("tench",))
        assert machine.image == files["images"] / "n03126707" / "ILSVRC2012_val_00000001.JPEG"
        assert fish.candidates == ("tench", "crane", "crane")  # of all classes, also those without an image
        assert fish.candidates is machine.candidates

    def test_two_classes_of_one_name_are_one(self, tmp_path):
        samples = read_imagenet(**published.imagenet(tmp_path))
        assert score("imagenet", samples, ["tench", "crane"]) == 100
        assert score("imagenet", samples, ["crane", "crane"]) == 50

    def test_the_other_file_of_classes(self, tmp_path):
        files = published.imagenet(tmp_path)
        index = {"0": ["n01440764", "tench"], "1": ["n03126707", "construction_crane"]}
        path = published.write_json(tmp_path / "imagenet_class_index.json", index)
        assert read_imagenet(files["images"], path)[1].answer == "construction crane"
        published.write_json(path, [["n01440764", "tench"]])
        with pytest.raises(ValueError, match=r'JSON like {"0": \["n01440764", "tench"\]} in .*index\.json'):
            read_imagenet(files["images"], path)

    def test_errors(self, tmp_path):
        files = published.imagenet(tmp_path)
        with pytest.raises(ValueError, match=r"names for folders like n01440764 in .*: give --classes"):
            read_imagenet(files["images"])
        files["classes"].write_text("n01440764 tench\n")
        with pytest.raises(ValueError, match=r"a name of the folder 'n03126707' of .* in .*mapping\.txt"):
            read_imagenet(**files)
        files["classes"].write_text("n01440764\n")
        with pytest.raises(ValueError, match=r"a folder and its name in line 1 of .*, got 'n01440764'"):
            read_imagenet(**files)
        files["classes"].write_text("n01440764 , tench\n")
        with pytest.raises(ValueError, match="a folder and its name in line 1"):
            read_imagenet(**files)
        files["classes"].write_text("n01440764 tench\nn01440764 crane\n")
        with pytest.raises(ValueError, match=r"ids that differ in .*mapping\.txt, got two of 'n01440764'"):
            read_imagenet(**files)
        files["classes"].write_bytes(b"\xff")
        with pytest.raises(ValueError, match=r"expected .*mapping\.txt to be UTF-8"):
            read_imagenet(**files)
        files["classes"].write_bytes(b"\xef\xbb\xbfn01440764 tench\r\nn03126707 crane\r\n")
        assert read_imagenet(**files)[0].answer == "tench"
        with pytest.raises(FileNotFoundError, match="a folder of images, found none at"):
            read_imagenet(tmp_path / "gone")
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match=r"something to ask in .*empty, found nothing"):
            read_imagenet(tmp_path / "empty")


class TestKinetics:
    def test_as_published(self, tmp_path):
        files = published.kinetics(tmp_path)
        first, second = read_kinetics(**files)
        assert (first.answer, second.answer) == ("abseiling", "riding a bike")
        assert second.image == files["videos"] / "riding a bike" / "0Yxc5wY8JqA_000005_000015.mp4"
        assert first.candidates is second.candidates
        assert first.candidates == ("abseiling", "riding a bike")

    def test_underscores_are_spaces(self, tmp_path):
        published.touch(tmp_path, "riding_a_bike/x.mp4", "riding_a_bike/x.txt")
        (sample,) = read_kinetics(tmp_path)
        assert sample.answer == "riding a bike"


class TestRareAct:
    def test_as_published(self, tmp_path):
        files = published.rareact(tmp_path)
        samples = read_rareact(**files)
        assert [sample.id for sample in samples] == [0, 1, 2]
        assert samples[1].image == Segment(files["videos"] / "7frRY7aGwMU.mp4", 20.0, 30.0)
        assert samples[1].candidates == ("a person shakes a table", "a person cuts a laptop")
        assert [sample.answer for sample in samples[:2]] == list(samples[1].candidates)
        assert samples[0].candidates is samples[2].candidates
        assert samples[2].details == {
            "video": "ppNqpTCZgf4",
            "label": 1,
            "verb": "cut",
            "noun": "laptop",
            "annotation": 3,
        }
        assert present(samples) == samples[:2]

    def test_score(self, tmp_path):
        pytest.importorskip("sklearn")
        samples = read_rareact(**published.rareact(tmp_path))
        found = [
            record | {"scores": each}
            for record, each in zip(
                records(samples, [""] * 3), [[-1.0, -9.0], [-2.0, -4.0], [-2.0, -3.0]], strict=True
            )
        ]
        assert mwap_score(found) == pytest.approx(50)  # after one that is hard to tell
        assert mwap_score(found[::2]) is None

    @pytest.mark.parametrize(
        ("place", "value", "message"),
        [
            (0, 1, "ids that differ in .*, got two of 1"),
            (0, "x", "id in .* to be a whole number, got 'x'"),
            (3, 50, "0 <= start < end of id 0 in"),
            (4, 89, "one verb and noun of class 89 in .*, got two"),
            (7, 5, r"'annotation' of id 0 in .* in 0\.\.4, got 5"),
            (7, "", "annotation in .* to be a whole number, got ''"),
        ],
    )
    def test_errors(self, tmp_path, place, value, message):
        files = published.rareact(tmp_path)
        row = [0, "7frRY7aGwMU", 50, 60, 0, "shake", "tomato", 0]
        row[place] = value
        header = "id,video_id,start,end,class_id,verb,noun,annotation"
        other = [1, "7frRY7aGwMU", 20, 30, 89, "cut", "laptop", 1]
        published.write_csv(files["annotations"], header, row, other)
        with pytest.raises(ValueError, match=message) as error:
            read_rareact(**files)
        assert "rareact.csv" in str(error.value)
