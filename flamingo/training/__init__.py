"""Training of a Flamingo's new parameters, on tar shards, by one process or many.

config      every choice of a run, with the paper's values
shards      tar shards of documents, pairs and clips
braces      names of shards as a shell expands them
tar         what lies where in a tar file
order       the order of samples, and how a run finds its place in it
layouts     a document's json: ours, MMC4's, OBELICS'
files       a sample's images, videos and captions, wherever they are
samples     files of a sample to a document
bad         samples that cannot be read, counted
features    what the frozen vision encoder made of images and clips
encoding    and how it is made, once
augment     images mirrored and recoloured at random
data        documents to batches
optimizer   AdamW on float32 weights
blocks      what is sharded and recomputed as one
processes   one process or several
checkpoint  what is saved, and how it survives a kill
damage      whether a checkpoint is whole
log         progress bar, JSON lines, TensorBoard
loop        one update after the other
towers      the frozen parts that a run names
preflight   what would end a run later, looked for before it begins
lock        one run in a folder at a time
interrupt   Ctrl-C, between two updates
command     python -m flamingo train, and the model of a run
"""

from flamingo.training.bad import DataError
from flamingo.training.checkpoint import load_weights
from flamingo.training.command import load_run
from flamingo.training.config import Clips, Documents, ModelConfig, Pairs, TrainingConfig
from flamingo.training.encoding import encode
from flamingo.training.log import read_log
from flamingo.training.loop import train
from flamingo.training.shards import clip_sample, document_sample, pair_sample, write_shards

__all__ = [
    "Clips",
    "DataError",
    "Documents",
    "ModelConfig",
    "Pairs",
    "TrainingConfig",
    "clip_sample",
    "document_sample",
    "encode",
    "load_run",
    "load_weights",
    "pair_sample",
    "read_log",
    "train",
    "write_shards",
]
