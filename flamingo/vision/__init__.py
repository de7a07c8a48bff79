"""Vision encoders: pixels `[B, M, F, 3, h, w]` to features `[B, M, F, v, dim]`, v features a frame.

vit            a small vision transformer
nfnet          NFNet, the paper's
pretrained     the image towers of CLIP and SigLIP, from transformers
preprocessing  how these want their images

Any module of that shape with an attribute `dim`, the width of its features, can be a Flamingo's `vision`.
"""

from flamingo.vision.nfnet import NFNETS, NFNet
from flamingo.vision.preprocessing import read_preprocessing
from flamingo.vision.pretrained import PretrainedVision
from flamingo.vision.vit import VisionEncoder

__all__ = ["NFNETS", "NFNet", "PretrainedVision", "VisionEncoder", "read_preprocessing"]
