"""The training loop."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flamingo.language.loss import sum_of_losses
from flamingo.model import Flamingo
from flamingo.processor import Batch, Processor
from flamingo.training import checkpoint, interrupt
from flamingo.training.bad import Bad, Tally
from flamingo.training.blocks import blocks as blocks_of
from flamingo.training.blocks import recomputed, shard
from flamingo.training.config import DatasetConfig, TrainingConfig
from flamingo.training.data import Stream, count_targets, expect_same_data, split
from flamingo.training.features import FeatureStore
from flamingo.training.lock import locked
from flamingo.training.log import RunLog
from flamingo.training.optimizer import TrainedWeights, learning_rate, make_optimizer, store_as
from flamingo.training.processes import device_of, gather, rank, say, sum_over_processes, world_size


def train(
    model: nn.Module,
    processor: Processor,
    config: TrainingConfig,
    *,
    blocks: Sequence[nn.Module] | None = None,
) -> Path | None:
    """Trains the parameters of a model that take a gradient, from the latest checkpoint or from the start.

    Each update is by one batch of every dataset::

        loss = sum over datasets of weight * mean over the batch's tokens of -log p(token | before it, images)

    Several processes (torchrun) share each batch and the parameters, by FSDP2.

    Args:
        model: a `Flamingo`, `freeze()`d, or any module called as one that returns an object with `logits`. It
            may be patched. It is changed: trained, moved to the device, with `config.bfloat16` rounded, and
            sharded where there are several processes.
        processor: of documents to tensors, of the model's image size and tokens.
        config: the run.
        blocks: what is sharded and recomputed as one; of a `Flamingo` its resampler, gated blocks and layers
            of the language model.

    Returns:
        The last checkpoint; None if `config.steps` is 0.

    Raises:
        ValueError: if no parameter takes a gradient, a batch cannot be shared out, another process writes to
            the folder, the checkpoint to continue is of another model or other data, or all are damaged.
        FileNotFoundError: if there are no shards.
        DataError: if a shard is damaged, or more of a dataset's samples are bad than `config.max_bad`.
        FloatingPointError: if a gradient is not finite; the weights are those before it.

    Ctrl-C ends it by a KeyboardInterrupt after the update that is being made, which is saved.

    Determinism: on a CPU, a run that was killed and started again gives the same losses and weights to the
    bit, with the same number of processes and threads and the same kernels; another number of processes sees
    the same samples.

    Limits: every process builds the whole model before it is sharded, and one gathers all trained weights to
    save them.

    Source: arXiv 2204.14198, section 2.4 and appendix B.1.2.

    >>> import tempfile
    >>> from PIL import Image
    >>> from flamingo.training import Pairs, pair_sample, read_log, write_shards
    >>> model = Flamingo(FlamingoConfig.preset("tiny")).freeze()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     samples = [pair_sample(Image.new("RGB", (9, 9), c), f"a {c} square") for c in ("red", "blue")]
    ...     _ = write_shards(f"{folder}/squares", samples)
    ...     squares = Pairs(name="squares", shards=(f"{folder}/squares/*.tar",), batch_size=2)
    ...     run = TrainingConfig(folder=f"{folder}/run", datasets=(squares,), steps=3, workers=0)
    ...     checkpoint = train(model, Processor(image_size=32), run)
    ...     len(read_log(f"{folder}/run")), sorted(path.name for path in checkpoint.iterdir())
    (3, ['optimizer.safetensors', 'state.pt', 'weights.safetensors'])
    """
    with ExitStack() as stack:
        if rank() == 0:
            stack.enter_context(locked(Path(config.folder)))
        run = _Run(model, processor, config, blocks, stack)
        return run.to_the_end()


class _Run:
    """A model on its device, and everything that changes from update to update."""

    def __init__(
        self,
        model: nn.Module,
        processor: Processor,
        config: TrainingConfig,
        blocks: Sequence[nn.Module] | None,
        stack: ExitStack,
    ):
        self.model = model
        self.config = config
        self.folder = Path(config.folder)
        self.device = device_of(config.device)
        self.features = {
            dataset.name: FeatureStore(dataset, model, processor, config)
            for dataset in config.datasets
            if dataset.features is not None
        }
        self.weights = self._place(blocks, stack)
        stack.callback(self.weights.release)
        self.optimizer = make_optimizer(self.weights.by_name, config)
        states: dict[str, Any] = {}
        self.step = 0
        self.saved = checkpoint.latest(self.folder / "checkpoints", partial(say, "train"))
        if self.saved is not None:
            say("train", f"goes on from {self.saved}")
            self.step, states = checkpoint.load(self.saved, self.weights.by_name, self.optimizer)
            expect_same_data(config, states)
            self.weights.publish()
        self.streams = {
            dataset.name: self._stream(dataset, processor, states.get(dataset.name))
            for dataset in config.datasets
        }
        self.tallies = {
            dataset.name: Tally(dataset.name, config.max_bad, states.get(dataset.name))
            for dataset in config.datasets
        }
        self.log = (
            stack.enter_context(
                RunLog(self.folder, step=self.step, steps=config.steps, tensorboard=config.tensorboard)
            )
            if rank() == 0
            else None
        )

    def _place(self, blocks: Sequence[nn.Module] | None, stack: ExitStack) -> TrainedWeights:
        """Moves, rounds, recomputes and shards the model, in the order in which these fit into each other."""
        model, config = self.model, self.config
        model.to(self.device)
        model.train()
        for part in model.modules():
            parameters = list(part.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                part.eval()
        several = world_size() > 1
        units = list(blocks or blocks_of(model)) if several or config.gradient_checkpointing else []
        if config.gradient_checkpointing:
            stack.enter_context(recomputed(units))
        if several:
            if config.bfloat16:
                store_as(torch.float32, (p for p in model.parameters() if p.requires_grad))
                store_as(torch.bfloat16, (p for p in model.parameters() if not p.requires_grad))
            shard(model, units, bfloat16=config.bfloat16)
        return TrainedWeights(model, bfloat16=config.bfloat16 and not several)

    def _stream(self, dataset: DatasetConfig, processor: Processor, state: Any) -> Stream:
        config = self.config
        return Stream(
            dataset,
            processor,
            seed=config.seed,
            at_once=config.shards_at_once,
            state=state,
            rank=rank(),
            world_size=world_size(),
            workers=config.workers,
            pin_memory=self.device.type == "cuda",
            features=self.features.get(dataset.name),
        )

    def to_the_end(self) -> Path | None:
        config = self.config
        with interrupt.noticed() as interrupted:
            while self.step < config.steps:
                numbers, bad = self.update()
                if self.log is not None:
                    self.log.write(self.step, numbers, bad)
                stop = self.anywhere(interrupted())
                if stop or self.step % config.checkpoint_every == 0 or self.step == config.steps:
                    self.save()
                if stop and self.step < config.steps:
                    raise KeyboardInterrupt(
                        f"stopped after update {self.step} of {config.steps}, which is saved in "
                        f"{self.saved}. Start it again to go on."
                    )
        return self.saved

    def anywhere(self, happened: bool) -> bool:
        """Whether it happened in any of the processes."""
        return bool(sum_over_processes(torch.tensor([int(happened)], device=self.device)).item())

    def update(self) -> tuple[dict[str, float], list[Bad]]:
        """One update, and what there is to report of it: numbers, and samples that were left out."""
        config, began = self.config, time.perf_counter()
        batches = {dataset: next(self.streams[dataset.name]).to(self.device) for dataset in config.datasets}
        bad = self.count_bad()
        losses = accumulate_gradients(self.model, batches, bfloat16=config.bfloat16)
        norm = nn.utils.clip_grad_norm_(self.weights.by_name.values(), config.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not norm.isfinite():
            raise FloatingPointError(
                f"train: expected a finite gradient, got a norm of {norm.item()} in update {self.step + 1}."
            )
        rate = learning_rate(self.step + 1, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.weights.publish()
        self.step += 1
        numbers = {f"loss/{dataset.name}": loss.item() for dataset, loss in losses.items()}
        return {
            "loss": sum(dataset.weight * numbers[f"loss/{dataset.name}"] for dataset in config.datasets),
            **numbers,
            "gradient norm": norm.item(),
            "learning rate": rate,
            **{f"bad/{name}": tally.bad for name, tally in self.tallies.items()},
            "seconds": time.perf_counter() - began,
        }, bad

    def count_bad(self) -> list[Bad]:
        """Counts the samples of all processes' batches, and returns those that are bad."""
        local = [self.streams[dataset.name].bad for dataset in self.config.datasets]
        number = torch.tensor([sum(map(len, local))], device=self.device)
        everywhere = gather(local) if sum_over_processes(number).item() else [local]
        found: list[Bad] = []
        for index, dataset in enumerate(self.config.datasets):
            bad = [Bad(*each) for process in everywhere for each in process[index]]
            epoch = self.streams[dataset.name].state["position"][0]
            self.tallies[dataset.name].add(dataset.batch_size, bad, epoch)
            found += bad
        return found

    def save(self) -> None:
        states = {name: stream.state | self.tallies[name].state for name, stream in self.streams.items()}
        self.saved = checkpoint.save(
            self.folder / "checkpoints",
            self.step,
            self.weights.by_name,
            self.optimizer,
            states,
            keep=self.config.keep,
        )


def accumulate_gradients(
    model: nn.Module, batches: Mapping[DatasetConfig, Batch], *, bfloat16: bool = False
) -> dict[DatasetConfig, Tensor]:
    """Adds to the gradients those of the weighted sum of the datasets' losses, one batch after the other.

    Args:
        model: see `train`.
        batches: this process's share of a batch of each dataset.
        bfloat16: whether the model takes its pixels in bfloat16.

    Returns:
        The loss of each dataset, float32: the mean over the tokens of all processes.
    """
    device = next(iter(batches.values())).labels.device
    targets = torch.tensor(
        [count_targets(batch) for batch in batches.values()], dtype=torch.float32, device=device
    )
    targets = sum_over_processes(targets)
    losses = torch.zeros_like(targets)
    for index, (dataset, batch) in enumerate(batches.items()):
        for part in split(batch, dataset.micro_batch_size):
            loss = _sum_of_losses(model, part, bfloat16) / targets[index]
            losses[index] += loss.detach()
            # FSDP takes the mean over processes.
            (dataset.weight * world_size() * loss).backward()
    return dict(zip(batches, sum_over_processes(losses), strict=True))


def _sum_of_losses(model: nn.Module, batch: Batch, bfloat16: bool) -> Tensor:
    """The losses of all tokens that are learned, added in float32 or wider."""
    dtype = torch.bfloat16 if bfloat16 else next(model.parameters()).dtype
    given: dict[str, Any] = {"num_frames": batch.num_frames, "media_starts": batch.media_starts}
    gives_loss = type(model).forward is Flamingo.forward
    if gives_loss:  # within its forward, around which FSDP's hooks stand
        given |= {"labels": batch.labels, "loss_only": True, "reduction": "sum"}
    output = model(batch.input_ids, batch.pixels.to(dtype), batch.attention_mask, **given)
    return output.loss if gives_loss else sum_of_losses(output.logits, batch.labels)
