"""The command line: python -m flamingo {train, evaluate}."""

import argparse
import sys

from flamingo.fewshot import command as fewshot


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m flamingo", description="A Flamingo in plain PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    train = commands.add_parser("train", help="train a Flamingo, or continue where a run was stopped")
    train.add_argument("config", metavar="CONFIG", help="a TOML file, see flamingo.training.TrainingConfig")
    train.set_defaults(run=_train)

    fewshot.add_parser(commands)

    options = parser.parse_args(arguments)
    return options.run(options)


def _train(options: argparse.Namespace) -> int:
    from flamingo.training.command import run

    return run(options.config)


if __name__ == "__main__":
    sys.exit(main())
