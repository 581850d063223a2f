"""CHITA and CHITA++: an L0-constrained quadratic model of the loss, solved by a line search and block-wise regression.

Benbaki et al. 2023 (arXiv:2302.14623), with the first-order term and the blocks that Farina et al. 2024
(arXiv:2404.05621) use for vision-language models. The problem, for weights w (p,), gradient rows A (n, p), a
first-order term alpha (p,), damping d > 0 and k entries to keep, is

    minimize over b, at most k non-zeros:   0.5 |A (w - b)|^2 + d |w - b|^2 + alpha . b

A global step along the gradient says how many entries each block of columns keeps; a step of its own says which ones,
and their values are the exact minimum on them. Rows are only read layer by layer and blocks of equal size are solved
together, so that beyond the rows memory is that of about four vectors of p entries.
"""

from vlprune.pruners.chita.method import CHITA, CHITA_PP, ChitaOptions, ChitaPPOptions, chita_update
from vlprune.pruners.chita.solver import block_boundaries, solve, solve_support

__all__ = [
    "CHITA",
    "CHITA_PP",
    "ChitaOptions",
    "ChitaPPOptions",
    "block_boundaries",
    "chita_update",
    "solve",
    "solve_support",
]
