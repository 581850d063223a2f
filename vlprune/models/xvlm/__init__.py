"""X-VLM (Zeng et al. 2022, arXiv:2111.08276)."""

from vlprune.models.xvlm.adapter import XVLM, XVLMOptions

__all__ = ["XVLM", "XVLMOptions"]
