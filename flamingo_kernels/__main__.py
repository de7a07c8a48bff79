"""The command line: python -m flamingo_kernels {info,support,check,bench,profile,gpu,demo}."""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m flamingo_kernels", description="Flamingo's attention, gates and resampler, fast."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    info = commands.add_parser("info", help="versions, processor, and which backend runs here or why not")
    info.add_argument("--json", action="store_true", help="print JSON")

    support = commands.add_parser("support", help="which backend runs what, and which models can be swapped")
    support.add_argument("--results", metavar="DIR", help="what profile --json wrote, for the gains")
    support.add_argument("--readme", metavar="FILE", help="replace the tables between this file's markers")

    check = commands.add_parser("check", help="hold every backend of this machine against float64")
    check.add_argument("--device", default="cpu", help='where to run, as in "cuda:0" (default: cpu)')
    check.add_argument("--json", action="store_true", help="print JSON")

    bench = commands.add_parser("bench", help="time operators and layers against their rivals")
    bench.add_argument(
        "--op", action="append", metavar="NAME", help="only this operator or layer (repeatable)"
    )
    bench.add_argument("--against", action="append", metavar="NAME", help="only this rival (repeatable)")
    bench.add_argument("--device", default="cpu", help='where to run, as in "cuda:0" (default: cpu)')
    bench.add_argument("--quick", action="store_true", help="tiny shapes: shows that it works, not how fast")
    bench.add_argument("--seconds", type=float, help="how long to time one case (default: 2; 0.1 if quick)")
    bench.add_argument(
        "--load",
        metavar="FILE",
        action="append",
        help="show an earlier --json FILE instead of running (repeatable: the later replaces a case)",
    )
    bench.add_argument("--json", metavar="FILE", help="write every row with its conditions")
    bench.add_argument("--csv", metavar="FILE", help="write the rows for a spreadsheet")
    bench.add_argument("--picture", metavar="FILE", help="draw the speed-ups (.png, .svg, .pdf)")
    bench.add_argument("--readme", metavar="FILE", help="replace the table between this file's bench markers")

    profile = commands.add_parser(
        "profile", help="a whole model before and after patch: speed, memory, parts"
    )
    profile.add_argument(
        "model", metavar="MODEL", help='a preset as "tiny", or of another library, as "idefics-tiny"'
    )
    profile.add_argument("--device", default="cpu", help='where to run, as in "cuda:0" (default: cpu)')
    profile.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    profile.add_argument("--threads", type=int, help="of the cpu (default: as torch chooses)")
    profile.add_argument(
        "--quick", action="store_true", help="a short text: shows that it works, not how fast"
    )
    profile.add_argument("--trace", metavar="FILE", help="write a Chrome trace with the parts in it (.json)")
    profile.add_argument("--json", metavar="FILE", help="write all that was found, with its conditions")
    profile.add_argument("--picture", metavar="FILE", help="draw the time by part (.png, .svg, .pdf)")

    gpu = commands.add_parser("gpu", help="prove and time the kernels on a GPU, in under nine minutes")
    part = gpu.add_mutually_exclusive_group()
    part.add_argument("--quick", action="store_true", help="in three minutes: fewer cases and rivals")
    part.add_argument(
        "--configs", action="store_true", help="in four minutes: every configuration of the Triton kernels"
    )
    gpu.add_argument("--device", default="cuda:0", help='a GPU, or "cpu" for a rehearsal (default: cuda:0)')
    gpu.add_argument("--out", metavar="DIR", help="where results go (default: benchmarks/results/<device>)")
    gpu.add_argument("--load", metavar="DIR", help="show earlier results instead of running")

    demo = commands.add_parser("demo", help="swap a Flamingo's modules on real photographs and compare")
    demo.add_argument("--picture", metavar="FILE", default="demo.png", help="default: demo.png")

    options = parser.parse_args(arguments)
    return _COMMANDS[options.command](options)


def _info(options: argparse.Namespace) -> int:
    from .info import run

    return run(options.json)


def _support(options: argparse.Namespace) -> int:
    from . import support

    print(support.table(), support.models(options.results), support.presets(options.results), sep="\n\n")
    if options.readme:
        support.update_readme(options.readme, options.results)
    return 0


def _check(options: argparse.Namespace) -> int:
    from .check import run

    return run(options.json, options.device)


def _bench(options: argparse.Namespace) -> int:
    from .bench import main

    return main(options)


def _profile(options: argparse.Namespace) -> int:
    from .profile import main

    return main(options)


def _gpu(options: argparse.Namespace) -> int:
    from .gpu import main

    return main(options)


def _demo(options: argparse.Namespace) -> int:
    from .demo import main

    return main(options.picture)


_COMMANDS = {
    "info": _info,
    "support": _support,
    "check": _check,
    "bench": _bench,
    "profile": _profile,
    "gpu": _gpu,
    "demo": _demo,
}

if __name__ == "__main__":
    sys.exit(main())
