"""The command line: python -m flamingo_kernels {info,support,check,bench,profile,tune,gpu,demo}."""

from __future__ import annotations

import sys
from functools import partial
from importlib import import_module

from flamingo.command_line import parser_of, run_command

COMMANDS = {
    "info": "versions, processor, and which backend runs here or why not",
    "support": "which backend runs what, and which models can be swapped",
    "check": "hold every backend of this machine against float64",
    "bench": "time operators and layers against their rivals",
    "profile": "a whole model before and after patch: speed, memory, parts",
    "tune": "find the fastest product of linear layers on this machine",
    "gpu": "prove and time the kernels on a GPU, in under nine minutes",
    "demo": "swap a Flamingo's modules on real photographs and compare",
}

EXTRAS = {"bench": "bench", "profile": "bench", "gpu": "bench", "demo": "demo"}


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = parser_of("flamingo_kernels", "Flamingo's attention, gates and resampler, fast.")
    commands = parser.add_subparsers(dest="command", metavar="command")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        if name in arguments[:1]:  # what another command needs may not be installed
            module = import_module(f".commands.{name}", __package__)
            module.add_arguments(command)
            command.set_defaults(main=module.main)
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help(sys.stderr)
        return 2
    return run_command(options.command, partial(options.main, options), extra=EXTRAS.get(options.command))


if __name__ == "__main__":
    sys.exit(main())
