"""A document's json in every layout, and each way in which it can be none."""

import json

import pytest

from flamingo.training.layouts import Picture, read_layout


def read(page, min_similarity=0.24):
    """A picture as its name, or what of it is told otherwise."""
    parts = read_layout(json.dumps(page).encode(), min_similarity=min_similarity)
    return [part if isinstance(part, str) else [part.name, part.number, part.total] for part in parts]


def mmc4(*infos, texts=("One.", "Two.", "Three."), **more):
    """A page with an image for each of `(name, matched_text_index, matched_sim)`."""
    keys = ("image_name", "matched_text_index", "matched_sim")
    return {"text_list": list(texts), "image_info": [dict(zip(keys, info)) for info in infos], **more}  # noqa: B905


class TestOurs:
    def test_texts_and_names(self):
        assert read(["a", {"image": "0.png"}, "b"]) == ["a", ["0.png", None, 0], "b"]

    @pytest.mark.parametrize("part", [3, None, [], {}, {"image": 3}, {"picture": "0.png"}])
    def test_other_parts(self, part):
        with pytest.raises(ValueError, match=r'expected a text or \{"image": name\} in a document, got'):
            read(["a", part])


class TestMMC4:
    def test_an_image_stands_before_the_sentence_it_was_matched_with(self):
        page = mmc4(("a", 1, 0.3), ("b", 2, 0.3), ("c", 1, 0.3))
        assert read(page) == ["One.", ["a", 0, 3], ["c", 2, 3], "Two.", ["b", 1, 3], "Three."]

    def test_sentences_without_an_image_between_them_are_one_text(self):
        assert read(mmc4(("a", 2, 0.3))) == ["One. Two.", ["a", 0, 1], "Three."]
        assert read(mmc4()) == ["One. Two. Three."]

    @pytest.mark.parametrize(
        ("least", "kept"), [(0.0, "abc"), (0.24, "abc"), (0.25, "ab"), (0.26, "b"), (0.5, "")]
    )
    def test_images_unlike_their_text_are_left_out(self, least, kept):
        page = mmc4(("a", 0, 0.25), ("b", 1, 0.4), ("c", 2, 0.24))
        assert "".join(part[0] for part in read(page, least) if isinstance(part, list)) == kept

    def test_the_matrix_says_what_the_images_do_not(self):
        matrix = [[0.1, 0.3, 0.2], [0.1, 0.2, 0.1]]
        page = mmc4(("a",), ("b",), similarity_matrix=matrix)
        assert read(page) == ["One.", ["a", 0, 2], "Two. Three."]
        assert read(page, 0.2) == ["One.", ["a", 0, 2], ["b", 1, 2], "Two. Three."]
        # The match is one to one, so not always with the most alike.
        matched = mmc4(("a", 0), ("b", 2), similarity_matrix=matrix)
        assert read(matched, 0.1) == [["a", 0, 2], "One. Two.", ["b", 1, 2], "Three."]
        assert read(matched, 0.11) == ["One. Two. Three."]

    def test_fields_of_the_core_set_and_of_fewer_faces(self):
        page = mmc4(("a", 0, 0.3), url="http://a.example", could_have_url_duplicate=0)
        page["image_info"][0] |= {
            "face_detections": [{"bbox": [1, 2, 3, 4]}],
            "raw_url": "http://a.example/1.jpg",
        }
        page["image_info"].append(None)
        assert read(page) == [["a", 0, 2], "One. Two. Three."]

    def test_its_content_in_base64(self):
        page = mmc4(("a", 0, 0.3))
        page["image_info"][0]["image_base64"] = "/9j/"
        (picture, _) = read_layout(json.dumps(page).encode(), min_similarity=0)
        assert picture == Picture("a", "/9j/", 0, 1)

    @pytest.mark.parametrize(
        ("page", "message"),
        [
            (mmc4(("a", 3, 0.3)), "matched_text_index below 3, got 3"),
            (mmc4(("a", -1, 0.3)), "matched_text_index below 3, got -1"),
            (mmc4(("a", "1", 0.3)), "matched_text_index below 3, got '1'"),
            (mmc4(("a", True, 0.3)), "matched_text_index below 3, got True"),
            (mmc4(("a",)), "matched_text_index below 3, got None"),
            (mmc4(("a", 0, "high")), "matched_sim that is a number, got 'high'"),
            (mmc4(("a", 0, float("nan"))), "matched_sim that is a number, got nan"),
            (mmc4(("a", 0), similarity_matrix=[[float("nan"), 0.1, 0.2]]), "similarity_matrix of numbers"),
            (mmc4(("a", 0), similarity_matrix=[[0.1]]), "one for each of 3 texts in a row"),
            (mmc4(("a", 0), similarity_matrix=[["x", "y", "z"]]), "similarity_matrix of numbers"),
            (mmc4(texts=["a", None]), "text_list to be a list of str, got 'None'"),
            (mmc4() | {"image_info": "none"}, "image_info to be a list of dict or null, got 'none'"),
            (mmc4(texts=[" ", ""]), "expected a document with texts or images, got none"),
        ],
    )
    def test_what_does_not_fit_together(self, page, message):
        with pytest.raises(ValueError, match=message):
            read(page)


class TestOBELICS:
    URL = "https://a.example/a.jpg"

    def test_texts_and_images_take_turns(self):
        page = {
            "texts": ["A.", None, "B.", "C.", None],
            "images": [None, self.URL, None, None, "b.png"],
            "metadata": json.dumps([None, {"src": self.URL}, None, None, {}]),
            "general_metadata": json.dumps({"url": "https://a.example"}),
        }
        assert read(page) == ["A.", [self.URL, 0, 2], "B.\n\nC.", ["b.png", 1, 2]]

    def test_both_at_one_place(self):
        assert read({"texts": ["A."], "images": ["a.png"]}) == [["a.png", 0, 1], "A."]

    @pytest.mark.parametrize(
        ("image", "content"),
        [
            ("data:image/png;base64,iVBORw0K", "data:image/png;base64,iVBORw0K"),
            ("iVBORw0K", "iVBORw0K"),
            ("/9j/4AAQ", "/9j/4AAQ"),
            ({"bytes": "iVBORw0K", "path": None}, "iVBORw0K"),
            ({"bytes": None, "path": "a.png"}, None),
        ],
    )
    def test_images_with_a_content(self, image, content):
        page = json.dumps({"texts": [None], "images": [image]}).encode()
        (picture,) = read_layout(page, min_similarity=0)
        assert (picture.base64, picture.number, picture.total) == (content, 0, 1)

    @pytest.mark.parametrize(
        ("page", "message"),
        [
            ({"texts": ["a"], "images": []}, "as many texts as images, got 1 and 0"),
            ({"texts": [3], "images": [None]}, "texts to be a list of str or null, got '3'"),
            ({"texts": [None], "images": [3]}, "images to be a list of str or dict or null, got '3'"),
            ({"texts": [None], "images": [None]}, "expected a document with texts or images, got none"),
        ],
    )
    def test_what_does_not_fit_together(self, page, message):
        with pytest.raises(ValueError, match=message):
            read(page)


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ({"url": "x", "text": "y"}, "got the keys url, text"),
        ({"text_list": ["a"]}, "got the keys text_list"),
        ({"texts": ["a"], "image": []}, "got the keys texts, image"),
        ({}, "got the keys of nothing"),
        ("a page", "got str"),
        (None, "got NoneType"),
        ([], "expected a document with texts or images, got none"),
    ],
)
def test_what_is_no_layout_is_refused_with_its_keys(page, message):
    with pytest.raises(ValueError, match=message):
        read(page)


def test_what_is_no_json():
    with pytest.raises(ValueError, match="Expecting value"):
        read_layout(b"<html>", min_similarity=0)
