"""Files of tensors that are whole or not there."""

import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str]) -> None:
    """Writes safetensors beside a path, and gives them its name once they are whole.

    Raises:
        ImportError: without safetensors.
        OSError: if they cannot be written, as on a full disk; what was there stays.
    """
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        import_module("safetensors.torch").save_file(dict(tensors), unfinished, metadata=dict(metadata))
    except import_module("safetensors").SafetensorError as error:
        raise OSError(f"{path}: expected to write tensors, got: {error}.") from error
    os.replace(unfinished, path)
