"""NFNet: the paper's vision encoder, a ResNet that needs no normalisation to keep its signal at size 1.

::

    image --> stem --> 4 stages of blocks --> 1x1 convolution --> GELU --> grid, 1/32 of the image's sides

What a normalisation layer would do to activations is done to weights (`StandardisedConv`), and what the
residual sums add to the variance is known beforehand and divided out (`beta`).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flamingo.vision.frames import as_images

ALPHA = 0.2  # weight of a residual branch
STRIDES = (1, 2, 2, 2)  # of the stages; the stem has divided the sides by 4
# GELU of a standard normal has variance 1 / GAMMA^2.
GAMMA = 1.7015043497085571


def scaled_gelu(x: Tensor) -> Tensor:
    """`GAMMA * gelu(x)`: a standard normal keeps variance 1."""
    return F.gelu(x) * GAMMA


class ScaledGELU(nn.Module):
    """`scaled_gelu` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return scaled_gelu(x)


class StandardisedConv(nn.Conv2d):
    """A convolution with scaled weight standardisation and TensorFlow's SAME padding.

    Each output channel's weights are used as

        w_hat = gain * (w - mean(w)) / sqrt((var(w) + 1e-5) * fan_in)

    so that inputs of variance 1 give outputs of variance gain^2. This is computed in float32 at least,
    whatever the dtype of the weights. The output has ceil(side / stride) pixels a side; where padding is odd,
    the right and the bottom get one more.

    Args:
        dim_in, dim_out: channels.
        kernel_size: pixels of one side.
        stride: of the window, in pixels.
        groups: of channels that do not mix.

    Source: arXiv 2101.08692, section 4; the 1e-5 is timm's, whose outputs these are. DeepMind's code has
    `max(var * fan_in, 1e-4)` under the root: with random weights an NFNet-F0's features then differ by 4 %.

    >>> StandardisedConv(3, 8, kernel_size=3, stride=2)(torch.zeros(1, 3, 5, 7)).shape
    torch.Size([1, 8, 3, 4])
    """

    def __init__(self, dim_in: int, dim_out: int, kernel_size: int = 1, stride: int = 1, groups: int = 1):
        super().__init__(dim_in, dim_out, kernel_size, stride=stride, groups=groups)
        self.gain = nn.Parameter(torch.ones(dim_out, 1, 1, 1))
        nn.init.normal_(self.weight, std=self.weight[0].numel() ** -0.5)
        self.bias = nn.Parameter(torch.zeros(dim_out))

    def forward(self, x: Tensor) -> Tensor:
        """x `[N, dim_in, h, w]` to `[N, dim_out, ceil(h / stride), ceil(w / stride)]`."""
        top, bottom = self._padding(x.shape[2])
        left, right = self._padding(x.shape[3])
        if top or bottom or left or right:
            x = F.pad(x, (left, right, top, bottom))
        return F.conv2d(x, self.standardised_weight(), self.bias, self.stride, groups=self.groups)

    def standardised_weight(self) -> Tensor:
        """w_hat `[dim_out, dim_in / groups, kernel_size, kernel_size]`, in the dtype of the weights."""
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        var, mean = torch.var_mean(weight, dim=(1, 2, 3), correction=0, keepdim=True)
        scale = self.gain * ((var + 1e-5) * weight[0].numel()).rsqrt()
        return ((weight - mean) * scale).to(self.weight.dtype)

    def _padding(self, side: int) -> tuple[int, int]:
        """Pixels to add before and after one side."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        total = max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)
        return total // 2, total - total // 2


class SqueezeExcite(nn.Module):
    """`2 * sigmoid(fc2(relu(fc1(mean of x over the grid)))) * x`, a weight for every channel."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Conv2d(dim, dim // 2, kernel_size=1)
        self.fc2 = nn.Conv2d(dim // 2, dim, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """x `[N, dim, h, w]` to the same."""
        weights = self.fc2(self.fc1(x.mean(dim=(2, 3), keepdim=True)).relu())
        return 2 * weights.sigmoid() * x


class Shortcut(nn.Module):
    """Where a block changes the shape, its input must follow: the mean of 2 x 2 pixels, a 1x1 convolution."""

    def __init__(self, dim_in: int, dim_out: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv = StandardisedConv(dim_in, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride, ceil_mode=True)  # at an odd side, of the pixels that exist
        return self.conv(x)


class NFBlock(nn.Module):
    """A residual block that keeps track of its own variance.

    ::

        h = scaled_gelu(x) * beta                          beta = 1 / std of x, as predicted
        y = conv3(gelu(conv2b(gelu(conv2(gelu(conv1(h)))))))   1x1, 3x3, 3x3, 1x1; 3x3 in groups
        out = shortcut + alpha * skipinit_gain * squeeze_excite(y)

    The shortcut is x itself, or a convolution of h where the shape changes.

    Args:
        dim_in, dim_out: channels; the branch has half of dim_out.
        beta: see above.
        stride: of the first 3x3 convolution.
        group_width: channels of a group in the 3x3 convolutions.
        drop: probability, while training, that an image skips the branch (stochastic depth).

    Source: arXiv 2102.06171, section 4.
    """

    def __init__(
        self, dim_in: int, dim_out: int, *, beta: float, stride: int, group_width: int, drop: float = 0.0
    ):
        super().__init__()
        self.beta = beta
        self.drop = drop
        middle = dim_out // 2
        groups = middle // group_width
        changes = stride > 1 or dim_in != dim_out
        self.downsample = Shortcut(dim_in, dim_out, stride) if changes else None
        self.conv1 = StandardisedConv(dim_in, middle)
        self.conv2 = StandardisedConv(middle, middle, 3, stride, groups)
        self.conv2b = StandardisedConv(middle, middle, 3, groups=groups)
        self.conv3 = StandardisedConv(middle, dim_out)
        self.attn_last = SqueezeExcite(dim_out)
        self.skipinit_gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """x `[N, dim_in, h, w]` to `[N, dim_out, ceil(h / stride), ceil(w / stride)]`."""
        h = scaled_gelu(x) * self.beta
        shortcut = x if self.downsample is None else self.downsample(h)
        y = self.conv1(h)
        for conv in (self.conv2, self.conv2b, self.conv3):
            y = conv(scaled_gelu(y))
        y = self.attn_last(y)
        if self.training and self.drop:
            y = y * (torch.rand(len(y), 1, 1, 1, device=y.device) >= self.drop)
        return shortcut + ALPHA * self.skipinit_gain * y


class NFNet(nn.Module):
    """NFNet of any size; `NFNet.preset(name)` gives the published ones. The paper's encoder is NFNet-F6.

    Parameters have timm's names (`dm_nfnet_f0` to `dm_nfnet_f6`), so its checkpoints load; the classifier in
    them is left out. The grid is what comes before a classifier's pooling, `2 * widths[-1]` features wide.
    Frames may have any size. As built, every branch is multiplied by a gain of 0.

    Args:
        widths: channels of the four stages; the stem ends in half of the first.
        depths: blocks of the four stages.
        group_width: channels of a group in the 3x3 convolutions.
        stochastic_depth: probability, while training, that an image skips the last block's branch; earlier
            blocks in proportion to their depth. For contrastive pre-training: leave it 0 where the encoder is
            frozen. DeepMind trained on ImageNet with 0.25.

    Raises:
        ValueError: if the widths cannot be divided as needed.

    Limits: GELU is exact, as in timm, where DeepMind's JAX code has the tanh approximation.

    Source: arXiv 2102.06171, Table 1 and appendix; arXiv 2204.14198, section 2.1.

    >>> encoder = NFNet(widths=(32, 64, 64, 64), depths=(1, 1, 1, 1), group_width=16)
    >>> encoder(torch.zeros(2, 3, 1, 3, 64, 96)).shape  # 2 x 3 of 32 pixels
    torch.Size([2, 3, 1, 6, 128])
    """

    def __init__(
        self,
        *,
        widths: tuple[int, int, int, int] = (256, 512, 1536, 1536),
        depths: tuple[int, int, int, int],
        group_width: int = 128,
        stochastic_depth: float = 0.0,
    ):
        super().__init__()
        if widths[0] % 16 or any(width % (2 * group_width) for width in widths):
            raise ValueError(
                f"NFNet: expected widths that are multiples of 2 * group_width = {2 * group_width}, the "
                f"first of 16 too, got {widths}."
            )
        self.dim = 2 * widths[-1]
        self.stem = _stem(widths[0] // 2)
        stages, dim, before = [], widths[0] // 2, 0
        variance = 1.0  # predicted, of the signal
        for width, depth, stride in zip(widths, depths, STRIDES, strict=True):
            blocks = []
            for index in range(depth):
                drop = stochastic_depth * (before + index) / sum(depths)
                blocks.append(
                    NFBlock(
                        dim,
                        width,
                        beta=variance**-0.5,
                        stride=1 if index else stride,
                        group_width=group_width,
                        drop=drop,
                    )
                )
                # The first block's shortcut is made of h, whose variance is 1.
                variance = (variance if index else 1.0) + ALPHA**2
                dim = width
            stages.append(nn.Sequential(*blocks))
            before += depth
        self.stages = nn.Sequential(*stages)
        self.final_conv = StandardisedConv(dim, self.dim)
        self.register_load_state_dict_pre_hook(_leave_out_the_classifier)

    @staticmethod
    def preset(name: str, **changes: Any) -> "NFNet":
        """A published size, with random weights, and any argument changed.

        Args:
            name: "nfnet-f0" (68.4 M parameters) to "nfnet-f6" (435.3 M, the paper's).
            changes: arguments to replace.

        Raises:
            ValueError: for an unknown name.

        >>> with torch.device("meta"):
        ...     sum(p.numel() for p in NFNet.preset("nfnet-f6").parameters())
        435286116
        """
        if name not in NFNETS:
            raise ValueError(f"NFNet: expected one of {', '.join(NFNETS)}, got {name!r}.")
        return NFNet(**{"depths": NFNETS[name], **changes})

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels `[B, M, F, 3, h, w]` to features `[B, M, F, v, dim]`, v = ceil(h / 32) * ceil(w / 32).

        Raises:
            ValueError: if pixels has another shape.
            TypeError: pixels are integers.
        """
        if pixels.ndim != 6 or pixels.shape[3] != 3:
            raise ValueError(
                f"NFNet: expected pixels with shape (B, M, F, 3, h, w), got {tuple(pixels.shape)}. Processor "
                "makes them."
            )
        grid = self.grid(as_images(self, pixels, next(self.parameters()).dtype))
        return rearrange(grid, "n d rows columns -> n (rows columns) d").unflatten(0, pixels.shape[:3])

    def grid(self, images: Tensor) -> Tensor:
        """images `[N, 3, h, w]` to `[N, dim, ceil(h / 32), ceil(w / 32)]`."""
        return scaled_gelu(self.final_conv(self.stages(self.stem(images))))


# F0 to F6: each has F0's blocks once more.
NFNETS = {f"nfnet-f{n}": (n + 1, 2 * n + 2, 6 * n + 6, 3 * n + 3) for n in range(7)}


def _stem(dim: int) -> nn.Sequential:
    """Four 3x3 convolutions `[N, 3, h, w]` to `[N, dim, h / 4, w / 4]`, named as in timm."""
    widths, strides = (3, dim // 8, dim // 4, dim // 2, dim), (2, 1, 1, 2)
    stem = nn.Sequential()
    for i, stride in enumerate(strides):
        if i:
            stem.add_module(f"act{i + 1}", ScaledGELU())
        stem.add_module(f"conv{i + 1}", StandardisedConv(widths[i], widths[i + 1], 3, stride))
    return stem


def _leave_out_the_classifier(module: nn.Module, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
    for name in ("head.fc.weight", "head.fc.bias"):
        state.pop(prefix + name, None)
