"""Tar shards: what is written is what is read, by us and by anyone who reads tar."""

import io
import json
import os
import tarfile

import pytest
from PIL import Image

from flamingo.training.shards import document_sample, entries, find_shards, pair_sample, write_shards
from tests.helpers.tiny_run import images


def test_samples_come_back_as_they_were(tmp_path):
    samples = [{"txt": f"sample {i}".encode(), "0.PNG": bytes([i]) * 700} for i in range(5)]
    shards = write_shards(tmp_path / "new" / "folder", samples, samples_per_shard=2)
    assert [shard.name for shard in shards] == ["000000.tar", "000001.tar", "000002.tar"]
    assert find_shards([f"{tmp_path}/new/folder/*.tar"]) == list(map(str, shards))
    read = [entry.read() for shard in shards for entry in entries(str(shard))]
    assert read == [{"txt": sample["txt"], "0.png": sample["0.PNG"]} for sample in samples]
    assert not list(tmp_path.rglob("*.unfinished"))


def test_shards_are_in_one_order_whatever_the_patterns(tmp_path):
    for name in ("b/1.tar", "a/2.tar", "a/1.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    patterns = [f"{tmp_path}/{pattern}" for pattern in ("b/*.tar", "a/*.tar", "*/1.tar")]
    assert find_shards(patterns) == [f"{tmp_path}/{name}" for name in ("a/1.tar", "a/2.tar", "b/1.tar")]


def test_the_same_samples_give_the_same_bytes(tmp_path):
    for folder in "ab":
        write_shards(tmp_path / folder, [pair_sample(image, "text") for image in images(2, seed=0)])
    assert (tmp_path / "a" / "000000.tar").read_bytes() == (tmp_path / "b" / "000000.tar").read_bytes()


def test_a_document_refers_to_its_images(tmp_path):
    first, second = images(2, seed=0)
    sample = document_sample(["a", first, second, "b"])
    assert json.loads(sample["json"]) == ["a", {"image": "0.png"}, {"image": "1.png"}, "b"]
    assert Image.open(io.BytesIO(sample["1.png"])).tobytes() == second.tobytes()


def test_shards_of_others_with_folders_links_and_dots(tmp_path):
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("./a/1.txt", "./a/1.seg.png", "./b.c/1.txt", "./b.c/2.txt"):
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
        folder = tarfile.TarInfo("./d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    found = entries(str(path))
    assert [(entry.key, sorted(entry.files)) for entry in found] == [
        ("./a/1", ["seg.png", "txt"]),
        ("./b.c/1", ["txt"]),
        ("./b.c/2", ["txt"]),
    ]
    assert found[2].read() == {"txt": b"./b.c/2.txt"}


def shard_of(folder, files):
    """A shard of files by name, in any order and as often as they are given."""
    path = folder / "shard.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


def test_files_without_a_kind_and_hidden_ones_are_no_samples(tmp_path):
    files = [
        ("README", b""),
        ("./._1.txt", b""),
        ("1.txt", b"one"),
        (".1.png", b""),
        ("1.png", b"two"),
        ("2.", b""),
    ]
    (entry,) = entries(shard_of(tmp_path, files))
    assert (entry.key, entry.read()) == ("1", {"txt": b"one", "png": b"two"})


@pytest.mark.parametrize("again", ["1.txt", "1.TXT"])
def test_two_files_of_one_kind_in_a_sample_are_refused(tmp_path, again):
    path = shard_of(tmp_path, [("1.txt", b""), ("1.png", b""), (again, b"")])
    with pytest.raises(ValueError, match=r"shard\.tar to be .* got: two files '1\.txt' in one sample"):
        entries(path)


def test_a_shard_that_has_become_shorter(tmp_path):
    path = shard_of(tmp_path, [("1.txt", b"a" * 100)])
    (entry,) = entries(path)
    os.truncate(path, 600)
    with pytest.raises(ValueError, match="expected 100 bytes of txt, got 88: the shard has changed"):
        entry.read()


def test_what_is_no_shard_is_refused(tmp_path):
    tarfile.open(tmp_path / "packed.tar", "w:gz").close()
    with pytest.raises(ValueError, match=r"packed\.tar to be an uncompressed tar file"):
        entries(str(tmp_path / "packed.tar"))
    with pytest.raises(FileNotFoundError, match=r"expected shards at .*/\*\.zip, got none"):
        find_shards([f"{tmp_path}/*.tar", f"{tmp_path}/*.zip"])


def test_a_shard_has_its_name_only_once_it_is_whole(tmp_path):
    def samples():
        yield {"txt": b"one"}
        yield {"txt": b"two"}
        raise RuntimeError("the third cannot be made")

    with pytest.raises(RuntimeError, match="the third"):
        write_shards(tmp_path, samples(), samples_per_shard=2)
    assert [path.name for path in tmp_path.iterdir()] == ["000000.tar"]
    with pytest.raises(TypeError):  # in the middle of a shard
        write_shards(tmp_path / "new", [{"txt": b"one"}, {"txt": None}])
    assert not list((tmp_path / "new").glob("*.tar"))
