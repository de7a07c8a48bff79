"""`python -m flamingo train`: a run from a file."""

import sys
from importlib import import_module
from pathlib import Path

import torch
from torch import distributed, nn

from flamingo.config import FlamingoConfig
from flamingo.model import Flamingo
from flamingo.processor import Processor
from flamingo.training.config import ModelConfig, TrainingConfig
from flamingo.training.loop import train
from flamingo.training.processes import device_of, leave, process_group, rank


def run(path: str) -> int:
    """Trains as a TOML file says and returns the command's exit status."""
    try:
        config = TrainingConfig.from_toml(path)
        if config.model is None:
            raise ValueError(f"{path}: expected a table [model], got none.")
    except (OSError, ValueError) as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    with process_group(device_of(config.device)):
        torch.manual_seed(config.seed)
        model = build(config.model)
        saved = train(model, Processor(image_size=model.config.image_size), config)
        if rank() == 0:
            print(f"{config.steps} steps done, the last checkpoint is {saved}")
    if distributed.is_torchelastic_launched():
        leave()
    return 0


def build(config: ModelConfig) -> Flamingo:
    """A frozen Flamingo with its frozen parts' weights; says which of them are random."""
    model = Flamingo(FlamingoConfig.preset(config.preset, **config.changes)).freeze()
    for name, path in (("vision", config.vision_weights), ("language", config.language_weights)):
        part: nn.Module = getattr(model, name)
        if path is not None:
            part.load_state_dict(import_module("safetensors.torch").load_file(Path(path)))
        elif rank() == 0:
            print(f"train: {name} has random weights, as {name}_weights is not given", file=sys.stderr)
    return model
