"""`python -m flamingo complete`: what it prints is what the calls return; mistakes cost a line."""

import json

import pytest
import torch

from flamingo import (
    Flamingo,
    FlamingoConfig,
    Processor,
    complete,
    load_model,
    read_prompt,
    save_model,
)
from flamingo.__main__ import main
from flamingo.fewshot import log_likelihoods
from flamingo.training import towers
from tests.flamingo.training.test_resume import toml
from tests.helpers import tiny_run
from tests.helpers.weights import randomise

pytest.importorskip("PIL")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model and two pictures."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("complete")
    torch.manual_seed(6)
    config = FlamingoConfig.preset("tiny", tie_embeddings=False)
    save_model(randomise(Flamingo(config), std=0.2), Processor(image_size=32), folder / "model.safetensors")
    for name in ("red", "blue"):
        Image.new("RGB", (20, 30), name).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def ask(folder, capsys):
    """What the command prints."""

    def ask(*words, status=0):
        arguments = ["complete", str(folder / "model.safetensors"), "--no-kernels", *map(str, words)]
        assert main(arguments) == status
        return capsys.readouterr().out

    return ask


@pytest.fixture
def expected(folder):
    """What `complete` returns."""
    model, processor = load_model(folder / "model.safetensors")

    def expected(*documents, shots=(), **options):
        after = read_prompt(model, processor, list(shots)) if shots else None
        return complete(model, processor, list(documents), after=after, **options)

    return expected


def test_text_as_it_comes(ask, expected, folder):
    red = folder / "red.png"
    assert (
        ask(red, "Output:", "--max-new-tokens", 6) == expected([red, "Output:"], max_new_tokens=6)[0] + "\n"
    )
    assert ask("no image", "--max-new-tokens", 6) == expected(["no image"], max_new_tokens=6)[0] + "\n"


def test_drawn_by_a_seed(ask, folder):
    drawn = [
        ask(folder / "red.png", "Output:", "--temperature", 2, "--seed", seed, "--json") for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_after_shots(ask, expected, folder):
    """Options may stand between the model and the image."""
    red, blue = folder / "red.png", folder / "blue.png"
    shots = [red, "Output: red.<EOC>", blue, "Output: blue.<EOC>"]
    given = ["--shot", red, "Output: red.", "--shot", blue, "Output: blue.<EOC>"]
    (text,) = expected([blue, "Output:"], shots=shots, max_new_tokens=6)
    assert ask(*given, blue, "Output:", "--max-new-tokens", 6) == f"{text}\n"
    assert text != expected([blue, "Output:"], max_new_tokens=6)[0]


def test_beams(ask, expected, folder):
    red = folder / "red.png"
    found = json.loads(ask(red, "Output:", "--max-new-tokens", 6, "--beams", 3, "--json"))
    (text,) = expected([red, "Output:"], max_new_tokens=6, num_beams=3)
    assert found == {"images": [str(red)], "prompt": "Output:", "text": text}


def test_choices_the_likeliest_first(ask, folder):
    red = folder / "red.png"
    found = json.loads(ask(red, "Output:", "--json", "--choices", "red", "a long one", "blue"))
    model, processor = load_model(folder / "model.safetensors")
    names = ["red", "a long one", "blue"]
    scores = dict(
        zip(names, log_likelihoods(model, processor, [[red, "Output:"]], names)[0].tolist(), strict=True)
    )
    ranked = sorted(names, key=lambda name: -scores[name])
    assert [choice["text"] for choice in found["choices"]] == ranked
    for choice in found["choices"]:
        assert choice["log_likelihood"] == pytest.approx(scores[choice["text"]], rel=1e-4)
    plain = ask(red, "Output:", "--choices", "red", "a long one", "blue").splitlines()
    assert [line.split(maxsplit=1)[1] for line in plain] == ranked


def test_lines_of_a_file(ask, expected, folder, tmp_path):
    red, blue = folder / "red.png", folder / "blue.png"
    (tmp_path / "lines").write_text(f"{red}\tOutput:\nno image\n{red}\t{blue}\tBoth:\n" * 4)
    shots = [blue, "Output: blue.<EOC>"]
    documents = [[red, "Output:"], ["no image"], [red, blue, "Both:"]] * 4
    found = ask(
        *("--shot", blue, "Output: blue.", "--lines", tmp_path / "lines", "--json", "--max-new-tokens", 4)
    )
    texts = [json.loads(line)["text"] for line in found.splitlines()]
    assert texts == expected(*documents, shots=shots, max_new_tokens=4)
    with_image = ask(blue, "--lines", tmp_path / "lines", "--json", "--max-new-tokens", 4).splitlines()
    assert json.loads(with_image[0])["images"] == [str(blue), str(red)]


def test_a_line_ends_where_a_line_of_the_file_does(ask, tmp_path):
    """Behind a mark of its bytes' order, and with Windows' ends."""
    prompts = ["Output: a\u2028b\x0cc", "second", "", "last"]
    (tmp_path / "lines").write_bytes(("\ufeff" + "\r\n".join(prompts) + "\r\n").encode())
    found = ask("--lines", tmp_path / "lines", "--json", "--max-new-tokens", 2).splitlines()
    assert [json.loads(line)["prompt"] for line in found] == prompts


def test_kernels_are_on(folder, capsys):
    assert main(["complete", str(folder / "model.safetensors"), "a:", "--max-new-tokens", "2"]) == 0
    assert "complete: with kernels: 7 modules" in capsys.readouterr().err


def test_half_precision(ask, folder):
    assert ask(folder / "red.png", "Output:", "--dtype", "bfloat16", "--max-new-tokens", 3)


def test_the_folder_of_a_run(folder, tmp_path, capsys):
    """Trained a step, and moved."""
    data = tmp_path / "data"
    tiny_run.write(data)
    (tmp_path / "tiny.toml").write_text(toml(data, tmp_path / "run", steps=1))
    assert main(["train", str(tmp_path / "tiny.toml")]) == 0
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "tiny.toml").unlink()
    capsys.readouterr()
    asked = [str(folder / "red.png"), "Output:", "--max-new-tokens", "3"]
    assert main(["complete", str(tmp_path / "moved"), *asked]) == 0
    said = capsys.readouterr().out
    assert len(said) > 1
    assert main(["complete", str(tmp_path / "moved/run.toml"), *asked]) == 2
    assert f"expected a checkpoint in {tmp_path}/run/checkpoints" in capsys.readouterr().err


def test_weights_of_open_flamingo_with_their_towers(folder, tmp_path, monkeypatch, capsys):
    pair = load_model(folder / "model.safetensors")
    asked = []
    monkeypatch.setattr(towers, "check", asked.append)
    monkeypatch.setattr(towers, "build", lambda config, say: asked.append(config) or pair)
    given = ["--preset", "openflamingo-3b", "--vision", "clip", "--language", "mpt"]
    assert main(["complete", "checkpoint.pt", "a:", "--max-new-tokens", "2", *given]) == 0
    assert asked[0] == asked[1]
    assert (asked[0].preset, asked[0].vision, asked[0].language) == ("openflamingo-3b", "clip", "mpt")
    assert asked[0].checkpoint == "checkpoint.pt"


def needs(path):
    raise AssertionError("it is not called")


def wrong():
    return 1, 2


def fails():
    raise RuntimeError("it has\nno weights")


HERE = "tests.flamingo.generation.test_command"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["MODEL"], "expected a prompt after the model, or --lines FILE, got none"),
        (
            ["MODEL", "gone.png", "Output:"],
            "expected an image or a video before the prompt, found no file gone.png",
        ),
        (["MODEL", "--shot", "gone.png", "a", "Output:"], "found no file gone.png"),
        (["MODEL", "broken.png", "Output:"], "broken.png"),
        (["MODEL", "--lines", "gone.txt"], "expected a file of prompts, a line each, found none at gone.txt"),
        (["MODEL", "--lines", "empty.txt"], "empty.txt: expected a prompt a line, got an empty file"),
        (["MODEL", "--lines", "broken.png"], "expected broken.png to be UTF-8"),
        (["MODEL", "a", "--choices", "one"], "expected two --choices or more"),
        (["MODEL", "a", "--temperature", "nan"], "expected --temperature of 0 or more, got nan"),
        (["MODEL", "a", "--temperature", "1e308"], "expected --temperature of 0, or from 0.001 to 1000, got"),
        (["MODEL", "a", "--temperature", "1", "--beams", "2"], "expected --beams or --temperature, got both"),
        (["MODEL", "a", "--device", "gpu"], 'expected device to be "auto", "cpu" or a GPU'),
        (["MODEL", "a", "--beams", "2", "--choices", "b", "c"], "expected --choices, or --beams or"),
        (["MODEL", "a", "--seed", str(2**64)], "expected --seed of at most 64 bits"),
        (["MODEL", "a", "--device", "meta"], 'got "meta"'),
        (["MODEL", "a", "--preset", "tiny"], "expected --vision, --language beside MODEL"),
        (["gone.safetensors", "a"], "expected a saved model, found none at gone.safetensors"),
        (
            ["broken.safetensors", "a"],
            "broken.safetensors: expected a saved model, got a file that cannot be read",
        ),
        (["gone.toml", "a"], "gone.toml: No such file"),
        ([".", "a"], "expected the folder of a run, which has a run.toml"),
        (["checkpoint.pt", "a"], "expected --preset, --vision, --language beside checkpoint.pt"),
        (["other", "a"], "got 'other', which is none of them"),
        (["no_such_module:make", "a"], "No module named 'no_such_module'"),
        (["gone.py:make", "a"], "expected a file of Python, found none at gone.py"),
        (["json:nothing", "a"], "expected a function nothing in json, found none"),
        ([f"{HERE}:needs", "a"], "to be a function without arguments, got one that needs path"),
        ([f"{HERE}:fails", "a"], f"expected code that can be run in {HERE}:fails, got RuntimeError: it has"),
        (["MODEL", "\udcff"], "expected a text in UTF-8, got '\\udcff'"),
        (["MODEL", "a", "--shot", "IMAGE", "\udcff"], "expected a text in UTF-8, got '\\udcff'"),
        (["MODEL", "a", "--choices", "b", "\udcff"], "expected a text in UTF-8, got '\\udcff'"),
        ([f"{HERE}:needs", "broken.png", "a"], "expected an image that Pillow can read, got broken.png"),
        ([f"{HERE}:wrong", "a"], "to return (model, Processor), got ['int', 'int']"),
        (
            ["run:main", "a", "--vision", "clip"],
            "expected weights of OpenFlamingo with --vision, got run:main",
        ),
    ],
)
def test_a_mistake_costs_a_line(folder, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    for name in ("broken.png", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"\xff" * 20)
    (tmp_path / "empty.txt").touch()
    model = str(folder / "model.safetensors")
    given = [model if word == "MODEL" else word for word in words]
    assert main(["complete", "--no-kernels", *given]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "without kernels" not in line]
    assert len(said) == 1
    assert said[0].startswith("complete: ")
    assert message.replace("MODEL", model) in said[0]
