"""What a run leaves besides its answers: its result, and answers for a server that measures."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flamingo.fewshot.benchmarks import Benchmark
from flamingo.fewshot.prompts import Sample
from flamingo.json_lines import parse_line


def refuse_foreign(path: Path, is_own: Callable[[Any], bool]) -> None:
    """Leaves a file alone that is not of the kind that would be written over it.

    Args:
        path: that will be written.
        is_own: whether JSON that is there already is of that kind.

    Raises:
        ValueError: if the file is there and something else, or its folder is not there.
    """
    if not path.parent.is_dir():
        raise ValueError(f"expected the folder of {path}, got none. Make it first.")
    if path.exists() and not (path.is_file() and is_own(parse_line(path.read_bytes()))):
        raise ValueError(
            f"expected {path} to be new or of a run like this, got something else, which is left as it is. "
            "Name another file."
        )


def is_result(found: Any) -> bool:
    """Whether JSON is the result of a run."""
    return isinstance(found, dict) and {"task", "metric", "value", "settings"} <= {*found}


def is_upload(found: Any, benchmark: Benchmark) -> bool:
    """Whether JSON is of the form in which a benchmark's answers are written."""
    if benchmark.upload_keys is None:
        return isinstance(found, dict) and all(isinstance(each, str) for each in found.values())
    keys = {*benchmark.upload_keys}
    return isinstance(found, list) and all(isinstance(each, dict) and {*each} == keys for each in found)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON as a whole: a crash leaves what was there."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def read_answers(output: Path) -> list[dict[str, Any]]:
    """The records of a run's output that have an answer."""
    with output.open("rb") as file:
        records = [parse_line(line) for line in [*file][1:]]
    return [record for record in records if isinstance(record, dict) and "prediction" in record]


def write_upload(path: Path, output: Path, benchmark: Benchmark, queries: Sequence[Sample]) -> None:
    """Writes a run's answers in the form of the server that measures them.

    A server wants every question, so one whose image could not be read has an empty answer. A ranking that
    was not made is left out.
    """
    found = {record["id"]: record for record in read_answers(output)}
    if not benchmark.task.closed:
        blank = {query.id: {"id": query.id, "prediction": "", "details": query.details} for query in queries}
        found = blank | found
    write_json(path, benchmark.upload([found[query.id] for query in queries if query.id in found]))
