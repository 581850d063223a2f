"""BLIP (Li et al. 2022, arXiv:2201.12086)."""

from vlprune.models.blip.adapter import BLIP, BLIPOptions

__all__ = ["BLIP", "BLIPOptions"]
