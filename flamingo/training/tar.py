"""The files in a tar file, as `tar --extract --ignore-zeros` finds them, and where they lie in it.

`tarfile` only parses a header here. Where it goes from one to the next, it takes a damaged one for the end,
reads the first of joined archives alone, and before the fix of CVE-2025-8194 loops for ever at a size
below 0.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

_LONGEST = 2**20  # bytes of a name or of other facts about a member
_FACTS = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
_LONG = {tarfile.GNUTYPE_LONGNAME: "path", tarfile.GNUTYPE_LONGLINK: "linkpath"}
_SPLIT = b"M"  # the rest of a file that begins on another volume
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"(\xb5/\xfd": "zstd", b"PK\3\4": "zip"}


class Member(NamedTuple):
    """A file in a tar file."""

    name: str
    start: int  # of its content, in bytes
    size: int
    fault: str = ""  # why there is no content


def members(path: str) -> Iterator[Member]:
    """The regular files of a tar file, and hard links with the content of what they link to.

    A file whose content is not in one piece, a symbolic link and a link to nothing have a fault.

    Raises:
        ValueError: at the first damage.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("it is no regular file")
    with open(path, "rb") as file:
        files: dict[str, Member] = {}
        for header, start, facts in _headers(file):
            name = facts.get("path", header.name)
            if header.type in (tarfile.GNUTYPE_SPARSE, _SPLIT) or any(
                key.startswith("GNU.sparse") for key in facts
            ):
                # The tar program writes another name into the header of a sparse file.
                name = facts.get("GNU.sparse.name", name)
                fault = f"the content of {name!r} is not in one piece (a sparse file, or several volumes)"
                files[name] = Member(name, 0, 0, fault)
            elif header.isreg():
                files[name] = Member(name, start, header.size)
            elif header.islnk():
                target = facts.get("linkpath", header.linkname)
                missing = Member(name, 0, 0, f"{name!r} is a link to {target!r}, which is not before it")
                files[name] = files.get(target, missing)._replace(name=name)
            elif header.issym():
                target = facts.get("linkpath", header.linkname)
                files[name] = Member(name, 0, 0, f"{name!r} is a symbolic link to {target!r}")
            else:
                continue
            yield files[name]


def _headers(file: BinaryIO) -> Iterator[tuple[tarfile.TarInfo, int, dict[str, str]]]:
    """Each member's header with its true size, where its content starts, and what stands before it."""
    end = file.seek(0, os.SEEK_END)
    if not end:
        raise ValueError("it is empty")
    shared: dict[str, str] = {}
    own: dict[str, str] = {}
    at = 0
    while at < end:
        file.seek(at)
        block = file.read(tarfile.BLOCKSIZE)
        start = at + len(block)
        if not block.strip(b"\0"):  # the end, or where the next of several archives begins
            at = start
            continue
        header = _header(block, at)
        if header.type == tarfile.GNUTYPE_SPARSE:
            start = _after_map(file, block, start)
        facts = shared | own
        if header.type not in (*_FACTS, *_LONG):
            header.size = _size(header, facts)
        at = start + -(-header.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if header.size < 0 or at > end:
            raise ValueError(f"{header.name!r} has a size of {header.size}, and {end - start} bytes follow")
        if header.type == tarfile.XGLTYPE:
            shared |= _records(_text(file, header))
        elif header.type in _FACTS:
            own |= _records(_text(file, header))
        elif header.type in _LONG:
            own[_LONG[header.type]] = _decoded(_text(file, header).partition(b"\0")[0])
        else:
            yield header, start, facts
            own = {}
    if own:
        raise ValueError("it ends after a name or an extended header, before their file")


def _header(block: bytes, at: int) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        packed = next((kind for mark, kind in _PACKED.items() if not at and block.startswith(mark)), None)
        if packed:
            raise ValueError(
                f"it is compressed by {packed}, so that no sample can be found: unpack it"
            ) from None
        raise ValueError(f"at byte {at} there is no header: {error}") from error


def _after_map(file: BinaryIO, block: bytes, start: int) -> int:
    """Where the content of a sparse file begins: behind the blocks that say where its pieces belong."""
    more = block[482:483]
    while more.strip(b"\0"):
        more = file.read(tarfile.BLOCKSIZE)[504:505]
        start += tarfile.BLOCKSIZE
    return start


def _size(header: tarfile.TarInfo, facts: dict[str, str]) -> int:
    """The size of the content behind a header; links, folders and devices have none, whatever it says."""
    if not header.isreg() and header.type in tarfile.SUPPORTED_TYPES:
        return 0
    if "size" not in facts:
        return header.size
    if not re.fullmatch("[0-9]{1,20}", facts["size"]):
        raise ValueError(f"{facts.get('path', header.name)!r} has a size of {facts['size']!r}")
    return int(facts["size"])


def _text(file: BinaryIO, header: tarfile.TarInfo) -> bytes:
    """What a header holds that says something about the next member."""
    if header.size > _LONGEST:
        raise ValueError(f"a name or an extended header of {header.size} bytes, more than {_LONGEST}")
    return file.read(header.size)


def _records(text: bytes) -> dict[str, str]:
    """The extended header of POSIX: "length key=value\\n", where the length is that of the whole record."""
    found = {}
    while text:
        length = int((re.match(rb"[0-9]{1,7}(?= )", text) or [b"0"])[0])
        record, text = text[:length], text[length:]
        key, equals, value = record.partition(b" ")[2].partition(b"=")
        if not equals or len(record) < length or not value.endswith(b"\n"):
            raise ValueError(f"an extended header with a record of {length} bytes, {record[:40]!r}")
        found[_decoded(key)] = _decoded(value[:-1])
    return found


def _decoded(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
