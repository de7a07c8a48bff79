"""Which shots a query is shown: none of its own image, none that is broken, the same however a run goes."""

from pathlib import Path

import numpy as np
import pytest

from flamingo import Latents
from flamingo.fewshot import Sample
from flamingo.fewshot.shots import Shots, others
from flamingo.media import Segment
from tests.helpers.scripted import PROCESSOR, Namer


def image(brightness):
    return np.full((8, 8, 3), brightness, dtype=np.uint8)


def samples(*values):
    return [Sample(id=value, image=image(value), answer=str(value)) for value in values]


SUPPORT = samples(0, 40, 80, 120, 160, 200, 240)
QUERIES = samples(50, 190)


def choose(select, support=SUPPORT, queries=QUERIES, number=3, seed=0, **options):
    latents = Latents(Namer(), PROCESSOR)
    shots = Shots(support, queries, number, select=select, seed=seed, latents=latents, **options)
    return [[shot.id for shot in few] for few in shots.of(queries)], latents


@pytest.fixture
def broken(tmp_path):
    pytest.importorskip("PIL")
    path = tmp_path / "broken.png"
    path.write_bytes(b"no image")
    return path


def test_random_ones_are_the_querys_own():
    first, second = choose("random")[0]
    assert first != second
    assert choose("random", queries=QUERIES[1:])[0] == [second]
    assert choose("random", seed=1)[0] != [first, second]


def test_fixed_ones_are_the_same_for_all():
    first, second = choose("fixed")[0]
    assert first == second
    assert choose("fixed", queries=samples(7))[0] == [first]
    assert choose("fixed", seed=1)[0] != [first, second]


def test_rices_puts_the_most_alike_last():
    assert choose("rices")[0] == [[0, 80, 40], [240, 160, 200]]


@pytest.mark.parametrize("select", ["random", "fixed", "rices"])
def test_none_is_of_a_querys_own_image(select):
    queries = [Sample(id="same", image=SUPPORT[2].image), QUERIES[0]]
    for few in choose(select, queries=queries, number=6)[0][: None if select == "fixed" else 1]:
        assert sorted(few) == [0, 40, 120, 160, 200, 240]


@pytest.mark.parametrize("select", ["random", "fixed", "rices"])
def test_a_broken_one_is_replaced(select, broken):
    support = [*SUPPORT[:3], Sample(id="broken", image=broken), *SUPPORT[3:]]
    for few in choose(select, support, number=7)[0]:
        assert sorted(few) == [0, 40, 80, 120, 160, 200, 240]
    with pytest.raises(ValueError, match=r"8 samples or more .* can be read, got 7 \(.*broken\.png"):
        choose(select, support, number=8)


def test_which_one_is_broken_changes_no_other(broken):
    """The next in the query's order takes its place."""
    order = choose("random", number=7)[0][0]
    support = [Sample(id=one.id, image=broken) if one.id == order[1] else one for one in SUPPORT]
    assert choose("random", support, number=3)[0][0] == [order[0], order[2], order[3]]


def test_files_and_parts_of_them_are_told_by_what_they_are():
    """Not as objects, and with their folders and seconds."""
    media = [Path("a/x.png"), Path("b/x.png"), Segment(Path("v.mp4"), 0, 1), Segment(Path("v.mp4"), 1, 2)]
    same = [Path("a/x.png"), Path("b/x.png"), Segment(Path("v.mp4"), 0, 1), Segment(Path("v.mp4"), 1, 2)]
    support = [Sample(image=medium) for medium in media]
    for place, medium in enumerate(same):
        left = others(support, [Sample(image=medium)])
        assert left == [each for each in range(4) if each != place]


def test_a_file_is_one_however_its_path_is_written(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.png").touch()
    (tmp_path / "link").symlink_to(tmp_path / "images")
    query = Sample(image=tmp_path / "images" / "x.png")
    for path in (tmp_path / "images" / ".." / "images" / "x.png", tmp_path / "link" / "x.png"):
        assert others([Sample(image=path)], [query]) == []
        parts = [Sample(image=Segment(each, 0, 1)) for each in (path, query.image)]
        assert others(parts[:1], parts[1:]) == []


def test_without_their_images_none_is_broken(broken):
    support = [Sample(id=number, image=broken) for number in range(3)]
    found, latents = choose("random", support, number=2, text_only=True)
    assert [len(few) for few in found] == [2, 2]
    assert latents.encoded == 0


@pytest.mark.parametrize(("select", "encoded"), [("fixed", 3), ("rices", 9)])
def test_media_are_encoded_once(select, encoded):
    _, latents = choose(select)
    assert latents.encoded == encoded
