"""What a command needs before anything is imported."""

import os
import signal
import subprocess
import sys

import pytest

from tests.helpers import ROOT

COMMANDS = {
    "flamingo": "sys.argv, sys.orig_argv = ['-m'], ['python', '-m', 'flamingo', 'train']",
    "flamingo_kernels": "sys.argv, sys.orig_argv = ['-m'], ['python', '-m', 'flamingo_kernels', 'info']",
    "its script": "sys.argv = ['/usr/bin/flamingo-kernels', 'info']",
}
# In a fresh process: Ctrl-C while torch is imported.
INTERRUPTED = """
import os, signal
class Torch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Torch())
import {package}
"""


def run(*lines, **options):
    return subprocess.run(
        [sys.executable, "-c", "\n".join(["import sys", *lines])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        **options,
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_before_the_work_is_a_line(name):
    package = "flamingo" if name == "flamingo" else "flamingo_kernels"
    done = run(COMMANDS[name], INTERRUPTED.format(package=package))
    assert (done.returncode, done.stderr) == (130, "flamingo: stopped by Ctrl-C\n")


@pytest.mark.parametrize("package", ["flamingo", "flamingo_kernels"])
def test_whoever_imports_it_has_a_keyboard_interrupt(package):
    done = run(INTERRUPTED.format(package=package))
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")


def test_who_ignores_ctrl_c_goes_on_to():
    ignored = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    show = "print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)"
    assert run(ignored, COMMANDS["flamingo"], "import flamingo", show).stdout == "True\n"


def test_once_it_works_ctrl_c_is_told_by_the_command():
    work = "import os, signal\ndef work(): os.kill(os.getpid(), signal.SIGINT)"
    begin = "from flamingo.command_line import run_command\nsys.exit(run_command('work', work))"
    done = run(COMMANDS["flamingo"], work, begin)
    assert (done.returncode, done.stderr) == (130, "work: stopped by Ctrl-C\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # here nothing has changed


def test_a_variable_without_a_meaning_is_a_line():
    show = "from flamingo_kernels.__main__ import main"
    done = run(COMMANDS["flamingo_kernels"], show, env={**os.environ, "FLAMINGO_KERNELS_BACKEND": "gpu"})
    assert done.returncode == 2
    assert done.stderr.startswith("flamingo: FLAMINGO_KERNELS_BACKEND='gpu' is not one of auto, ")
    assert done.stderr.count("\n") == 1


def test_no_file_takes_the_place_of_a_stream_that_is_closed(tmp_path):
    def close():
        for number in (0, 1, 2):
            os.close(number)

    save = f"file = open({str(tmp_path / 'file')!r}, 'w')"
    said = (
        "print('out'); print('err', file=sys.stderr); file.write(str((file.fileno() > 2, sys.stdin.read())))"
    )
    subprocess.run(
        [
            sys.executable,
            "-c",
            "\n".join(["import sys", COMMANDS["flamingo"], "import flamingo", save, said]),
        ],
        cwd=ROOT,
        preexec_fn=close,
        check=True,
    )
    assert (tmp_path / "file").read_text() == "(True, '')"


def test_what_a_terminal_cannot_show_is_written_otherwise():
    done = run(
        COMMANDS["flamingo"],
        "import flamingo; print('\\xe4')",
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.stdout == "\\xe4\n"
