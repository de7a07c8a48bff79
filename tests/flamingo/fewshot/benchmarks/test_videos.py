"""Questions about videos as they are published."""

import json

import pytest

from flamingo.fewshot.benchmarks import (
    BENCHMARKS,
    present,
    read_ivqa,
    read_nextqa,
    read_star,
    read_video_qa,
)
from flamingo.fewshot.benchmarks.videos import wups_score
from flamingo.media import Segment
from tests.flamingo.fewshot.benchmarks.test_questions import records, score
from tests.helpers import published
from tests.helpers.wordnet import write_tagger, write_wordnet


class TestVideoQA:
    @pytest.mark.parametrize("name", ["msvdqa", "msrvttqa"])
    def test_as_published(self, tmp_path, name):
        files = getattr(published, name)(tmp_path)
        samples = BENCHMARKS[name].read(**files)
        assert [sample.id for sample in samples] == [158581, 158582]
        assert samples[0].fields == {"question": "what is running?"}
        assert (samples[0].answer, samples[0].references) == ("dog", ("dog",))
        assert present(samples) == samples
        assert score(name, samples, ["A dog.", "cat"]) == 50

    def test_the_names_of_youtube(self, tmp_path):
        files = published.msvdqa(tmp_path)
        named = published.touch(tmp_path / "named", "-4wsuPCjDBc_5_15.avi", "xxHx6s_DbUo_1301.avi")
        mapping = tmp_path / "youtube_mapping.txt"
        mapping.write_text("-4wsuPCjDBc_5_15 vid1301\nxxHx6s_DbUo_1301 vid1302\n")
        first, second = read_video_qa(files["annotations"], named, mapping)
        assert (first.image.name, second.image.name) == ("-4wsuPCjDBc_5_15.avi", "xxHx6s_DbUo_1301.avi")
        assert present(read_video_qa(files["annotations"], named)) == []  # 1301 at the end of another's name
        mapping.write_bytes(b"\xef\xbb\xbf-4wsuPCjDBc_5_15 vid1301\r\nxxHx6s_DbUo_1301 vid1302\r\n")
        assert read_video_qa(files["annotations"], named, mapping)[0].image == first.image
        mapping.write_text("vid1\n")
        with pytest.raises(ValueError, match=r"a name and a number in line 1 of .*mapping\.txt, got 'vid1'"):
            read_video_qa(files["annotations"], named, mapping)

    @pytest.mark.parametrize("value", [None, 3, ["dog"]])
    def test_other_kinds_are_never_texts(self, tmp_path, value):
        files = published.msvdqa(tmp_path)
        entries = json.loads(files["annotations"].read_text())
        entries[1]["answer"] = value
        published.write_json(files["annotations"], entries)
        with pytest.raises(ValueError, match=r"'answer' in .*test_qa\.json to be a text, got "):
            read_video_qa(**files)


class TestIVQA:
    def test_as_published(self, tmp_path):
        files = published.ivqa(tmp_path)
        first, gone = read_ivqa(**files)
        assert first.id == "Z5pmS7hbQSQ_124_134"
        assert first.image == Segment(files["videos"] / "Z5pmS7hbQSQ.webm", 124.0, 134.0)
        assert first.fields["question"] == "What is she using, exactly?"
        assert (first.answer, len(first.references)) == ("knife", 5)
        assert present([first, gone]) == [first]

    def test_two_annotators_are_enough(self, tmp_path):
        samples = read_ivqa(**published.ivqa(tmp_path))
        assert score("ivqa", samples, ["knife", "log"]) == 75

    def test_clips_that_were_cut_out(self, tmp_path):
        files = published.ivqa(tmp_path)
        published.touch(files["videos"], "Z5pmS7hbQSQ_124_134.mp4")
        assert read_ivqa(**files)[0].image == files["videos"] / "Z5pmS7hbQSQ_124_134.mp4"
        published.write_csv(
            files["annotations"],
            "video_id,question,answer1,answer2,answer3,answer4,answer5,confidence1",
            ["Z5pmS7hbQSQ", "What?", "knife", "", "", "", "", 3],
        )
        (sample,) = read_ivqa(**files)
        assert sample.image == files["videos"] / "Z5pmS7hbQSQ.webm"
        assert sample.references == ("knife",)

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            (["a", "x", 9, "?", *"12345"], r"start in .*test\.csv to be a number, got 'x'"),
            (["a", 9, 9, "?", *"12345"], r"0 <= start < end of a_9_9 in .*test\.csv, got 9\.0 and 9\.0"),
            (["a", 1, 9, "?", *"1234"], r"9 fields in row 2 of .*test\.csv, got 8"),
            (["a", 1, 9, "?", *[""] * 5], r"answers to the question about a_1_9 in .*test\.csv, found none"),
        ],
    )
    def test_errors(self, tmp_path, row, message):
        files = published.ivqa(tmp_path)
        header = "video_id,start,end,question,answer1,answer2,answer3,answer4,answer5"
        published.write_csv(files["annotations"], header, row)
        with pytest.raises(ValueError, match=message):
            read_ivqa(**files)
        published.write_csv(files["annotations"], "video_id,question", ["a", "?"])
        with pytest.raises(ValueError, match=r"a column 'answer1' in .*test\.csv, got video_id, question"):
            read_ivqa(**files)


class TestNExTQA:
    def test_as_published(self, tmp_path):
        files = published.nextqa(tmp_path)
        first, second = read_nextqa(**files)
        assert (first.id, second.id) == ("4924794333_4", "3747890905_8")
        assert second.references == ("uses the spoon", "spoon")
        assert second.image == files["videos"] / "0016/3747890905.mp4"
        assert (first.details, second.details) == ({"type": "DB"}, {"type": "CH"})

    def test_another_question_of_one_id_and_a_question_that_is_there_twice(self, tmp_path):
        """The published training split has three of the former."""
        files = published.nextqa(tmp_path)
        header = "video,frame_count,width,height,question,answer,qid,type"
        rows = [
            [3617262562, 99, 64, 36, "are the kids enjoying", "yes", 2, "DB"],
            [3617262562, 99, 64, 36, "How did the lady react", "pushes it back", 2, "TN"],
        ]
        published.write_csv(files["annotations"], header, *rows)
        samples = read_nextqa(files["annotations"], files["videos"])
        assert [sample.id for sample in samples] == ["3617262562_2", "3617262562_2_2"]
        published.write_csv(files["annotations"], header, *rows, rows[0])
        with pytest.raises(ValueError, match=r"ids that differ in .*test\.csv, got two of '3617262562_2'"):
            read_nextqa(files["annotations"], files["videos"])

    def test_choices(self, tmp_path):
        files = published.nextqa(tmp_path)
        header = "video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4"
        row = [
            4924794333,
            1058,
            640,
            360,
            "where is this",
            1,
            4,
            "DL",
            "mall",
            "river",
            "pool",
            "room",
            "hill",
        ]
        published.write_csv(files["annotations"], header, row)
        assert read_nextqa(files["annotations"], files["videos"])[0].references == ("river",)
        row[5] = "5"
        published.write_csv(files["annotations"], header, row)
        with pytest.raises(ValueError, match="to count to a choice, as 0 to a0, got '5'"):
            read_nextqa(files["annotations"], files["videos"])

    def test_score(self, tmp_path, monkeypatch):
        data = pytest.importorskip("nltk.data")
        monkeypatch.setattr(data, "path", [str(write_wordnet(tmp_path / "nltk"))])
        first, second = read_nextqa(**published.nextqa(tmp_path))
        assert score("nextqa", [first, second], ["no", "the spoon"]) == 100  # the second answer is as good
        animals = [
            record | {"references": ["dog", "thing"]} for record in records([first, second], ["cat"] * 2)
        ]
        # Yes or no is right or wrong. The other answer is 2/3 of a dog, and nearer to that than to a thing.
        assert wups_score(animals) == pytest.approx(100 * (0 + 2 / 3) / 2)

    def test_the_official_score_tags(self, tmp_path, monkeypatch):
        data = pytest.importorskip("nltk.data")
        folder = write_tagger(write_wordnet(tmp_path / "nltk"), {"saw": "VBD", "see": "VB"})
        monkeypatch.setattr(data, "path", [str(folder)])
        seen = [
            record | {"references": ["see"]}
            for record in records(read_nextqa(**published.nextqa(tmp_path)), ["saw", "saw"])
        ]
        assert BENCHMARKS["nextqa"].scorings["official"](seen) == 100
        assert wups_score(seen) < 50

    def test_errors(self, tmp_path):
        files = published.nextqa(tmp_path)
        for content in ([], {"3747890905": ["spoon"]}, {"3747890905": {"8": None}}):
            published.write_json(files["more_answers"], content)
            with pytest.raises(ValueError, match=r"in .*add_reference_answer_test\.json"):
                read_nextqa(**files)


class TestSTAR:
    def test_as_published(self, tmp_path):
        files = published.star(tmp_path)
        (sample,) = read_star(**files)
        assert sample.id == "Interaction_T1_13"
        assert sample.candidates == ("The closet/cabinet.", "The blanket.", "The clothes.", "The table.")
        assert (sample.answer, sample.references) == ("The clothes.", ("The clothes.",))
        assert sample.image == Segment(files["videos"] / "6H78U.mp4", 11.1, 19.6)

    def test_score(self, tmp_path):
        samples = read_star(**published.star(tmp_path)) * 2
        assert score("star", samples, ["The clothes.", "The table."]) == 50

    def test_a_test_split_has_no_answers(self, tmp_path):
        files = published.star(tmp_path)
        (entry,) = json.loads(files["annotations"].read_text())
        del entry["answer"]
        published.write_json(files["annotations"], [entry])
        samples = read_star(**files)
        assert score("star", samples, ["The table."]) is None
        assert BENCHMARKS["star"].upload(records(samples, ["The table."])) == [
            {"id": "Interaction_T1_13", "answer": "The table."}
        ]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"answer": "The book."}, "the answer of Interaction_T1_13 in .* to be a choice of it"),
            ({"answer": 2}, "'answer' in .* to be a text, got 2"),
            ({"choices": []}, "to be a choice of it, got"),
            ({"choices": ["The clothes."]}, "the choices in .* to be an object"),
            ({"end": 11.1}, "0 <= start < end of Interaction_T1_13 in"),
            ({"start": None}, "'start' in .* to be a number, got null"),
            ({"question_id": None}, "'question_id' in .* to be a number or a text, got null"),
        ],
    )
    def test_errors(self, tmp_path, change, message):
        files = published.star(tmp_path)
        (entry,) = json.loads(files["annotations"].read_text())
        published.write_json(files["annotations"], [entry | change])
        with pytest.raises(ValueError, match=message) as error:
            read_star(**files)
        assert "STAR_val.json" in str(error.value)
