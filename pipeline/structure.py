"""Structure control: where the edges of a source are, as extra channels beside the latents.

A latent cell says how strong the edges are in each of its 4 x 4 parts, in one picture of those that the latent frame
carries. Brightness and colour stay out, so what is drawn may look like anything that has these outlines.
Knows nothing of cameras, prompts and weights.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.config import STRUCTURE_CHANNELS as CHANNELS
from pipeline.config import STRUCTURE_PARTS as PARTS

__all__ = ["CHANNELS", "PARTS", "structure"]
_SOFTNESS = 0.15
_BLUR = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
_SOBEL = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8


def structure(frames_TCHW: Tensor, frames: int, stride: int) -> Tensor:
    """Edges of pictures (RGB, -1 to 1), as (T / frames, CHANNELS, H / stride, W / stride) from 0 to 1.

    frames: pictures that a latent frame carries; the middle one counts. stride: pixels of a latent cell.
    """
    grey = frames_TCHW[frames // 2 :: frames].float().mean(1, keepdim=True)
    kernel = (_BLUR[:, None] * _BLUR).to(grey)
    smooth = F.conv2d(F.pad(grey, (2, 2, 2, 2), mode="replicate"), kernel[None, None])
    sobel = _SOBEL.to(grey)
    slope = F.conv2d(F.pad(smooth, (1, 1, 1, 1), mode="replicate"), torch.stack([sobel, sobel.T])[:, None])
    steep = slope.square().sum(1, keepdim=True)
    part = F.max_pool2d(steep / (steep + _SOFTNESS**2), stride // PARTS)
    return F.pixel_unshuffle(part, PARTS)
