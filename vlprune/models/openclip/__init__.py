"""CLIP (Radford et al. 2021, arXiv:2103.00020) and CoCa (Yu et al. 2022, arXiv:2205.01917) on open_clip's modules.

open_clip takes seconds to import, so that this package does not import its own modules.
"""
