"""Profiles a model before and after `patch`, both in one run, after checking that they compute the same.

models         what can be profiled: a registry of models, each with its inputs and its kinds of work
third_party    the tiny models of other libraries for that registry
own            the user's own model
exact          a model in float64, whole or one block at a time
run            compare, then time, weigh and profile
apart          time each side in a process of its own, compiled ones beside
parts          which module belongs to which part, and what torch.profiler says each part took
count          shapes, bytes and FLOPs of a model that does not fit into memory
report         the page of text and the picture
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flamingo.command_line import MOST_THREADS, count_from, expect_writable

if TYPE_CHECKING:
    import torch

    from .count import Counted
    from .subject import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from .models import MODELS
    from .subject import WORKS

    parser.add_argument(
        "name",
        metavar="MODEL",
        nargs="?",
        help=f"a preset, or of another library: {', '.join(MODELS)}",
    )
    parser.add_argument(
        "--model",
        metavar="FILE.py:NAME|MODULE:NAME",
        help="instead: a function of yours, of any of tokens, images and batch, that returns a model and a "
        "dict of the keyword arguments of its forward",
    )
    parser.add_argument("--tokens", type=count_from(1), help="in a text (default: 1024)")
    parser.add_argument("--images", type=count_from(1), help="in a text (default: 8)")
    parser.add_argument("--batch", type=count_from(1), default=1, help="how many texts (default: 1)")
    parser.add_argument(
        "--new", type=count_from(0), default=0, metavar="TOKENS", help="also generate, with --apart"
    )
    parser.add_argument("--only", metavar="WORK", nargs="+", choices=WORKS, help=", ".join(WORKS))
    parser.add_argument("--device", default="cpu", help='where to run, as in "cuda:0" (default: cpu)')
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument(
        "--threads", type=count_from(1, MOST_THREADS), help="of the cpu (default: as torch chooses)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a short text: shows that it works, not how fast"
    )
    parser.add_argument(
        "--compile", action="store_true", help="time all under torch.compile; parts are still those without"
    )
    parser.add_argument(
        "--apart",
        action="store_true",
        help="only time, each in a process of its own; with --compile, sides under torch.compile beside",
    )
    parser.add_argument(
        "--quantize", action="store_true", help="also time inference with weights of 8-bit integers"
    )
    parser.add_argument(
        "--fold", action="store_true", help="also time inference with folded weights, with --apart"
    )
    parser.add_argument("--trace", metavar="FILE", help="write a Chrome trace with the parts in it (.json)")
    parser.add_argument("--json", metavar="FILE", help="write all that was found, with its conditions")
    parser.add_argument("--picture", metavar="FILE", help="draw the time by part (.png, .svg, .pdf)")


def main(options: argparse.Namespace) -> int:
    """The command `profile`: 1 if the patched model computes something else, else 0.

    Raises:
        ImportError, OSError, ValueError: for what it cannot do or write.
    """
    import torch

    from . import apart, count, report, run

    dtype = getattr(torch, options.dtype)
    seconds = 0.1 if options.quick else 5.0
    _refuse_early(options)
    whole = _plan(options)
    plan = whole.only(options.only) if options.only else whole
    size = apart.Size.of(plan, dtype) if options.apart else None
    lacking = apart.lacking_memory(size, dtype) if size else count.lacking_memory(plan, dtype, options.device)
    by_block = bool(lacking) and not options.apart and _fits_by_block(whole, options, dtype)
    if by_block:
        plan, lacking = whole.only(_inference(options)), ""
    if lacking and (options.apart or options.model):
        raise ValueError(f"it {lacking}.")
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    if lacking:
        return _show_counted(count.run(whole, dtype, options.device, lacking), options)
    if size:
        sides = apart.asked(compiled=options.compile, quantized=options.quantize, folded=options.fold)
        times = apart.run(plan, size, dtype=dtype, seconds=3 * seconds, sides=sides)
        _save(times, options.json)
        print(report.apart(times))
        return 0
    settings = {"seconds": seconds, "trace": options.trace}
    settings |= {"compiled": options.compile, "quantized": options.quantize, "by_block": by_block}
    if options.quick:
        settings["profiled"] = 1
    found = run.run(plan, dtype=dtype, device=options.device, **settings)
    _save(found, options.json)
    if options.picture and found.same:
        report.picture(found, options.picture)
    print(report.measured(found))
    return int(not found.same)


def _inference(options: argparse.Namespace) -> list[str]:
    """What is asked for and needs no gradients."""
    from .subject import INFERENCE

    return [work for work in options.only or INFERENCE if work in INFERENCE]


def _fits_by_block(plan: Plan, options: argparse.Namespace, dtype: torch.dtype) -> bool:
    from .count import lacking_memory

    return bool(_inference(options)) and not lacking_memory(plan, dtype, options.device, by_block=True)


def _plan(options: argparse.Namespace) -> Plan:
    """What the options ask for. Raises ValueError for what cannot be."""
    from . import models, own
    from .subject import FULL, QUICK

    if bool(options.name) == bool(options.model):
        raise ValueError("expected a MODEL, or your own as --model FILE.py:NAME or module:NAME.")
    usual = QUICK if options.quick else FULL
    sizes = usual._replace(
        text=usual.text if options.tokens is None else options.tokens,
        media=usual.media if options.images is None else options.images,
        batch=options.batch,
        new=options.new,
    )
    if min(sizes.text, sizes.media, sizes.batch) < 1 or sizes.text < 2 * sizes.media:
        raise ValueError(
            "expected a batch and images of at least 1, and two tokens for each image, got "
            f"{sizes.text} tokens, {sizes.media} images and a batch of {sizes.batch}."
        )
    return own.plan(options.model, sizes) if options.model else models.plan(options.name, sizes)


def _show_counted(found: Counted, options: argparse.Namespace) -> int:
    from .report import counted

    print(counted(found))
    _save(found, options.json)
    if options.trace or options.picture:
        print("profile: nothing was run, so there is no trace and no picture.", file=sys.stderr)
    return 0


def _refuse_early(options: argparse.Namespace) -> None:
    """Let what would fail at the end fail before the work."""
    from ..info import expect_device
    from ..measure.figure import expect_picture

    expect_device(options.device)
    if options.apart and (options.trace or options.picture or options.device != "cpu"):
        raise ValueError("expected --apart on a cpu, without --trace and --picture.")
    if (options.new or options.fold) and not options.apart:
        raise ValueError("expected --new and --fold with --apart.")
    if options.picture:
        expect_picture(options.picture)
    expect_writable(options.trace, options.json)


def _save(found: object, path: str | None) -> None:
    from .report import plain

    if path:
        Path(path).write_text(json.dumps(plain(found), indent=1) + "\n")
