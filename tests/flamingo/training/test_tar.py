"""Tar files of other programs, damaged ones, and those that are meant to do harm."""

import bz2
import gzip
import io
import lzma
import os
import shutil
import subprocess
import tarfile

import pytest

from flamingo.training.tar import Member, members

BLOCK = 512
END = bytes(2 * BLOCK)


def header(name="x.txt", size=0, **fields):
    """One block."""
    member = tarfile.TarInfo(name)
    member.size = size
    for field, value in fields.items():
        setattr(member, field, value)
    return member.tobuf(tarfile.USTAR_FORMAT)


def sized(size_field, kind=tarfile.REGTYPE):
    """A header whose twelve bytes of size are these."""
    block = bytearray(header(type=kind))
    block[124:136] = size_field
    block[148:156] = b"%06o\0 " % (8 * ord(" ") + sum(block[:148]) + sum(block[156:]))
    return bytes(block)


def padded(content):
    return content + bytes(-len(content) % BLOCK)


def file(name, content):
    return header(name, len(content)) + padded(content)


def extended(records, kind=tarfile.XHDTYPE):
    return header("extended", len(records), type=kind) + padded(records)


@pytest.fixture
def read(tmp_path):
    """Bytes to the files in them: names and contents."""

    def read_bytes(content):
        path = tmp_path / "made.tar"
        path.write_bytes(content)
        return [(each.name, each.fault or content[each.start :][: each.size]) for each in members(str(path))]

    return read_bytes


ONE, TWO = file("1.txt", b"one"), file("2.txt", b"two" * 300)
BOTH = [("1.txt", b"one"), ("2.txt", b"two" * 300)]


class TestWhole:
    @pytest.mark.parametrize("end", [b"", bytes(BLOCK), END, END + bytes(10_000)])
    def test_with_any_end(self, read, end):
        assert read(ONE + TWO + end) == BOTH

    def test_archives_joined(self, read):
        assert read(ONE + END + TWO + END) == BOTH

    @pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_names_that_no_header_can_hold(self, tmp_path, form):
        name = "ä" * 40 + "/" + "b" * (90 if form == tarfile.USTAR_FORMAT else 300) + ".txt"
        with tarfile.open(tmp_path / "long.tar", "w", format=form) as tar:
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"one"))
            tar.addfile(tarfile.TarInfo("short.txt"))
        assert [(each.name, each.size) for each in members(str(tmp_path / "long.tar"))] == [
            (name, 3),
            ("short.txt", 0),
        ]

    def test_an_extended_header_is_of_the_next_file_alone_and_a_global_one_of_all(self, read):
        own, shared = extended(b"14 path=a.txt\n"), b"9 size=3\n"
        assert read(own + ONE + TWO) == [("a.txt", b"one"), BOTH[1]]
        nothing = header("1.txt", 0) + padded(b"one")
        assert read(extended(shared, tarfile.XGLTYPE) + nothing * 2) == [BOTH[0]] * 2
        shorter = extended(b"9 size=2\n") + nothing  # its own has precedence
        assert read(extended(shared, tarfile.XGLTYPE) + shorter + nothing) == [("1.txt", b"on"), BOTH[0]]

    def test_a_hard_link_has_the_content_of_its_file(self, read):
        link = header("3.txt", type=tarfile.LNKTYPE, linkname="1.txt")
        again = header("4.txt", type=tarfile.LNKTYPE, linkname="3.txt")
        assert read(ONE + link + again + TWO) == [BOTH[0], ("3.txt", b"one"), ("4.txt", b"one"), BOTH[1]]

    @pytest.mark.parametrize("kind", [tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
    def test_what_is_no_file_is_passed_over(self, read, kind):
        """Whatever size it claims: nothing follows."""
        other = header("a.txt", 700, type=kind, linkname="/etc/hostname")
        assert read(other + ONE + other + TWO + other) == BOTH

    @pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar program")
    def test_of_the_tar_program(self, tmp_path):
        contents = {"a.txt": b"a", "f/b.txt": b"", "f/c.txt": os.urandom(5000)}
        for name, content in contents.items():
            (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "in" / name).write_bytes(content)
        path = tmp_path / "made.tar"
        subprocess.run(["tar", "-cf", str(path), "-C", str(tmp_path / "in"), *contents], check=True)
        data = path.read_bytes()
        found = {each.name: data[each.start : each.start + each.size] for each in members(str(path))}
        assert found == contents


class TestRefused:
    @pytest.mark.parametrize(
        "size",
        [
            b"\xff" * 10 + b"\xfe\x00",  # -512 in base 256: back to this very header
            b"\xff" * 12,
            b"-0000001000\0",
            b"\x80" + b"\x7f" * 11,
            b"77777777777\0",
            b"00000001001\0",  # one byte more than there is
            b"nonsense\0\0\0\0",
        ],
    )
    @pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, b"?"])
    def test_sizes_that_cannot_be(self, read, size, kind):
        with pytest.raises(
            ValueError, match=r"has a size of -?\d+, and 512 bytes follow|at byte 1024 there is no header"
        ):
            read(ONE + sized(size, kind) + bytes(BLOCK))

    @pytest.mark.parametrize(
        "records",
        [
            b"13 size=-512\n",
            b"12 size=abc\n",
            b"0 size=3\n",
            b"-1 size=3\n",
            b"99 size=3\n",
            b"size=3\n",
            b"9 size=3 ",
            b"9 size_3\n",
            b"9" * 5000 + b" size=3\n",
        ],
    )
    def test_extended_headers_that_say_nothing_true(self, read, records):
        with pytest.raises(ValueError, match=r"'1\.txt' has a size of '|an extended header with a record of"):
            read(extended(records) + ONE)

    def test_a_name_of_many_bytes_is_not_read(self, read):
        name = b"a" * (2**20 + 1)
        with pytest.raises(ValueError, match="a name or an extended header of 1048577 bytes"):
            read(header("long", len(name), type=tarfile.GNUTYPE_LONGNAME) + padded(name) + ONE)

    @pytest.mark.parametrize(
        "length", [*range(1, 2 * BLOCK, 100), *range(2 * BLOCK + 1, 2 * BLOCK + 1412, 200)]
    )
    def test_cut_short(self, read, length):
        """Anywhere but between two files, where nothing tells; the last file has 900 bytes."""
        with pytest.raises(ValueError, match=r"has a size of \d+, and \d+ bytes follow|there is no header"):
            list(read((ONE + TWO)[:length]))

    def test_cut_after_a_name(self, read):
        with pytest.raises(ValueError, match="ends after a name"):
            read(ONE + extended(b"14 path=a.txt\n") + END)

    def test_a_damaged_header_is_not_the_end(self, read):
        damaged = bytearray(ONE + TWO)
        damaged[2 * BLOCK + 30] ^= 1
        with pytest.raises(ValueError, match="at byte 1024 there is no header: bad checksum"):
            read(bytes(damaged))

    @pytest.mark.parametrize(
        ("kind", "content"),
        [
            ("gzip", gzip.compress(ONE)),
            ("bzip2", bz2.compress(ONE)),
            ("xz", lzma.compress(ONE)),
            ("zip", b"PK\3\4" + bytes(600)),
        ],
        ids=["gzip", "bzip2", "xz", "zip"],
    )
    def test_compressed(self, read, kind, content):
        with pytest.raises(ValueError, match=f"compressed by {kind}, so that no sample can be found: unpack"):
            read(content)

    def test_what_is_no_file(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        for path in (tmp_path, tmp_path / "pipe"):
            with pytest.raises(ValueError, match="no regular file"):
                list(members(str(path)))
        (tmp_path / "empty").touch()
        with pytest.raises(ValueError, match="it is empty"):
            list(members(str(tmp_path / "empty")))
        with pytest.raises(FileNotFoundError):
            list(members(str(tmp_path / "gone")))


class TestFaults:
    """Of one file: those around it are read."""

    @pytest.mark.parametrize(
        "content",
        [
            header("holes.txt", 0, type=tarfile.GNUTYPE_SPARSE),
            header("holes.txt", 3, type=tarfile.GNUTYPE_SPARSE) + padded(b"one"),
            header("holes.txt", 0, type=b"M"),
            extended(b"22 GNU.sparse.major=1\n") + header("holes.txt"),
            extended(b"22 GNU.sparse.major=1\n29 GNU.sparse.name=holes.txt\n") + header("GNUSparse.0/1"),
        ],
    )
    def test_content_in_several_pieces(self, read, content):
        fault = "the content of 'holes.txt' is not in one piece (a sparse file, or several volumes)"
        assert read(ONE + content + TWO) == [BOTH[0], ("holes.txt", fault), BOTH[1]]

    @pytest.mark.parametrize("blocks", [1, 2])
    def test_a_long_map_of_pieces_is_passed_over(self, read, blocks):
        first = bytearray(header("holes.txt", 3, type=tarfile.GNUTYPE_SPARSE))
        first[482] = 1
        first[148:156] = b"%06o\0 " % (8 * ord(" ") + sum(first[:148]) + sum(first[156:]))
        maps = [bytearray(BLOCK) for _ in range(blocks)]
        for block in maps[:-1]:
            block[504] = 1
        (_, holes, last) = read(ONE + bytes(first) + b"".join(map(bytes, maps)) + padded(b"one") + TWO)
        assert (holes[0], last) == ("holes.txt", BOTH[1])

    @pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar program")
    @pytest.mark.parametrize("form", ["gnu", "pax"])
    def test_sparse_files_of_the_tar_program(self, tmp_path, form):
        with open(tmp_path / "holes.txt", "wb") as file:
            for piece in range(30):
                file.seek(2**17 * piece)
                file.write(b"piece")
        (tmp_path / "last.txt").write_bytes(b"last")
        names = ["holes.txt", "last.txt"]
        command = ["tar", "-cSf", "made.tar", f"--format={form}", *names]
        subprocess.run(command, cwd=tmp_path, check=True)
        holes, last = members(str(tmp_path / "made.tar"))
        assert "'holes.txt' is not in one piece" in holes.fault
        data = (tmp_path / "made.tar").read_bytes()
        assert data[last.start : last.start + last.size] == b"last"

    def test_links(self, read):
        to_nothing = header("3.txt", type=tarfile.LNKTYPE, linkname="2.txt")
        symbolic = header("4.txt", 700, type=tarfile.SYMTYPE, linkname="1.txt")
        assert read(ONE + to_nothing + symbolic + TWO) == [
            BOTH[0],
            ("3.txt", "'3.txt' is a link to '2.txt', which is not before it"),
            ("4.txt", "'4.txt' is a symbolic link to '1.txt'"),
            BOTH[1],
        ]


def test_a_member_says_where_it_lies(tmp_path):
    (tmp_path / "a.tar").write_bytes(ONE + TWO)
    assert list(members(str(tmp_path / "a.tar"))) == [Member("1.txt", 512, 3), Member("2.txt", 1536, 900)]
