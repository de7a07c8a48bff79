"""Runs with towers from folders: CLIP, SigLIP, language models, OpenFlamingo's checkpoints."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flamingo import Flamingo, FlamingoConfig, PretrainedLanguage, PretrainedVision, complete
from flamingo.__main__ import main
from flamingo.training import ModelConfig, load_run, read_log
from flamingo.training.towers import build
from tests.flamingo.language import test_mpt_1b
from tests.flamingo.training.test_resume import assert_same_run, toml
from tests.helpers.scripted import picture, write_vqa
from tests.helpers.weights import randomise

pytest.importorskip("transformers")
from tests.helpers import tower_folders

PROMPT = [[picture("white"), "a white", picture("black"), "a"]]


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """The folder of a tower by its kind; not to be changed."""
    folder = tmp_path_factory.mktemp("towers")
    for kind in ("clip", "siglip"):
        tower_folders.write_vision(folder / kind, kind)
    for family in ("opt", "llama", "mpt"):
        tower_folders.write_language(folder / family, family)
    return folder


def write_run(data, folder: Path, vision, language, *, more="", encoded=False, **changes) -> Path:
    """The file of a run with towers."""
    text = toml(data, folder / "run", **changes).partition("[model]")[0]
    if encoded:
        text = text.replace("length = ", f"flip = 0\ncolour = 0\nfeatures = '{folder}/features'\nlength = ")
    folder.mkdir(exist_ok=True)
    model = f"[model]\npreset = 'tiny'\nvision = '{vision}'\nlanguage = '{language}'\n{more}\n"
    (folder / "run.toml").write_text(text + model)
    return folder / "run.toml"


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints/latest/weights.safetensors")


@pytest.mark.parametrize(
    ("vision", "language", "kernels", "bfloat16"),
    [("clip", "opt", False, False), ("siglip", "llama", True, True), ("clip", "mpt", False, True)],
)
class TestRuns:
    def test_a_run_is_trained_continued_evaluated_and_completes(
        self, data, towers, tmp_path, capsys, vision, language, kernels, bfloat16
    ):
        parts = (towers / vision, towers / language)
        shared = {"kernels": kernels, "bfloat16": bfloat16, "checkpoint_every": 2}
        whole = write_run(data, tmp_path / "whole", *parts, steps=4, **shared)
        assert main(["train", str(whole)]) == 0
        assert "random weights" not in capsys.readouterr().err
        for steps in (2, 4):
            halves = write_run(data, tmp_path / "halves", *parts, steps=steps, **shared)
            assert main(["train", str(halves)]) == 0
        assert_same_run(tmp_path / "whole/run", tmp_path / "halves/run")
        saved = weights_of(tmp_path / "whole/run")
        assert {name.split(".")[0] for name in saved} == {"resampler", "cross_attn", "language"}
        assert {name for name in saved if name.startswith("language")} <= {
            "language.new_tokens.embedding",
            "language.new_tokens.head",
        }

        torch.manual_seed(0)  # as the run
        untrained = dict(built(*parts)[0].named_parameters())
        assert not any(torch.equal(value, untrained[name]) for name, value in saved.items())

        model, processor = load_run(whole)
        tokenizer = processor.tokenizer
        assert model.config.media_token_id == tokenizer.image_id
        assert model.config.vocab_size == tokenizer.vocab_size == len(tokenizer.tokenizer)
        assert tokenizer.encode("<EOC>") == [tokenizer.eoc_id]
        for name, value in saved.items():
            assert torch.equal(model.get_parameter(name), value)
        (text,) = complete(model, processor, PROMPT, max_new_tokens=4)
        assert isinstance(text, str)

        paths = write_vqa(tmp_path / "vqa", ["white", "black"])
        files = [f"--{prefix}{name}={path}" for prefix in ("", "support-") for name, path in paths.items()]
        how = ["--model", str(whole), "--output", str(tmp_path / "answers"), "--shots", "1"]
        assert main(["evaluate", "vqa", *files, *how]) == 0
        assert "(2 samples, 1 shots)" in capsys.readouterr().out


class TestModels:
    def test_frozen_weights_and_pixels_are_the_folders(self, towers):
        model, processor = built(towers / "siglip", towers / "llama")
        assert isinstance(model.vision, PretrainedVision)
        assert isinstance(model.language, PretrainedLanguage)
        assert (processor.fit, processor.image_size) == ("stretch", tower_folders.SIDE)
        assert processor.mean.flatten().tolist() == [0.5] * 3
        saved = load_file(towers / "llama/model.safetensors")
        frozen = dict(model.language.model.named_parameters())
        assert {name for name in saved if torch.equal(frozen[name], saved[name])} == saved.keys()
        assert not any(weight.requires_grad for weight in frozen.values())
        vision = load_file(towers / "siglip/model.safetensors")
        ours = {name.removeprefix("vision_model."): x for name, x in model.vision.tower.named_parameters()}
        assert all(torch.equal(value, vision[f"vision_model.{name}"]) for name, value in ours.items())
        trained = {name.rpartition(".")[0] for name, x in model.named_parameters() if x.requires_grad}
        assert "language.new_tokens" in trained

    def test_rows_that_no_token_needs_are_cut_off(self, towers, tmp_path):
        folder = tower_folders.write_language(tmp_path / "wide", "llama", rows=320)
        model, processor = built(towers / "clip", folder)
        assert model.config.vocab_size == processor.tokenizer.vocab_size == 261
        assert model.language.model.get_input_embeddings().num_embeddings == 261
        assert sorted(model.language.new_tokens.ids.tolist()) == [258, 259]

    def test_mpt_1b(self, data, towers, tmp_path):
        folder = tmp_path / "mpt_1b"
        tower_folders.by_bytes().save_pretrained(folder)
        state = test_mpt_1b.weights() | {"transformer.wte.weight": torch.randn(264, test_mpt_1b.DIM)}
        test_mpt_1b.save(folder, state, vocab_size=264)
        path = write_run(data, tmp_path, towers / "clip", folder, steps=1)
        assert main(["train", str(path)]) == 0
        model, _ = load_run(path)
        rows = model.language.model.get_input_embeddings().weight
        assert torch.equal(rows, state["transformer.wte.weight"][:261])

    def test_tokens_that_are_there_are_not_added_again(self, towers, tmp_path):
        folder = tower_folders.write_language(tmp_path / "known", "llama", rows=261)
        tokenizer = tower_folders.by_bytes()
        tokenizer.add_tokens(["<image>", "<|endofchunk|>", "<PAD>"], special_tokens=True)
        tokenizer.pad_token = "<PAD>"
        tokenizer.save_pretrained(folder)
        model, processor = built(towers / "clip", folder)
        assert (processor.tokenizer.image_id, processor.tokenizer.eoc_id) == (258, 259)
        assert model.language.new_tokens.ids.tolist() == [258, 259]

    def test_one_tower_may_be_a_folder_and_the_other_of_the_preset(self, towers):
        model, processor = build(ModelConfig(preset="tiny", vision=str(towers / "clip")), print)
        assert processor.fit == "crop"
        assert processor.tokenizer.vocab_size == model.config.vocab_size == 261
        model, processor = build(ModelConfig(preset="tiny", language=str(towers / "opt")), print)
        assert (processor.fit, processor.image_size) == ("pad", 32)


def built(vision, language, **more):
    return build(ModelConfig(preset="tiny", vision=str(vision), language=str(language), **more), print)


class TestFeatures:
    @pytest.fixture
    def run(self, data, towers, tmp_path):
        """A run whose features a CLIP of its own has made."""
        shutil.copytree(towers / "clip", tmp_path / "clip")
        path = write_run(data, tmp_path, tmp_path / "clip", towers / "opt", encoded=True, steps=1)
        assert main(["encode", str(path)]) == 0
        return path

    def test_they_are_made_once_and_trained_with(self, run, capsys):
        capsys.readouterr()
        assert main(["encode", str(run)]) == 0
        assert capsys.readouterr().out.startswith("0 images and clips encoded")
        assert main(["train", str(run)]) == 0
        assert len(read_log(run.parent / "run")) == 1

    @pytest.mark.parametrize("kernels", ["true", "false"])
    def test_the_kernels_do_not_matter(self, run, kernels, capsys):
        run.write_text(f"kernels = {kernels}\n" + run.read_text())
        capsys.readouterr()
        assert main(["encode", str(run)]) == 0
        assert capsys.readouterr().out.startswith("0 images and clips encoded")

    @pytest.mark.parametrize(
        ("file", "change", "message"),
        [
            ("config.json", lambda found: found["vision_config"].update(hidden_act="relu"), "encoder"),
            ("config.json", lambda found: found["vision_config"].update(num_attention_heads=4), "encoder"),
            ("model.safetensors", None, "encoder"),
            ("preprocessor_config.json", lambda found: found.update(resample=2), "preprocessing"),
            ("preprocessor_config.json", lambda found: found["image_mean"].reverse(), "preprocessing"),
            ("preprocessor_config.json", lambda found: found.update(do_center_crop=False, size=32), "prep"),
        ],
        ids=["activation", "heads", "weights", "resample", "mean", "crop"],
    )
    def test_those_of_another_tower_are_refused(self, run, file, change, message, capsys):
        path = run.parent / "clip" / file
        if change is None:
            state = load_file(path)
            state["vision_model.encoder.layers.0.mlp.fc1.bias"] += 1
            save_file(state, path, metadata={"format": "pt"})
        else:
            found = json.loads(path.read_text())
            change(found)
            path.write_text(json.dumps(found))
        assert main(["train", str(run)]) == 2
        assert f"expected features of this run's {message}" in capsys.readouterr().err.splitlines()[-1]


class TestOpenFlamingo:
    """A checkpoint as open_flamingo lays one out: see test_open_flamingo for those that it writes itself."""

    CHANGES = {
        "resampler_dim": 24,
        "resampler_depth": 2,
        "num_latents": 8,
        "cross_attn_every": 2,
        "cross_attn_first": 1,
    }

    def config(self, towers, **more):
        config = ModelConfig(
            preset="openflamingo-9b",
            changes=self.CHANGES,
            vision=str(towers / "clip"),
            language=str(towers / "llama"),
        )
        return replace(config, **more)

    @pytest.fixture
    def checkpoint(self, towers, tmp_path):
        """Random weights in a file, and the model that has them."""
        torch.manual_seed(3)
        model, _ = build(self.config(towers), print)
        randomise(model.resampler)
        randomise(model.cross_attn)
        state = {f"perceiver.{name}": value for name, value in model.resampler.state_dict().items()}
        for layer, block in model.cross_attn.items():
            prefix = f"lang_encoder.model.layers.{layer}.gated_cross_attn_layer."
            state |= {prefix + name: value for name, value in block.state_dict().items()}
        state["lang_encoder.model.embed_tokens.weight"] = torch.randn(261, model.language.dim)
        tuned = "model.layers.0.self_attn.q_proj.weight"
        state[f"lang_encoder.{tuned.replace('.self', '.decoder_layer.self')}"] = torch.randn(32, 32)
        torch.save(state, tmp_path / "checkpoint.pt")
        return tmp_path / "checkpoint.pt"

    def write(self, data, towers, folder, checkpoint, steps):
        path = write_run(data, folder, towers / "clip", towers / "llama", steps=steps)
        changes = ", ".join(f"{name} = {value}" for name, value in self.CHANGES.items())
        text = path.read_text().replace("preset = 'tiny'", "preset = 'openflamingo-9b'")
        path.write_text(f"{text}checkpoint = '{checkpoint}'\nchanges = {{ {changes} }}\n")
        return path

    def test_it_is_evaluated_without_training_and_trained_on(self, data, towers, tmp_path, checkpoint):
        path = self.write(data, towers, tmp_path, checkpoint, steps=2)
        model, processor = load_run(path)
        state = torch.load(checkpoint, weights_only=True)
        assert torch.equal(model.resampler.latents, state["perceiver.latents"])
        rows = state["lang_encoder.model.embed_tokens.weight"]
        assert torch.equal(model.language.model.get_input_embeddings().weight, rows[:258])
        assert torch.equal(model.language.new_tokens.embedding, rows[258:])
        tuned = model.language.model.model.layers[0].self_attn.q_proj.weight
        assert torch.equal(tuned, state["lang_encoder.model.layers.0.decoder_layer.self_attn.q_proj.weight"])
        assert len(complete(model, processor, PROMPT, max_new_tokens=2)) == 1

        assert main(["train", str(path)]) == 0
        trained, _ = load_run(path)
        assert not torch.equal(trained.resampler.latents, model.resampler.latents)
        tuned = trained.language.model.model.layers[0].self_attn.q_proj.weight
        assert torch.equal(tuned, state["lang_encoder.model.layers.0.decoder_layer.self_attn.q_proj.weight"])

    def test_one_that_does_not_fit_says_what(self, data, towers, tmp_path, checkpoint, capsys):
        state = torch.load(checkpoint, weights_only=True)
        torch.save(state | {"perceiver.frame_embs": torch.ones(2)}, checkpoint)
        path = self.write(data, towers, tmp_path, checkpoint, steps=2)
        assert refusal(path, capsys).startswith(
            f"train: {checkpoint}: expected the weights of an OpenFlamingo of this size, got 1 others "
            "['resampler.frame_embs'] and not 0 of them"
        )

    def test_code_in_one_is_not_run(self, data, towers, tmp_path, capsys):
        torch.save({"perceiver.latents": Path("any other object")}, tmp_path / "checkpoint.pt")
        path = self.write(data, towers, tmp_path, tmp_path / "checkpoint.pt", steps=2)
        assert "Weights only load failed" in refusal(path, capsys)


def refusal(path, capsys, command="train"):
    """The one line of a command that refuses a run, before it begins."""
    assert main([command, str(path)]) == 2
    said = capsys.readouterr().err
    assert "LOAD REPORT" not in said  # of transformers
    lines = [line for line in said.splitlines() if line.startswith(f"{command}: ")]
    assert said.endswith(f"{lines[-1]}\n")
    assert not Path(path.parent, "run/log.jsonl").exists()
    return lines[-1]


def without_a_weight(state):
    """One of the second layer, and not of CLIP's text."""
    name = next(name for name in state if "layers.1." in name and "text_model" not in name)
    return {other: weight for other, weight in state.items() if other != name}


def edited(folder, name, **changes):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TestMistakes:
    @pytest.fixture
    def own(self, towers, tmp_path):
        """Copies of a CLIP and a Llama, to be spoilt."""
        for kind in ("clip", "llama"):
            shutil.copytree(towers / kind, tmp_path / kind)
        return tmp_path

    @pytest.mark.parametrize("command", ["train", "encode"])
    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (
                lambda own: shutil.rmtree(own / "clip"),
                "expected vision to be a folder, got {own}/clip, which",
            ),
            (lambda own: shutil.rmtree(own / "llama"), "expected language to be a folder, got {own}/llama"),
            (
                lambda own: (own / "clip/config.json").unlink(),
                "{own}/clip: expected a model of transformers, got a folder without config.json",
            ),
            (
                lambda own: (own / "llama/config.json").write_text("{"),
                "{own}/llama/config.json: expected JSON, got: ",
            ),
            (
                lambda own: edited(own / "clip", "config.json", model_type="resnet"),
                "{own}/clip/config.json: expected model_type to be one of clip, clip_vision_model, siglip, "
                "siglip_vision_model, got 'resnet'",
            ),
            (
                lambda own: edited(own / "llama", "config.json", model_type="bert"),
                "{own}/llama/config.json: expected model_type to be one of llama, mistral, opt, gpt_neox",
            ),
            (
                lambda own: (own / "clip/preprocessor_config.json").unlink(),
                "{own}/clip: expected a preprocessor_config.json, which says",
            ),
            (
                lambda own: edited(
                    own / "clip", "preprocessor_config.json", size={"shortest_edge": 48}, crop_size=48
                ),
                "{own}/clip: expected preprocessor_config.json to make images of 32 pixels, as config.json "
                "says, got 48",
            ),
            (
                lambda own: (own / "llama/tokenizer.json").unlink(),
                "{own}/llama: expected the language model's tokenizer beside it, one of tokenizer.json, ",
            ),
        ],
    )
    def test_a_folder_that_is_wrong_is_refused_before_a_model(
        self, data, own, spoil, message, command, capsys, monkeypatch
    ):
        monkeypatch.setattr("flamingo.training.command.build", lambda *_: pytest.fail("a model was built"))
        spoil(own)
        path = write_run(data, own, own / "clip", own / "llama", steps=1)
        assert message.format(own=own) in refusal(path, capsys, command)

    @pytest.mark.parametrize("tower", ["clip", "llama"])
    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda state: {}, "expected all weights of a "),
            (without_a_weight, "got none for 1 of them ("),
            (None, "{own}/{tower}: "),
        ],
        ids=["none", "one less", "damaged"],
    )
    def test_weights_that_are_not_whole_are_refused(self, data, own, tower, spoil, message, capsys):
        path = own / tower / "model.safetensors"
        if spoil is None:
            path.write_bytes(path.read_bytes()[:-100])
        else:
            save_file(spoil(load_file(path)), path, metadata={"format": "pt"})
        run = write_run(data, own, own / "clip", own / "llama", steps=1)
        assert message.format(own=own, tower=tower) in refusal(run, capsys)

    def test_a_tokenizer_of_another_model(self, data, own, capsys):
        tower_folders.write_language(own / "small", "llama", rows=200)
        line = refusal(write_run(data, own, own / "clip", own / "small", steps=1), capsys)
        assert f"{own}/small: expected a tokenizer of at most 200 tokens" in line
        assert "got 261 with" in line

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ("vision_weights = 'x'", "[model]: expected vision or vision_weights, got both. Remove one."),
            (
                "checkpoint = 'none.pt'",
                "[model]: expected checkpoint to be a file, got none.pt, which is none",
            ),
            (
                "changes = { vocab_size = 9, language_dim = 8 }",
                "[model]: expected changes without language_dim, vocab_size, which language = ",
            ),
            ("changes = { vision_dim = 8 }", "[model]: expected changes without vision_dim, which vision = "),
            (
                "changes = { cross_attn_evry = 8 }",
                "there is no field 'cross_attn_evry'. Did you mean cross_attn_every?",
            ),
        ],
    )
    def test_keys_that_contradict(self, data, towers, tmp_path, capsys, more, message):
        path = write_run(data, tmp_path, towers / "clip", towers / "llama", more=more, steps=1)
        assert message in refusal(path, capsys)

    def test_a_checkpoint_alone(self, data, tmp_path, capsys):
        path = tmp_path / "run.toml"
        path.write_text(toml(data, tmp_path / "run", steps=1) + "checkpoint = 'checkpoint.pt'\n")
        assert "expected vision and language beside checkpoint = " in refusal(path, capsys)


class TestFoundAgain:
    @pytest.fixture
    def run(self, data, towers, tmp_path):
        """A run of a step, with towers of its own."""
        for kind in ("clip", "llama"):
            shutil.copytree(towers / kind, tmp_path / kind)
        path = write_run(data, tmp_path, tmp_path / "clip", tmp_path / "llama", steps=1)
        assert main(["train", str(path)]) == 0
        return path

    @pytest.mark.parametrize("command", ["train", "encode"])
    def test_others_are_refused(self, run, towers, capsys, command):
        run.write_text(run.read_text().replace(f"{run.parent}/clip", f"{towers}/siglip"))
        assert main([command, str(run)]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line == (
            f"{command}: {run.parent}/run/towers.json: expected vision to be {run.parent}/clip as it was "
            f"when the run began, got {towers}/siglip with other files. Put it back, or begin another run in "
            "another folder."
        )
        with pytest.raises(ValueError, match="expected vision to be "):
            load_run(run)

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
    def test_changed_ones_are_refused(self, run, name):
        path = run.parent / "llama" / name
        content = bytearray(path.read_bytes())
        content[-2:-1] = b" " if name != "model.safetensors" else bytes([content[-2] ^ 1])
        path.write_bytes(content if name == "model.safetensors" else path.read_bytes() + b" ")
        with pytest.raises(ValueError, match=r"expected language to be .*llama as it was.* with other files"):
            load_run(run)

    def test_a_tower_less_is_refused(self, run):
        run.write_text("\n".join(line for line in run.read_text().splitlines() if "vision = " not in line))
        with pytest.raises(ValueError, match=r"expected vision to be .*clip as it was .*, got none\. Put"):
            load_run(run)

    def test_moved_ones_are_found(self, run):
        (run.parent / "clip").rename(run.parent / "moved")
        run.write_text(run.read_text().replace(f"{run.parent}/clip", f"{run.parent}/moved"))
        load_run(run)

    def test_before_a_checkpoint_they_may_change(self, run, towers):
        shutil.rmtree(run.parent / "run/checkpoints")
        (run.parent / "run/log.jsonl").unlink()
        run.write_text(run.read_text().replace(f"{run.parent}/clip", f"{towers}/siglip"))
        assert main(["train", str(run)]) == 0
        load_run(run)


def test_a_given_encoder_has_to_be_given():
    with pytest.raises(
        ValueError, match=r'expected a vision encoder, as the configuration says vision="given"'
    ):
        Flamingo(FlamingoConfig.preset("tiny", vision="given"))
