"""Boxes: the patches that a region covers, and the loss of a predicted box."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou_loss

L1_WEIGHT = 4  # beside GIoU


def patches_in(boxes: Tensor, side: int) -> Tensor:
    """Which patches (n, side²) bool of a grid of side × side patches n boxes touch.

    Args:
        boxes: (n, 4), left, top, width and height in fractions of the image.
        side: number of patches along a side of the image.
    """
    edges = torch.arange(side, device=boxes.device) / side
    x0, y0, w, h = boxes.unbind(1)

    def touched(start: Tensor, length: Tensor) -> Tensor:
        end = (start + length)[:, None]
        return (edges < end) & (edges + 1 / side > start[:, None])

    return (touched(y0, h)[:, :, None] & touched(x0, w)[:, None, :]).flatten(1)


def box_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Four times L1 plus GIoU, averaged over the boxes.

    Args:
        predicted: (n, 4), centre (x, y), width and height in fractions of the image.
        target: (n, 4), left, top, width and height in fractions of the image.
    """
    l1 = F.l1_loss(predicted, box_convert(target, "xywh", "cxcywh"))
    corners = box_convert(predicted, "cxcywh", "xyxy"), box_convert(target, "xywh", "xyxy")
    return L1_WEIGHT * l1 + generalized_box_iou_loss(*corners, reduction="mean")
