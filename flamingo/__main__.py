"""The command line: python -m flamingo {train}."""

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m flamingo", description="A Flamingo in plain PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    train = commands.add_parser("train", help="train a Flamingo, or continue where a run was stopped")
    train.add_argument("config", metavar="CONFIG", help="a TOML file, see flamingo.training.TrainingConfig")

    options = parser.parse_args(arguments)
    return _COMMANDS[options.command](options)


def _train(options: argparse.Namespace) -> int:
    from flamingo.training.command import run

    return run(options.config)


_COMMANDS = {
    "train": _train,
}

if __name__ == "__main__":
    sys.exit(main())
