"""The image towers of CLIP and SigLIP, as transformers computes them, tiny and random."""

import pytest
import torch

from flamingo import Flamingo, FlamingoConfig, PretrainedVision, Processor
from tests.helpers.weights import randomise

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def clip():
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES))


def siglip():
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES))


@pytest.fixture(params=[clip, siglip], ids=["clip", "siglip"])
def tower(request):
    return randomise(request.param(), std=0.2).eval()


def test_features_are_the_patches_in_place(tower):
    vision = PretrainedVision(tower)
    pixels = torch.randn(2, 3, 2, 3, 32, 32)
    features = vision(pixels)
    assert features.shape == (2, 3, 2, 16, vision.dim)
    tokens = tower(pixel_values=pixels[1, 2, 0][None]).last_hidden_state[0]
    torch.testing.assert_close(features[1, 2, 0], tokens[-16:])
    assert len(tokens) == 16 + (tower.config.model_type == "clip_vision_model")


def test_documents_without_images(tower):
    vision = PretrainedVision(tower)
    assert vision(torch.zeros(2, 0, 1, 3, 32, 32)).shape == (2, 0, 1, 16, vision.dim)
    config = FlamingoConfig.preset("tiny", vision_dim=24, vision_heads=2)
    logits = Flamingo(config, vision=vision)(torch.tensor([[65, 66]]), torch.zeros(1, 0, 1, 3, 32, 32)).logits
    assert logits.isfinite().all()


def test_clips_features_are_not_normed_and_siglips_are():
    pixels = torch.randn(1, 1, 1, 3, 32, 32)
    for build, normed in ((clip, False), (siglip, True)):
        tower = randomise(build(), std=0.2).eval()
        before = PretrainedVision(tower)(pixels)
        with torch.no_grad():
            tower.get_submodule(
                "post_layernorm" if hasattr(tower, "post_layernorm") else "vision_model.post_layernorm"
            ).weight.mul_(2)
        assert torch.equal(PretrainedVision(tower)(pixels), before) != normed


def test_frozen_in_every_way(tower):
    vision = PretrainedVision(tower.train())
    features = vision.train()(torch.randn(1, 1, 1, 3, 32, 32, requires_grad=True))
    assert not features.requires_grad
    assert not any(p.requires_grad for p in vision.parameters())
    assert not any(module.training for module in tower.modules())
    assert vision.training


def test_on_demand_it_trains(tower):
    vision = PretrainedVision(tower, frozen=False).train()
    assert tower.training
    with torch.no_grad():
        assert not vision(torch.randn(1, 1, 1, 3, 32, 32)).requires_grad
    vision(torch.randn(1, 1, 1, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None for name, p in tower.named_parameters() if "encoder" in name)


def test_what_its_images_are_like():
    assert PretrainedVision(clip()).mean == (0.48145466, 0.4578275, 0.40821073)
    vision = PretrainedVision(siglip())
    processor = Processor(vision.image_size, mean=vision.mean, std=vision.std)
    pixels = processor([[torch.ones(3, 8, 8)]]).pixels
    assert torch.equal(pixels, torch.ones(1, 1, 1, 3, 32, 32))  # white is (1 - 0.5) / 0.5
    assert vision(pixels).shape == (1, 1, 1, 16, 24)


def test_in_a_flamingo(tower):
    config = FlamingoConfig.preset("tiny", vision_dim=24, vision_heads=2)
    model = Flamingo(config, vision=PretrainedVision(tower)).freeze().train()
    for block in model.cross_attn.values():
        torch.nn.init.ones_(block.attn_gate)
    input_ids = torch.tensor([[65, 256, 66, 67]])
    pixels = torch.randn(1, 1, 1, 3, 32, 32)
    model(input_ids, pixels, labels=input_ids).loss.backward()
    assert model.resampler.latents.grad.abs().sum() > 0
    assert not torch.allclose(model(input_ids, pixels).logits, model(input_ids, pixels + 1).logits)


@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
@pytest.mark.parametrize("whole", [False, True])
def test_from_a_checkpoint(family, whole, tmp_path):
    vision_config = getattr(transformers, f"{family}VisionConfig")(**SIZES)
    if whole:
        text = {
            "vocab_size": 20,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "projection_size": 24,
        }
        sizes = {name: value for name, value in SIZES.items() if name not in ("image_size", "patch_size")}
        config = getattr(transformers, f"{family}Config")(
            vision_config=vision_config.to_dict(), text_config=sizes | text
        )
        model = randomise(getattr(transformers, f"{family}Model")(config), std=0.2).eval()
    else:
        model = randomise(getattr(transformers, f"{family}VisionModel")(vision_config), std=0.2).eval()
    model.save_pretrained(tmp_path)
    vision = PretrainedVision.from_pretrained(str(tmp_path), frozen=False, dtype=torch.float64)
    assert vision.tower.dtype == torch.float64
    assert not vision.frozen
    pixels = torch.randn(1, 1, 1, 3, 32, 32, dtype=torch.float64)
    expected = PretrainedVision((model.vision_model if whole else model).double())(pixels)
    torch.testing.assert_close(vision.eval()(pixels), expected)


def test_another_checkpoint_is_refused(tmp_path):
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a checkpoint of CLIP or SigLIP, got one of bert"):
        PretrainedVision.from_pretrained(str(tmp_path))


def test_other_modules_are_refused():
    with pytest.raises(
        ValueError, match=r"a CLIPVisionModel or a SiglipVisionModel, got Linear\..*vision_model"
    ):
        PretrainedVision(torch.nn.Linear(2, 2))


def test_another_size_is_refused(tower):
    with pytest.raises(
        ValueError, match=r"\(B, M, F, 3, 32, 32\), got \(1, 1, 1, 3, 16, 16\).*image_size=32"
    ):
        PretrainedVision(tower)(torch.zeros(1, 1, 1, 3, 16, 16))
