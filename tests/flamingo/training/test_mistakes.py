"""Fifty mistakes in a run's file and in what it names: each is its one line, before there is a model."""

import re
import sys

import pytest
from safetensors.torch import save_file
from torch import zeros

from flamingo.__main__ import main
from flamingo.training import TrainingConfig, command, pair_sample, write_shards
from tests.helpers.tiny_run import images

RUN = """folder = "DIR/run"
steps = 2
warmup_steps = 2
workers = 0
bfloat16 = false
device = "cpu"
learning_rate = 1e-4

[model]
preset = "tiny"

[[datasets]]
kind = "pairs"
name = "d"
shards = ["DIR/data/*.tar"]
batch_size = 2
"""


@pytest.fixture
def folder(tmp_path):
    """Shards that are right, and files that are not."""
    write_shards(tmp_path / "data", [pair_sample(each, f"number {i}") for i, each in enumerate(images(4, 0))])
    write_shards(tmp_path / "other" / "data", [{"txt": b"a"}])
    write_shards(tmp_path / "html", [{"png": b"<html>", "txt": b"a"}] * 4)
    write_shards(tmp_path / "cut", [{"png": b"", "txt": b"a"}] * 4)[0].write_bytes(b"x" * 700)
    write_shards(tmp_path / "pages", [{"json": b'{"a page": "its text"}'}])
    (tmp_path / "none").mkdir()
    (tmp_path / "a_file").write_text("a")
    (tmp_path / "loop").symlink_to("loop")
    save_file({"weight": zeros(1)}, tmp_path / "other.safetensors")
    return tmp_path


@pytest.fixture
def refused(folder, capsys, monkeypatch):
    """The line of a run that does not begin and writes nothing."""
    monkeypatch.setattr(command, "build", lambda *_: pytest.fail("a model was built"))

    def refused(text):
        (folder / "run.toml").write_bytes(text.replace("DIR", str(folder)).encode("utf-8", "surrogateescape"))
        before = sorted(folder.rglob("*"))
        assert main(["train", str(folder / "run.toml")]) == 2
        assert sorted(folder.rglob("*")) == before
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.count("\n") == 1
        return shown.err.strip().replace(str(folder), "DIR")

    return refused


def put(line, where="^"):
    """The run's text with a line in the place of that of the same key, or at the beginning of a table."""
    key = line.partition(" ")[0]
    if re.search(rf"^{key} =", RUN, flags=re.MULTILINE):
        return re.sub(rf"^{key} = .*$", lambda _: line, RUN, count=1, flags=re.MULTILINE)
    return re.sub(where, lambda found: f"{found[0]}{line}\n", RUN, count=1)


def of_run(line):
    return put(line)


def of_model(line):
    return put(line, r"\[model\]\n")


def of_data(line):
    return put(line, r"\[\[datasets\]\]\n")


MISTAKES = [
    (of_run("steps = -1"), "DIR/run.toml: expected steps of the run to be 0 or more, got -1."),
    (of_run("steps = 1.5"), "DIR/run.toml: steps: expected int, got 1.5."),
    (of_run("steps = nan"), "DIR/run.toml: steps: expected int, got nan."),
    (of_run("steps = true"), "DIR/run.toml: steps: expected int, got True."),
    (of_run('learning_rate = "fast"'), "DIR/run.toml: learning_rate: expected float, got 'fast'."),
    (
        of_run("learning_rate = inf"),
        "DIR/run.toml: expected learning_rate of the run to be positive, got inf.",
    ),
    (
        of_run("learning_rate = -1"),
        "DIR/run.toml: expected learning_rate of the run to be positive, got -1.0.",
    ),
    (
        of_run("lr = 1e-4"),
        "DIR/run.toml: there is no key 'lr'. Expected one of folder, datasets, steps, learning_rate,...",
    ),
    (of_run("warmup_steps = -5"), "DIR/run.toml: expected warmup_steps of the run to be 0 or more, got -5."),
    (
        of_run("weight_decay = -1"),
        "DIR/run.toml: expected weight_decay of the run to be 0 or more, got -1.0.",
    ),
    (of_run("betas = [2.0, 0.9]"), "DIR/run.toml: expected two betas from 0 to below 1, got (2.0, 0.9)."),
    (of_run("eps = nan"), "DIR/run.toml: expected eps of the run to be positive, got nan."),
    (of_run("seed = -1"), "DIR/run.toml: expected seed of the run to be in 0..2**63 - 1, got -1."),
    (of_run("workers = -1"), "DIR/run.toml: expected workers of the run to be 0 or more, got -1."),
    (of_run("keep = 0"), "DIR/run.toml: expected keep of the run to be positive, got 0."),
    (
        of_run("checkpoint_every = 0"),
        "DIR/run.toml: expected checkpoint_every of the run to be positive, got 0.",
    ),
    (of_run("max_bad = 10"), "DIR/run.toml: expected max_bad of the run to be a share in 0..1, got 10.0."),
    (
        of_run('device = "gpu"'),
        'expected device to be "auto", "cpu" or a GPU of this machine as "cuda:0", got "gpu".',
    ),
    (
        of_run('device = "meta"'),
        'expected device to be "auto", "cpu" or a GPU of this machine as "cuda:0", got "meta".',
    ),
    (
        of_run('device = "cuda:99"'),
        'expected device to be "auto", "cpu" or a GPU of this machine as "cuda:0", got "cuda:99".',
    ),
    (of_run('folder = ""'), "DIR/run.toml: expected folder to name a folder, got ''."),
    (
        of_run('folder = "~/run"'),
        "DIR/run.toml: expected folder without ~, which a shell alone knows, got '~/run'.",
    ),
    (of_run('folder = "DIR/loop"'), "expected DIR/loop to be a folder, got a link to nothing."),
    (of_run("steps = 3000000000"), "DIR/run.toml: expected steps of the run to be 2147483647 or less,..."),
    (of_run("workers = 5000"), "DIR/run.toml: expected workers of the run to be 1000 or less, got 5000."),
    (of_run(f"steps = '{'x' * 5000}'"), "DIR/run.toml: steps: expected int, got 'xxxxxx..."),
    (of_run('folder = "DIR/a_file"'), "expected DIR/a_file to be a folder, got a file."),
    (of_run('folder = "DIR/a_file/run"'), "DIR/a_file/run: Not a directory"),
    (of_run('folder = "/proc/run"'), "/proc/run: No such file or directory"),
    (of_run('folder = "a\\u0000b"'), "DIR/run.toml: expected folder to name a folder, got 'a\\x00b'."),
    (
        of_model('preset = "huge"'),
        "DIR/run.toml, [model]: expected one of flamingo-3b, flamingo-9b, flamingo-80b,...",
    ),
    (
        of_model("changes = { image_size = 33 }"),
        "DIR/run.toml, [model]: expected image_size to be a multiple of patch_size=8, got 33.",
    ),
    (
        of_model("changes = { dim = 3 }"),
        "DIR/run.toml, [model]: there is no field 'dim'. Expected one of vision, image_size,...",
    ),
    (
        of_model('changes = { language_layers = "4" }'),
        "DIR/run.toml, [model]: expected language_layers to be int, got '4'.",
    ),
    (
        of_model("changes = { language_layers = -1 }"),
        "DIR/run.toml, [model]: expected language_layers to be positive, got -1.",
    ),
    (
        of_model('changes = { activation = "tanhh" }'),
        "DIR/run.toml, [model]: expected activation to be one of gelu, squared_relu, relu, got 'tanhh'.",
    ),
    (
        of_model("changes = { vocab_size = 200 }"),
        "DIR/run.toml, [model]: expected vocab_size to be 261 or more, of bytes and special tokens, got 200.",
    ),
    (
        of_model("changes = { media_token_id = 3 }"),
        "DIR/run.toml, [model]: expected media_token_id to be 256, <image> of the byte tokenizer,...",
    ),
    (
        of_model("changes = { cross_attn_first = 4 }"),
        "DIR/run.toml, [model]: expected cross_attn_first to be below language_layers=4, got 4: there...",
    ),
    (
        of_model("changes = { new_tokens = [257, 261] }"),
        "DIR/run.toml, [model]: expected new_tokens below vocab_size=261, got [257, 261].",
    ),
    (of_model("changes = 3"), "DIR/run.toml, [model]: changes: expected a table, got 3."),
    (
        of_model("changes = { num_latents = 100000000000000000000 }"),
        "DIR/run.toml, [model]: expected num_latents to be 2147483647 or less, got 100000000000000000000.",
    ),
    (
        of_model("changes = { language_layers = 20000 }"),
        "DIR/run.toml, [model]: expected language_layers to be 10000 or less, got 20000.",
    ),
    (
        of_model("changes = { resampler_dim = 2147483647, resampler_dim_head = 2147483647 }"),
        "DIR/run.toml, [model]: expected sizes of a model that can be built, got: Storage size...",
    ),
    (
        of_model("changes = { vocab_size = 2147483647, language_dim = 4096 }"),
        "DIR/run.toml, [model]: expected a model that fits into the memory of this machine,...",
    ),
    (
        of_model('checkpoint = "DIR/a_file"'),
        'DIR/run.toml, [model]: expected vision and language beside checkpoint = "DIR/a_file", the...',
    ),
    (
        of_model('vision_weights = "DIR/missing"'),
        "DIR/run.toml, [model]: expected vision_weights to be a file, got DIR/missing, which is none.",
    ),
    (
        of_model('vision_weights = "DIR/a_file"'),
        "DIR/a_file: Error while deserializing header: header too small.",
    ),
    (
        of_model('language_weights = "DIR/other.safetensors"'),
        "DIR/other.safetensors: expected the parameters of this model, got 1 others (weight) and none for...",
    ),
    (
        of_model('vision = "DIR/none"'),
        "DIR/none: expected a model of transformers, got a folder without config.json.",
    ),
    (
        of_model('language = "DIR/missing"'),
        "DIR/run.toml, [model]: expected language to be a folder, got DIR/missing, which is none.",
    ),
    (of_data('batch_size = "x"'), "DIR/run.toml, [[datasets]] 'd': batch_size: expected int, got 'x'."),
    (
        of_data("batch_size = 0"),
        "DIR/run.toml, [[datasets]] 'd': expected batch_size of dataset 'd' to be positive, got 0.",
    ),
    (
        of_data("micro_batch_size = -1"),
        "DIR/run.toml, [[datasets]] 'd': expected micro_batch_size of dataset 'd' to be positive, got -1.",
    ),
    (
        of_data("length = 1"),
        "DIR/run.toml, [[datasets]] 'd': expected length of dataset 'd' to be 5 or more, got 1.",
    ),
    (
        of_data("length = 5"),
        "dataset 'd': expected pairs, got 100 bad samples in a row, as DIR/data/000000.tar, sample...",
    ),
    (
        of_data("flip = 7.0"),
        "DIR/run.toml, [[datasets]] 'd': expected flip of dataset 'd' to be a share in 0..1, got 7.0.",
    ),
    (
        of_data("weight = nan"),
        "DIR/run.toml, [[datasets]] 'd': expected weight of dataset 'd' to be positive, got nan.",
    ),
    (
        of_data('kind = "movies"'),
        "DIR/run.toml, [[datasets]] 'd': expected kind to be one of documents, pairs, clips, got 'movies'.",
    ),
    (
        of_data('kind = ["pairs"]'),
        "DIR/run.toml, [[datasets]] 'd': expected kind to be one of documents, pairs, clips, got ['pairs'].",
    ),
    (
        of_data("batch_size = 2000000000"),
        "DIR/run.toml, [[datasets]] 'd': expected batch_size of dataset 'd' to be 1000000 or less, got...",
    ),
    (
        of_data('flip = 0\ncolour = 0\nfeatures = ""'),
        "DIR/run.toml, [[datasets]] 'd': expected features to name a folder, got ''.",
    ),
    (
        of_data('kind = "documents"').replace("batch_size = 2", 'batch_size = 2\nimages = ""'),
        "dataset 'd': expected images to be a folder, got , which is none.",
    ),
    (
        of_data('kind = "documents"'),
        "dataset 'd': expected documents, got 100 bad samples in a row, as DIR/data/000000.tar,...",
    ),
    (
        of_data('kind = "clips"'),
        "dataset 'd': expected clips, got 100 bad samples in a row, as DIR/data/000000.tar, sample...",
    ),
    (
        of_data('name = ""'),
        "DIR/run.toml, [[datasets]] '': expected a dataset to have a name, got an empty one.",
    ),
    (
        of_data('shards = ["DIR/{0..999999999999}.tar"]'),
        "find_shards: expected braces that stand for at most 1000000 names, got 0..999999999999.",
    ),
    (
        of_model("changes = { max_num_media = 2 }").replace('"pairs"', '"documents"'),
        "dataset 'd': expected max_images to be at most max_num_media = 2 of the model, got 5.",
    ),
    (
        of_data('flip = 0\ncolour = 0\nfeatures = "DIR/f"').replace("DIR/data/*", "DIR/{data,other/data}/*"),
        "encode: expected shards whose names, or whose folders' names, differ, got DIR/data/000000.tar...",
    ),
    (
        of_data('shards = ["DIR/missing/*.tar"]'),
        "find_shards: expected shards at DIR/missing/*.tar, got none.",
    ),
    (of_data('shards = ["DIR/none"]'), "find_shards: expected shards at DIR/none, got none."),
    (
        of_data('shards = ["DIR/html"]'),
        "dataset 'd': expected pairs, got 100 bad samples in a row, as DIR/html/000000.tar, sample...",
    ),
    (
        of_data('shards = ["DIR/cut"]'),
        "entries: expected DIR/cut/000000.tar to be an uncompressed tar file, whole, got: at byte 0...",
    ),
    (
        of_data('shards = ["DIR/a_file"]'),
        "entries: expected DIR/a_file to be an uncompressed tar file, whole, got: at byte 0 there is...",
    ),
    (
        of_data("shards = []"),
        "DIR/run.toml, [[datasets]] 'd': expected dataset 'd' to have shards, got none.",
    ),
    (of_data("shards = 3"), "DIR/run.toml, [[datasets]] 'd': shards: expected a list, got 3."),
    (
        of_data('kind = "documents"').replace("DIR/data/*.tar", "DIR/pages"),
        "dataset 'd': expected documents, got 100 bad samples in a row, as DIR/pages/000000.tar,...",
    ),
    (
        of_data('features = "DIR/features"'),
        "DIR/run.toml, [[datasets]] 'd': expected flip = 0 and colour = 0 of dataset 'd', whose...",
    ),
    (
        of_data('flip = 0\ncolour = 0\nfeatures = "DIR/features"'),
        "DIR/features/data-000000.safetensors: expected the features of DIR/data/000000.tar, got...",
    ),
    (
        of_data('images = "DIR/missing"'),
        "DIR/run.toml, [[datasets]] 'd': there is no key 'images'. Expected one of name, shards,...",
    ),
    (
        RUN.replace("[[datasets]]", "[datasets]"),
        "DIR/run.toml: expected datasets as tables, each under [[datasets]...",
    ),
    (
        RUN.partition("[[datasets]]")[0],
        "DIR/run.toml: expected datasets, each a table [[datasets]], got none.",
    ),
    (
        RUN.replace("[model]", "[[model]]"),
        "DIR/run.toml: expected a table [model], got [{'preset': 'tiny'}].",
    ),
    (RUN.replace('[model]\npreset = "tiny"\n', ""), "DIR/run.toml: expected a table [model], got none."),
    (
        RUN + RUN.partition("[[datasets]]")[2].join(["[[datasets]]", ""]),
        "DIR/run.toml: expected datasets of different names, got ['d', 'd'].",
    ),
    (
        "steps: 3",
        "DIR/run.toml: expected TOML, got: Expected '=' after a key in a key/value pair (at line 1,...",
    ),
    ("# \udcff\n" + RUN, "DIR/run.toml: expected TOML, got: 'utf-8' codec can't decode byte..."),
    ("", "DIR/run.toml: expected a key 'folder', got none."),
    ("a = " + "[" * 50_000 + "]" * 50_000, "DIR/run.toml: expected TOML, got: ma..."),
]


@pytest.mark.parametrize("package", ["safetensors", "PIL", "tqdm", "tensorboard"])
def test_a_package_that_is_missing_is_said_before_there_is_a_model(refused, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    how = 'In a checkout of this library, run: pip install ".[training]".'
    assert refused(of_run("tensorboard = true")) == f"train: {package} is missing. {how}"


def test_an_editor_may_put_a_mark_of_bytes_order_in_front(folder):
    (folder / "run.toml").write_text(RUN, encoding="utf-8-sig")
    assert TrainingConfig.from_toml(folder / "run.toml").steps == 2


@pytest.mark.parametrize(("text", "line"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_its_one_line(refused, text, line):
    """Of a long one the table has the beginning."""
    said = refused(text).removeprefix("train: ")
    assert said.startswith(line.removesuffix("..."))
    assert line.endswith("...") or said == line
