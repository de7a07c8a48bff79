"""Image towers of CLIP and SigLIP from transformers, as vision encoders."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from flamingo.pretrained import load_whole
from flamingo.vision.frames import as_images, expect_frames

# By the model_type of a tower's configuration: mean and standard deviation of the pixels it was trained on,
# and how many of its tokens come before the patches.
_FAMILIES = {
    "clip_vision_model": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), 1),
    "siglip_vision_model": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 0),
}
_SETTINGS = ("patch_size", "num_attention_heads", "hidden_act", "layer_norm_eps")


class PretrainedVision(nn.Module):
    """An image tower of transformers, as a vision encoder: one feature a patch, frozen.

    The features are the tower's `last_hidden_state` without CLIP's class token. CLIP's are thus taken before
    its last LayerNorm, as when open_flamingo's checkpoints were trained (later releases of open_clip norm
    them); SigLIP's are normed.

    Args:
        tower: a `CLIPVisionModel` or `SiglipVisionModel`.
        frozen: no parameter takes a gradient, nothing is kept for a backward pass, and the tower stays in
            eval mode, also after `train()`.

    Attributes:
        dim: width of the features.
        image_size: pixels of one side of a frame.
        mean, std: of the three channels, those of the published weights; what `Processor` is to be given,
            unless `read_preprocessing` says otherwise.
        settings: what decides the features beside the weights.

    Raises:
        ValueError: if it is another kind of model.

    Source: arXiv 2103.00020 (CLIP), arXiv 2303.15343 (SigLIP).

    Example; `PretrainedVision.from_pretrained("openai/clip-vit-large-patch14")` has CLIP's weights:
        >>> from transformers import CLIPVisionConfig, CLIPVisionModel
        >>> sizes = {"hidden_size": 48, "num_hidden_layers": 1, "image_size": 32, "patch_size": 8}
        >>> vision = PretrainedVision(CLIPVisionModel(CLIPVisionConfig(**sizes)))
        >>> processor = Processor(vision.image_size, mean=vision.mean, std=vision.std)
        >>> model = Flamingo(FlamingoConfig.preset("tiny"), vision=vision)
        >>> batch = processor([["a dog:", torch.zeros(3, 20, 40)]])
        >>> model(batch.input_ids, batch.pixels).logits.shape
        torch.Size([1, 11, 261])
    """

    def __init__(self, tower: nn.Module, *, frozen: bool = True):
        super().__init__()
        config: Any = getattr(tower, "config", None)
        family = getattr(config, "model_type", None)
        if family not in _FAMILIES:
            raise ValueError(
                f"PretrainedVision: expected a CLIPVisionModel or a SiglipVisionModel, got "
                f"{type(tower).__name__}. Pass the vision_model of a model that has a text tower too."
            )
        self.mean, self.std, self._before_patches = _FAMILIES[family]
        self.dim: int = config.hidden_size
        self.image_size: int = config.image_size
        self.settings = {name: getattr(config, name) for name in _SETTINGS}
        self.frozen = frozen
        self.num_patches = (config.image_size // config.patch_size) ** 2
        self.tower = tower
        if frozen:
            tower.requires_grad_(False)
        self.train(self.training)

    @staticmethod
    def from_pretrained(name: str, *, frozen: bool = True, **options: Any) -> "PretrainedVision":
        """The image tower of a checkpoint, by its name on the hub or its folder.

        Args:
            name: a checkpoint of CLIP or SigLIP, with or without its text tower.
            frozen: see the class.
            options: for transformers' `from_pretrained`, as `dtype=torch.bfloat16`.

        Raises:
            ImportError: if transformers is not installed.
            ValueError: if it is a checkpoint of another kind, or lacks weights.
        """
        from transformers import AutoConfig, CLIPVisionModel, SiglipVisionModel

        kind = AutoConfig.from_pretrained(name).model_type
        towers: dict[str, Any] = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}
        tower = towers.get(kind.removesuffix("_vision_model"))
        if tower is None:
            raise ValueError(f"PretrainedVision: expected a checkpoint of CLIP or SigLIP, got one of {kind}.")
        return PretrainedVision(load_whole(tower, name, **options), frozen=frozen)

    def train(self, mode: bool = True) -> "PretrainedVision":
        """`nn.Module.train`, but a frozen tower stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.tower.eval()
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels `[B, M, F, 3, image_size, image_size]` to features `[B, M, F, v, dim]`.

        Raises:
            ValueError: if pixels has another shape.
            TypeError: pixels are integers.
        """
        expect_frames(self, pixels, self.image_size)
        images = as_images(self, pixels, cast(torch.dtype, self.tower.dtype))
        if not len(images):  # documents of text alone; transformers' attention needs an image
            return images.new_zeros(*pixels.shape[:3], self.num_patches, self.dim)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            tokens = self.tower(pixel_values=images).last_hidden_state
        return tokens[:, self._before_patches :].unflatten(0, pixels.shape[:3])
