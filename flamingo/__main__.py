"""The command line: python -m flamingo {evaluate}."""

import argparse
import sys

from flamingo.fewshot import command


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m flamingo", description="A Flamingo in plain PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    command.add_parser(commands)
    options = parser.parse_args(arguments)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
