"""The demo's model in a file."""

from importlib import import_module
from pathlib import Path

from flamingo.demo.stages import CONFIG, make_processor
from flamingo.model import Flamingo
from flamingo.processor import Processor


def save_model(model: Flamingo, path: str | Path) -> None:
    """Writes all weights of the demo's model, safetensors.

    Raises:
        ImportError: without safetensors.
    """
    import_module("safetensors.torch").save_file(model.state_dict(), path)


def load_model(path: str | Path = "digits.safetensors") -> tuple[Flamingo, Processor]:
    """The model that `python -m flamingo demo` has trained and saved, in eval mode, and its processor.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: without safetensors.
    """
    model = Flamingo(CONFIG)
    model.load_state_dict(import_module("safetensors.torch").load_file(path))
    return model.eval(), make_processor()
