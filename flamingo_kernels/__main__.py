"""The command line: python -m flamingo_kernels {info,support,check,bench,profile,tune,gpu,demo}."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

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


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m flamingo_kernels", description="Flamingo's attention, gates and resampler, fast."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        if name in arguments[:1]:  # what another command needs may not be installed
            module = import_module(f".commands.{name}", __package__)
            module.add_arguments(command)
            command.set_defaults(main=module.main)
    options = parser.parse_args(arguments)
    return options.main(options)


if __name__ == "__main__":
    sys.exit(main())
