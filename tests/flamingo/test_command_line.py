"""The command lines: whatever goes wrong is a line and an exit status."""

import argparse
import os
import pkgutil
import subprocess
import sys

import pytest

from flamingo import __main__ as flamingo
from flamingo.command_line import Parser, count_from, expect_writable, run_command, time_span
from flamingo.training.config import tomllib
from flamingo_kernels import __main__ as kernels
from tests.helpers import ROOT


def fails(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("expected a,\n  got b."), 2, "work: expected a, got b."),
        (ValueError("work: expected a."), 2, "work: expected a."),
        (ValueError(), 2, "work: ValueError"),
        (
            FileNotFoundError(2, "No such file or directory", "x.toml"),
            2,
            "work: x.toml: No such file or directory",
        ),
        (OSError("no disk"), 2, "work: no disk"),
        (MemoryError(), 2, "work: expected more memory: there is no more"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes."),
            2,
            "work: expected more memory: DefaultCPUAllocator: can't allocate memory: 9 bytes.",
        ),
        (
            ValueError(f"got {'9' * 5000}. Remove it."),
            2,
            f"work: got {'9' * 896} ... {'9' * 288}. Remove it.",
        ),
        (OSError(28, "No space left on device"), 2, "work: [Errno 28] No space left on device"),
        (FloatingPointError("expected a finite gradient"), 1, "work: expected a finite gradient"),
        (KeyboardInterrupt(), 130, "work: stopped by Ctrl-C"),
        (KeyboardInterrupt("stopped after 3."), 130, "work: stopped after 3."),
        (ImportError("a is too old"), 2, "work: a is too old"),
        (ModuleNotFoundError("No module named 'theirs'", name="theirs"), 2, "work: No module named 'theirs'"),
        (
            ModuleNotFoundError("No module named 'tqdm'", name="tqdm.auto"),
            2,
            'work: tqdm is missing. In a checkout of this library, run: pip install ".[training]".',
        ),
    ],
)
def test_an_error_is_a_line_and_a_status(capsys, error, status, line):
    assert run_command("work", fails(error)) == status
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", f"{line}\n")


def test_what_is_missing_comes_with_the_commands_own_extra(capsys):
    error = ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
    assert run_command("work", fails(error), extra="demo") == 2
    assert 'pip install ".[demo]"' in capsys.readouterr().err


@pytest.mark.parametrize("error", [TypeError("of two arguments one is missing"), RuntimeError("shapes")])
def test_a_fault_of_ours_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        run_command("work", fails(error))


@pytest.mark.parametrize("lines", [1, 10**5])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_nobody_reads_the_output(lines, unbuffered):
    """As after `| head`; a few lines wait in a buffer until the end."""
    code = (
        "import sys\nfrom flamingo.command_line import run_command\n"
        f"def work():\n    sys.stdin.read()\n    for _ in range({lines}): print('a line')\n    return 0\n"
        "sys.exit(run_command('work', work))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    process.stdin.close()
    assert (process.wait(), process.stderr.read()) == (141, b"")


def test_the_programs_of_an_installation_are_these():
    programs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    found = {name: pkgutil.resolve_name(place) for name, place in programs.items()}
    assert found == {"flamingo": flamingo.main, "flamingo-kernels": kernels.main}


@pytest.mark.parametrize("package", [flamingo, kernels])
class TestPrograms:
    def test_alone_it_lists_its_commands(self, package, capsys):
        assert package.main([]) == 2
        shown = capsys.readouterr().err
        assert shown.startswith(f"usage: python -m {package.__package__} ")
        for name in ("train", "demo") if package is flamingo else kernels.COMMANDS:
            assert f"\n    {name} " in shown

    def test_its_version(self, package, capsys):
        with pytest.raises(SystemExit) as stopped:
            package.main(["--version"])
        assert stopped.value.code == 0
        assert capsys.readouterr().out.startswith(package.__package__.replace("_", "-") + " ")

    def test_as_a_script_it_has_the_scripts_name(self, package, capsys, monkeypatch):
        script = package.__package__.replace("_", "-")
        monkeypatch.setattr(sys, "argv", [f"/bin/{script}"])
        package.main([])
        assert capsys.readouterr().err.startswith(f"usage: {script} ")

    @pytest.mark.parametrize("arguments", [["nonsense"], ["demo", "--nonsense"], ["demo", "--picture"]])
    def test_a_wrong_argument_is_a_line(self, package, arguments, capsys):
        with pytest.raises(SystemExit) as stopped:
            package.main(arguments)
        assert stopped.value.code == 2
        shown = capsys.readouterr().err
        assert shown.startswith(f"python -m {package.__package__}")
        assert shown.endswith(" --help\n")
        assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        (count_from(1), {"1": 1, "20": 20}, ["0", "-1", "1.5", "nan", "x", ""]),
        (count_from(0), {"0": 0}, ["-1", "9" * 30]),
        (count_from(1, 8), {"8": 8}, ["9"]),
        (None, {"x": "x", " ": " "}, []),
        (time_span, {"0": 0.0, "2": 2.0, "1e-3": 0.001}, ["-1", "nan", "inf", "x"]),
    ],
)
def test_numbers(kind, right, wrong, capsys):
    parser = Parser(prog="work")
    parser.add_argument("--number", type=kind)
    for text, number in right.items():
        assert parser.parse_args(["--number", text]) == argparse.Namespace(number=number)
    for text in wrong:
        with pytest.raises(SystemExit):
            parser.parse_args([f"--number={text}"])
        assert f"got {text!r}. See work --help" in capsys.readouterr().err


def test_files_are_tried_and_stay_as_they_are(tmp_path):
    there, new = tmp_path / "there", tmp_path / "new"
    there.write_text("mine")
    expect_writable(there, new, None)
    assert there.read_text() == "mine"
    assert not new.exists()
    with pytest.raises(IsADirectoryError):
        expect_writable(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        expect_writable(tmp_path / "loop", there)


def test_a_file_that_replaces_another_replaces_no_device(tmp_path):
    """Nor does it wait for a pipe's reader, or take a link for its target."""
    os.mkfifo(tmp_path / "pipe")
    for file in (os.devnull, tmp_path / "pipe"):
        with pytest.raises(ValueError, match=rf"expected {file} to be a file, got a device or a pipe\."):
            expect_writable(file)
    (tmp_path / "link").symlink_to("target")
    expect_writable(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("words", [["--file", ""], ["--file="]])
def test_a_variable_that_is_not_set_is_no_name(words, capsys):
    parser = Parser(prog="work")
    parser.add_argument("--file")
    with pytest.raises(SystemExit):
        parser.parse_args(words)
    assert "argument --file: expected a text, got an empty one." in capsys.readouterr().err


def test_a_commands_text_may_be_empty(capsys):
    parser = Parser(prog="work")
    command = parser.add_subparsers(dest="command").add_parser("say")
    command.add_argument("text", type=str)
    assert parser.parse_args(["say", ""]).text == ""


def test_the_folder_of_what_is_written_has_to_be_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        expect_writable(tmp_path / "none" / "x")
