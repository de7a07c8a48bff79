"""The command line: python -m flamingo {train, encode, evaluate, complete, demo}."""

import argparse
import sys
from functools import partial

from flamingo.command_line import parser_of, run_command
from flamingo.fewshot import command as fewshot
from flamingo.generation import command as generation

EXTRAS = {"train": "training", "encode": "training", "demo": "demo"}


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = parser_of("flamingo", "A Flamingo in plain PyTorch.")
    commands = parser.add_subparsers(dest="command", metavar="command")

    train = commands.add_parser("train", help="train a Flamingo, or continue where a run was stopped")
    train.add_argument("config", metavar="CONFIG", help="a TOML file, see flamingo.training.TrainingConfig")
    train.set_defaults(run=_train)

    encode = commands.add_parser(
        "encode", help="the vision encoder's features of a training set, once for all steps"
    )
    encode.add_argument("config", metavar="CONFIG", help="the TOML file of the run that will read them")
    encode.set_defaults(run=_encode)

    fewshot.add_parser(commands)
    generation.add_parser(commands)

    demo = commands.add_parser("demo", help="a Flamingo from nothing, on real digits, in minutes")
    demo.add_argument("--picture", metavar="FILE", default="digits.png", help="default: digits.png")
    demo.add_argument(
        "--model", metavar="FILE", default="digits.safetensors", help="default: digits.safetensors"
    )
    demo.add_argument("--json", metavar="FILE", help="for what was found (default: none)")
    demo.add_argument("--seed", type=int, default=0, help="of all that is random (default: 0)")
    demo.add_argument("--threads", type=int, default=1, help="of torch (default: 1, its products are small)")
    demo.add_argument("--no-kernels", action="store_true", help="train without the kernels")
    demo.add_argument("--quick", action="store_true", help="a few steps of each stage, to see that it runs")
    demo.set_defaults(run=_demo)

    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help(sys.stderr)
        return 2
    return run_command(options.command, partial(options.run, options), extra=EXTRAS.get(options.command))


def _train(options: argparse.Namespace) -> int:
    from flamingo.training.command import run

    return run(options.config)


def _encode(options: argparse.Namespace) -> int:
    from flamingo.training.command import run_encode

    return run_encode(options.config)


def _demo(options: argparse.Namespace) -> int:
    from flamingo.demo import main as run

    return run(
        options.picture,
        options.model,
        json=options.json,
        seed=options.seed,
        threads=options.threads,
        kernels=not options.no_kernels,
        quick=options.quick,
    )


if __name__ == "__main__":
    sys.exit(main())
