"""Files of text that people hand in: UTF-8, with a mark of bytes' order in front or without."""

from pathlib import Path


def read_text(path: Path, what: str) -> str:
    """A text as it is: a line ends where its format says.

    Raises:
        FileNotFoundError: if there is no such file, which is told as what it was to be.
        ValueError: if it is not UTF-8.
    """
    if path.is_dir() or not path.exists():
        raise FileNotFoundError(f"expected {what}, found none at {path}.")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"expected {path} to be UTF-8, got {error}.") from error


def lines(path: Path, what: str) -> list[str]:
    """The lines of a text, without their ends; raises as `read_text`.

    They end in LF or CR LF, and nowhere else where Unicode ends one.
    """
    return [line.removesuffix("\r") for line in read_text(path, what).removesuffix("\n").split("\n")]
