"""`python -m flamingo complete`: what a model says after a prompt.

::

    complete digits.safetensors 3.png "Output:"                     text, as it comes
    complete run --shot a.png "Output: a cat." b.png "Output:"      after examples
    complete run b.png "Output:" --choices cat dog                  the likeliest first
    complete run --lines prompts.txt --json                         many prompts behind one
"""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flamingo import named
from flamingo.command_line import count_from
from flamingo.generation.latents import Latents
from flamingo.generation.prompts import Prompt, read_prompt
from flamingo.generation.texts import complete, stream_text
from flamingo.kernels import check_kernels, use_kernels
from flamingo.media import read_frames
from flamingo.processor import Processor
from flamingo.text_files import lines
from flamingo.tokenizer import EOC
from flamingo.training.processes import device_of, say

AT_ONCE = 8  # prompts of a file


def add_parser(commands: Any) -> None:
    """Adds `complete` to the commands of a parser."""
    parser = commands.add_parser(
        "complete",
        help="ask a model: what follows images and a prompt",
        description="Prints what follows images and a prompt, or which of several texts is the likeliest.",
    )
    parser.intermixed = True
    parser.add_argument("model", metavar="MODEL", help=named.FORMS)
    parser.add_argument(
        "prompt", nargs="*", type=str, metavar="[IMAGE ...] PROMPT", help="files, and a text after them"
    )
    parser.add_argument(
        "--shot",
        nargs=2,
        type=str,  # of which the text may be empty
        action="append",
        default=[],
        metavar=("IMAGE", "TEXT"),
        help="an example before the prompt, closed by <EOC>; may be given again",
    )
    parser.add_argument(
        "--lines",
        metavar="FILE",
        help="prompts instead of one, a line each; behind an image of its own: IMAGE<TAB>PROMPT",
    )
    parser.add_argument("--choices", nargs="+", metavar="TEXT", help="rank these texts; give it last")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each prompt")
    parser.add_argument("--max-new-tokens", type=count_from(1), default=32, metavar="N", help="default: 32")
    parser.add_argument("--beams", type=count_from(1), default=1, metavar="N", help="default: 1, greedy")
    parser.add_argument("--temperature", type=float, default=0.0, help="above 0: draw (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    parser.add_argument("--device", default="cpu", help='as "cuda:0", or "auto" (default: cpu)')
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the model's")
    parser.add_argument("--no-kernels", action="store_true", help="ask without the kernels")
    named.add_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints the answers and returns the command's exit status.

    Raises:
        ImportError, OSError, ValueError: for what is missing or wrong, before the model is loaded where that
            can be seen.
    """
    shots, documents = _documents(options)
    device = device_of(options.device)
    check_kernels(not options.no_kernels)
    load = named.find(options.model, options, partial(say, "complete"))
    model, processor = load()
    use_kernels(model, not options.no_kernels, partial(say, "complete"))
    model = model.to(device, None if options.dtype is None else getattr(torch, options.dtype))
    latents = Latents(model, processor)
    after = read_prompt(model, processor, shots, latents=latents) if shots else None
    if options.choices:
        answers: Iterator[Any] = _ranked(model, processor, documents, after, latents, options)
    elif options.lines or options.json or options.beams > 1:
        answers = _texts(model, processor, documents, after, latents, options)
    else:
        return _stream(model, processor, documents[0], after, latents, options)
    for document, answer in zip(documents, answers, strict=True):
        print(json.dumps(_record(document, answer)) if options.json else _plain(answer), flush=True)
    return 0


def _documents(options: argparse.Namespace) -> tuple[list, list[list]]:
    """What comes before all prompts, and the prompts, files checked."""
    images, texts = options.prompt, [""]
    if options.lines is None:
        if not options.prompt:
            raise ValueError("expected a prompt after the model, or --lines FILE, got none.")
        *images, texts[0] = options.prompt
    if options.choices is not None and len(options.choices) < 2:
        raise ValueError(f"expected two --choices or more to rank, got {options.choices}.")
    if not 0 <= options.temperature < float("inf"):
        raise ValueError(f"expected --temperature of 0 or more, got {options.temperature}.")
    if options.temperature and not 1e-3 <= options.temperature <= 1e3:  # float32 would divide to infinity
        raise ValueError(f"expected --temperature of 0, or from 0.001 to 1000, got {options.temperature}.")
    if options.choices is not None and (options.beams > 1 or options.temperature > 0):
        raise ValueError("expected --choices, or --beams or --temperature, got both: nothing is drawn.")
    if options.beams > 1 and options.temperature > 0:
        raise ValueError("expected --beams or --temperature, got both: beam search draws nothing.")
    if not -(2**63) <= options.seed < 2**64:
        raise ValueError(f"expected --seed of at most 64 bits, got {options.seed}.")
    shots: list = []
    for image, text in options.shot:
        text = _text(text)
        shots += [_image(image), text if text.endswith(EOC) else f"{text}{EOC}"]
    options.choices = options.choices and [_text(choice) for choice in options.choices]
    shared = [_image(image) for image in images]
    for image in (part for part in (*shots, *shared) if isinstance(part, Path)):
        next(read_frames(image))
    if options.lines is None:
        return shots, [[*shared, *map(_text, texts)]]
    return shots, [[*shared, *parts] for parts in _lines(Path(options.lines))]


def _lines(path: Path) -> Iterator[list]:
    """The prompts of a file, each with its images."""
    found = lines(path, "a file of prompts, a line each")
    if found == [""]:
        raise ValueError(f"{path}: expected a prompt a line, got an empty file.")
    for line in found:
        *images, prompt = line.split("\t")
        yield [*(_image(image) for image in images), prompt]


def _text(argument: str) -> str:
    """A text as it was typed, which Python does not decode as UTF-8 where LANG is C."""
    try:
        return os.fsencode(argument).decode("utf-8")
    except ValueError as error:
        raise ValueError(f"expected a text in UTF-8, got {argument!r}.") from error


def _image(name: str) -> Path:
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"expected an image or a video before the prompt, found no file {name}.")
    return path


def _generation(options: argparse.Namespace, model: Any) -> dict[str, Any]:
    """The options of `generate`."""
    chosen: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature}
    if options.temperature > 0:
        device = next(model.parameters()).device
        chosen["generator"] = torch.Generator(device).manual_seed(options.seed)
    return chosen


def _stream(
    model: Any,
    processor: Processor,
    document: list,
    after: Prompt | None,
    latents: Latents,
    options: argparse.Namespace,
) -> int:
    pieces = stream_text(
        model, processor, document, after=after, latents=latents, **_generation(options, model)
    )
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


def _texts(
    model: Any,
    processor: Processor,
    documents: Sequence[list],
    after: Prompt | None,
    latents: Latents,
    options: argparse.Namespace,
) -> Iterator[str]:
    chosen = _generation(options, model) | {"num_beams": options.beams}
    for start in range(0, len(documents), AT_ONCE):
        some = documents[start : start + AT_ONCE]
        yield from complete(model, processor, some, after=after, latents=latents, **chosen)


def _ranked(
    model: Any,
    processor: Processor,
    documents: Sequence[list],
    after: Prompt | None,
    latents: Latents,
    options: argparse.Namespace,
) -> Iterator[list[tuple[str, float]]]:
    """The choices of each prompt, the likeliest first, with their log-likelihoods."""
    from flamingo.fewshot import log_likelihoods

    for start in range(0, len(documents), AT_ONCE):
        some = documents[start : start + AT_ONCE]
        scores = log_likelihoods(model, processor, some, options.choices, after=after, latents=latents)
        for row in scores.tolist():
            yield sorted(zip(options.choices, row, strict=True), key=lambda pair: -pair[1])


def _record(document: list, answer: Any) -> dict[str, Any]:
    record: dict[str, Any] = {
        "images": [str(part) for part in document if isinstance(part, Path)],
        "prompt": document[-1],
    }
    if isinstance(answer, str):
        return record | {"text": answer}
    choices = [{"text": text, "log_likelihood": likelihood} for text, likelihood in answer]
    return record | {"choices": choices}


def _plain(answer: Any) -> str:
    """A line for a text; for choices a line each."""
    if isinstance(answer, str):
        return " ".join(answer.split())
    return "\n".join(f"{likelihood:9.3f}  {text}" for text, likelihood in answer)
