"""What lies in a folder of a transformers' model: its JSON, and its weights, all of them or none."""

from importlib import import_module
from pathlib import Path
from typing import Any

from flamingo.json_lines import parse


def load_whole(kind: Any, name: str, **options: Any) -> Any:
    """`kind.from_pretrained(name)`, which would draw at random what a checkpoint lacks; this refuses it.

    Args:
        kind: a class of transformers, as `CLIPVisionModel` or `AutoModelForCausalLM`.
        name: a checkpoint's name on the hub, or its folder.
        options: for `from_pretrained`.

    Raises:
        ValueError: if the checkpoint lacks weights.
    """
    logging = import_module("transformers").logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of what is missing is many lines
    try:
        model, found = kind.from_pretrained(name, output_loading_info=True, **options)
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(
            f"{name}: expected all weights of a {type(model).__name__}, got none for {len(missing)} of them "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}). Download or save it again."
        )
    return model


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of JSON.

    Raises:
        ValueError: if it is none.
    """
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object of JSON, got {type(found).__name__}.")
    return found
