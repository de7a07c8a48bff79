"""Tar shards: what is written is what is read, by us and by anyone who reads tar."""

import gzip
import io
import json
import os
import tarfile

import pytest
from PIL import Image

from flamingo.training.bad import DataError
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


class TestNames:
    @pytest.fixture
    def folder(self, tmp_path):
        for name in (
            "a/000.tar",
            "a/001.tar",
            "a/010.tar",
            "b/000.tar",
            "b/x.jsonl",
            "b/notes.txt",
            "{c}.tar",
        ):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        return tmp_path

    @pytest.mark.parametrize(
        ("patterns", "names"),
        [
            (["a/{000..001}.tar"], ["a/000.tar", "a/001.tar"]),
            (["{a,b}/000.tar"], ["a/000.tar", "b/000.tar"]),
            (["{a,b}/00*.tar"], ["a/000.tar", "a/001.tar", "b/000.tar"]),
            (["{a..b}/{000..000}.tar", "a/000.tar"], ["a/000.tar", "b/000.tar"]),
            (["a", "b"], ["a/000.tar", "a/001.tar", "a/010.tar", "b/000.tar", "b/x.jsonl"]),
            (["?"], ["a/000.tar", "a/001.tar", "a/010.tar", "b/000.tar", "b/x.jsonl"]),
            (["{a,b}"], ["a/000.tar", "a/001.tar", "a/010.tar", "b/000.tar", "b/x.jsonl"]),
            (["{c}.tar"], ["{c}.tar"]),
        ],
    )
    def test_what_patterns_stand_for(self, folder, patterns, names):
        found = find_shards(f"{folder}/{pattern}" for pattern in patterns)
        assert found == [f"{folder}/{name}" for name in names]

    @pytest.mark.parametrize(
        ("pattern", "message"),
        [
            (
                "a/{000..231}.tar",
                r"232 names, \S*/a/000\.tar to \S*/231\.tar; got none at 229 of them: "
                r"\S*/002\.tar, \S*/003\.tar, \S*/004\.tar, \.\.\.",
            ),
            ("{a,d}/*.tar", r"2 names, .* got none at 1 of them: \S*/d/\*\.tar\."),
            ("d/*.tar", r"expected shards at \S*/d/\*\.tar, got none"),
            ("{c,d", r"expected shards at \S*/\{c,d, got none"),
        ],
    )
    def test_what_is_not_there_is_named(self, folder, pattern, message):
        with pytest.raises(FileNotFoundError, match=message):
            find_shards([f"{folder}/a", f"{folder}/{pattern}"])

    @pytest.mark.parametrize("name", ["b.tar.gz", "b.tgz", "b.tar.zst", "b.jsonl.gz"])
    def test_a_compressed_shard_is_not_passed_over(self, tmp_path, name):
        write_shards(tmp_path, [{"txt": b"a"}])
        (tmp_path / name).write_bytes(gzip.compress(b"a") + bytes(600))
        assert find_shards([str(tmp_path)]) == [f"{tmp_path}/000000.tar", f"{tmp_path}/{name}"]
        with pytest.raises(DataError, match=rf"{name} .*compressed by gzip, .*unpack it"):
            entries(f"{tmp_path}/{name}")

    def test_a_folder_without_shards(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="got none"):
            find_shards([str(tmp_path)])


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
def test_two_files_of_one_kind_are_a_fault_of_their_sample(tmp_path, again):
    files = [("0.txt", b"zero"), ("1.txt", b""), ("1.png", b""), (again, b""), ("2.txt", b"two")]
    zero, one, two = entries(shard_of(tmp_path, files))
    assert (zero.read(), two.read()) == ({"txt": b"zero"}, {"txt": b"two"})
    with pytest.raises(ValueError, match=r"in .*shard\.tar, got: two files '1\.txt' in one sample"):
        one.read()


def test_a_file_without_content_is_a_fault_of_its_sample(tmp_path):
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as tar:
        for name, link in (("0.txt", ""), ("1.txt", "0.txt"), ("1.png", "")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = (tarfile.SYMTYPE if link else tarfile.REGTYPE), link
            tar.addfile(member)
    zero, one = entries(str(path))
    assert zero.read() == {"txt": b""}
    with pytest.raises(ValueError, match=r"'1\.txt' is a symbolic link to '0\.txt'"):
        one.read()


def test_lines_of_json_are_samples(tmp_path):
    path = tmp_path / "pages.jsonl"
    path.write_bytes(b'["a"]\n\n["b", "\xc3\xa9"]\r\n["c"]')
    found = entries(str(path))
    assert [(entry.key, json.loads(entry.read()["json"])) for entry in found] == [
        ("1", ["a"]),
        ("3", ["b", "é"]),
        ("4", ["c"]),
    ]


def test_a_shard_that_has_become_shorter(tmp_path):
    path = shard_of(tmp_path, [("1.txt", b"a" * 100)])
    (entry,) = entries(path)
    os.truncate(path, 600)
    with pytest.raises(ValueError, match="expected 100 bytes of txt, got 88: the shard has changed"):
        entry.read()


def test_what_is_no_shard_is_refused(tmp_path):
    tarfile.open(tmp_path / "packed.tar", "w:gz").close()
    with pytest.raises(ValueError, match=r"packed\.tar to be an uncompressed tar file.* by gzip"):
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
