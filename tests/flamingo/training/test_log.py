"""The log of a run: as it was written, as damage leaves it, and a file of something else in its place."""

import json

import pytest

from flamingo.training import read_log
from flamingo.training.log import RunLog

LINES = [json.dumps({"step": step, "loss": 1.0, "gradient norm": 2.0}).encode() for step in range(1, 7)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log.jsonl"


def steps(path):
    return [update["step"] for update in read_log(path.parent)]


def go_on(path, step=6):
    """What a run does that goes on after a step."""
    with RunLog(path.parent, step=step, steps=8, tensorboard=False) as log:
        log.write(step + 1, {"loss": 1.0, "gradient norm": 2.0})


@pytest.mark.parametrize(
    ("content", "kept", "damaged"),
    [
        ([*LINES, b""], [1, 2, 3, 4, 5, 6], 0),
        (LINES, [1, 2, 3, 4, 5, 6], 0),
        ([*LINES[:5], LINES[5][:20]], [1, 2, 3, 4, 5], 0),
        ([*LINES, bytes(50)], [1, 2, 3, 4, 5, 6], 0),
        ([*LINES, bytes(50), b""], [1, 2, 3, 4, 5, 6], 0),
        ([*LINES[:2], bytes(100), *LINES[4:], b""], [1, 2, 5, 6], 0),
        ([*LINES[:2], LINES[2][:30] + LINES[3], *LINES[4:], b""], [1, 2, 5, 6], 1),
        (
            [LINES[0], b"\xff\xfe", b"7", b"null", b"{}", b'{"step": "1"}', *LINES[1:], b""],
            [1, 2, 3, 4, 5, 6],
            5,
        ),
        ([b"[" * 100_000, *LINES, b""], [1, 2, 3, 4, 5, 6], 1),
        ([*LINES[:4], *LINES[2:], b""], [1, 2, 3, 4, 5, 6], 0),
        ([*LINES[3:], *LINES[:3], b""], [1, 2, 3, 4, 5, 6], 0),
        ([b""], [], 0),
        ([LINES[0][:1]], [], 0),
        ([LINES[0][:-1]], [], 0),
        ([bytes(1000)], [], 0),
    ],
)
def test_what_is_whole_is_kept_and_the_rest_is_counted(path, capsys, content, kept, damaged):
    path.write_bytes(b"\n".join(content))
    assert steps(path) == kept
    go_on(path)
    assert [json.loads(line)["step"] for line in path.read_bytes().splitlines()] == [*kept, 7]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train: ")]
    assert said == [f"train: left out {damaged} damaged lines of {path}"][: damaged > 0]


def test_an_update_is_in_the_file_as_soon_as_it_is_written(path):
    """A kill must not take it."""
    with RunLog(path.parent, step=0, steps=8, tensorboard=False) as log:
        for step in (1, 2):
            log.write(step, {"loss": 1.0, "gradient norm": 2.0})
            assert steps(path) == list(range(1, step + 1))


def test_of_a_step_that_is_there_twice_the_later_line_counts(path):
    again = json.dumps({"step": 2, "loss": 0.5, "gradient norm": 2.0}).encode()
    path.write_bytes(b"\n".join([*LINES[:3], again, b""]))
    assert [update["loss"] for update in read_log(path.parent)] == [1.0, 0.5, 1.0]


def test_updates_after_the_step_are_forgotten_and_that_is_said(path, capsys):
    path.write_bytes(b"\n".join([*LINES, b""]))
    go_on(path, step=3)
    assert steps(path) == [1, 2, 3, 4]
    assert "train: 3 updates after step 3 are done again\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        b"a word",
        b"\xff\xfe",
        b"12:00 started\n",
        b'{"accuracy": 0.5}',
        b'{"step": 1, "accuracy": 0.5}',
        b'{"step": 1, "accuracy": 0.5}\n{"step": 2',
    ],
)
def test_a_file_of_something_else_stays_as_it_is(path, content):
    path.write_bytes(content)
    for use in (lambda: go_on(path, step=0), lambda: read_log(path.parent)):
        with pytest.raises(
            ValueError, match=r"expected .*log\.jsonl to be the log of a run, .* another folder"
        ):
            use()
    assert path.read_bytes() == content


def test_no_log_is_no_update(path):
    assert steps(path) == []


def test_updates_that_are_done_again_are_there_once(path):
    path.write_bytes(b"\n".join([*LINES, b""]))
    go_on(path, step=4)
    assert [json.loads(line)["step"] for line in path.read_bytes().splitlines()] == [1, 2, 3, 4, 5]
