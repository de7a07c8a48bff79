"""Patched models in use: trained, copied, forked, shared by threads, and changed between two texts."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.func import functional_call
from torch.utils.data import DataLoader, Dataset

from flamingo import Flamingo, FlamingoConfig
from flamingo_kernels import _kept, patch
from flamingo_kernels.testing import assert_all_passed, tiny
from tests.helpers import third_party
from tests.helpers.families import TEXT, VISUAL, cross_attention
from tests.helpers.parity import measure
from tests.helpers.same import assert_same
from tests.helpers.weights import randomise

transformers = pytest.importorskip("transformers")

SIZES = tiny.Sizes(batch=2, text=14, images=3, width=32, heads=4, layers=4, visual=16, latents=5)


class TestTrainer:
    """`transformers.Trainer(bf16=True)`: float32 weights, all products under autocast."""

    STEPS = 3

    def run(self, built, folder, model, **options):
        """The loss of each step, and all weights at the end."""
        pytest.importorskip("accelerate")
        inputs = dict(built.inputs, labels=built.tokens)
        samples = [{name: x[n] for name, x in inputs.items()} for n in range(SIZES.batch)]
        settings = transformers.TrainingArguments(
            folder,
            max_steps=self.STEPS,
            per_device_train_batch_size=SIZES.batch,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            **options,
        )
        trainer = transformers.Trainer(model, settings, train_dataset=samples)
        trainer.train()
        losses = [step["loss"] for step in trainer.state.log_history if "loss" in step]
        weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        return {"losses": torch.tensor(losses), "weights": weights}

    @pytest.mark.parametrize("name", ["mllama-tiny", pytest.param("idefics-tiny", marks=pytest.mark.slow)])
    @pytest.mark.filterwarnings("ignore")
    def test_in_bfloat16_as_without_patch(self, name, tmp_path):
        """By the error budget, against a run in float32, which is exact beside bfloat16."""
        built = tiny.build(name, SIZES)

        def plain():
            return self.run(built, tmp_path, copy.deepcopy(built.model), bf16=True)

        exact = self.run(built, tmp_path, copy.deepcopy(built.model))
        fused = copy.deepcopy(built.model)
        patch(fused)
        kernel = self.run(built, tmp_path, fused, bf16=True)
        assert len(kernel["losses"]) == self.STEPS
        assert kernel["losses"][-1] < kernel["losses"][0]
        exact = {key: value.double() for key, value in exact.items()}
        assert_all_passed(measure(kernel, plain, exact), name)


class Attended(Dataset):
    """What a block makes of text, computed where a sample is asked for."""

    def __init__(self, block):
        self.block, self.media = block, torch.randn(2, 2, 5, VISUAL)
        self.x, self.locations = torch.randn(2, 64, TEXT), torch.rand(2, 64) < 0.1

    def __len__(self):
        return 3

    @torch.no_grad()
    def __getitem__(self, index):
        return self.block(self.x + index, self.media, self.locations)


def test_a_worker_forked_after_a_kernel_ran(set_threads):
    """Threads do not survive a fork, so one that waited for them would wait for ever."""
    set_threads(2)
    block = cross_attention("flamingo")
    patch(block)
    samples = Attended(block)
    expected = [samples[n] for n in range(len(samples))]
    loader = DataLoader(samples, batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60)
    for ours, theirs in zip(loader, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def flamingo(seed=0):
    """The reference, patched, and what it says to a document."""
    model = randomise(Flamingo(FlamingoConfig.preset("tiny")), std=0.2)
    patch(model)

    def say(model, n):
        pixels = torch.randn(1, 1, 1, 3, 32, 32, generator=torch.Generator().manual_seed(n))
        prompt = torch.tensor([[65 + n, 256, 66]])
        return model.generate(prompt, pixels, max_new_tokens=4), model(prompt, pixels).logits

    return model, say


def transformer(name):
    """A model of transformers, patched, and what it says to a document."""
    built = tiny.build(name, SIZES)
    patch(built.model)

    def say(model, n):
        media = "protein_input_ids" if name == "evolla-tiny" else "pixel_values"
        inputs = {**built.inputs, media: built.inputs[media].roll(n, 0 if n % 2 else 1)}
        options = {"output_logits": True, "return_dict_in_generate": True}
        out = tiny.TinyModel(name, model, inputs).generate(3, **options)
        return out.sequences, *out.logits

    return built.model, say


MODELS = {
    "flamingo": flamingo,
    "idefics": lambda: transformer("idefics-tiny"),
    "mllama": lambda: transformer("mllama-tiny"),
    "evolla": lambda: transformer("evolla-tiny"),
}
models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


@models
@torch.no_grad()
def test_eight_threads_on_one_model(make):
    model, say = make()
    alone = [say(model, n) for n in range(4)]
    assert not torch.equal(alone[0][-1], alone[1][-1])
    with ThreadPoolExecutor(8) as pool:
        for n, answer in enumerate(pool.map(torch.no_grad()(lambda n: say(model, n % 4)), range(24))):
            assert_same(answer, alone[n % 4])


@models
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_that_has_generated(make, duplicate):
    model, say = make()
    expected = say(model, 0)
    again = duplicate(model)
    assert_same(say(again, 0), expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data.mul_(0.5)
    assert_same(say(again, 0), expected)
    assert not torch.equal(say(model, 0)[-1], expected[-1])


def merge_lora(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    peft.get_peft_model(model, config).merge_and_unload()


def noise(parameter):
    return torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))


def average(model):
    for parameter in model.parameters():
        parameter.data.copy_(0.8 * parameter.data + 0.1 * noise(parameter))


def refill(model):
    for parameter in model.parameters():
        parameter.detach().numpy()[:] += 0.1 * noise(parameter).numpy()


def load(model):
    model.load_state_dict({name: 1.2 * x for name, x in model.state_dict().items()}, assign=True)


class TestHeldFeatures:
    """Features of images that a caller encodes once, for texts before and after a change of the weights."""

    def inputs(self, length):
        ids = torch.randint(2, 60, (2, length), generator=torch.Generator().manual_seed(3))
        features = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(4))
        if third_party.transformers_version() >= (5, 24):  # which has no axis of images there
            features = features.flatten(0, 1)
        seen = torch.ones(2, length, 3, dtype=torch.long)
        return {"input_ids": ids, "perceiver_embeddings": features, "image_attention_mask": seen}

    def pair(self):
        model = tiny.build("idefics-tiny", SIZES).model
        fused = copy.deepcopy(model)
        patch(fused)
        return model, fused

    @torch.no_grad()
    def compare(self, model, fused, inputs):
        logits = [each(**inputs, use_cache=False).logits for each in (model, fused)]
        torch.testing.assert_close(*reversed(logits), rtol=1e-3, atol=1e-4)
        return logits[0]

    @pytest.mark.parametrize("length", [1, 9])
    @pytest.mark.parametrize("change", [merge_lora, average, refill, load])
    @pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
    def test_the_next_text_sees_the_new_weights(self, change, length):
        model, fused = self.pair()
        inputs = self.inputs(length)
        before = self.compare(model, fused, inputs)
        with torch.no_grad():
            change(model), change(fused)
        after = self.compare(model, fused, inputs)
        assert not torch.allclose(before, after, atol=1e-2)

    @torch.no_grad()
    def test_weights_that_live_for_one_call(self):
        model, fused = self.pair()
        inputs = {**self.inputs(9), "use_cache": False}
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            weights = {
                name: weight + 0.1 * torch.randn(weight.shape, generator=generator)
                for name, weight in model.state_dict().items()
                if name in dict(model.named_parameters())
            }
            theirs, ours = (
                functional_call(each, weights, (), inputs, tie_weights=False).logits
                for each in (model, fused)
            )
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)

    @torch.no_grad()
    def test_of_all_that_are_held_the_newest_are_kept(self):
        _, fused = self.pair()
        held = [self.inputs(9) for _ in range(4)]
        vars(_kept._threads).clear()
        for inputs in held:
            fused(**inputs, use_cache=False)
        blocks = sum(type(module).__name__ == "IdeficsGatedCrossAttentionLayer" for module in fused.modules())
        kept = vars(_kept._threads)["kept"]
        assert sum(map(len, kept.values())) == blocks > 0
        del held, inputs
        assert sum(map(len, kept.values())) == 0
