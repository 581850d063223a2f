"""Exact selection of the entries with the lowest scores, over any number of tensors.

The k-th lowest score is found by a radix histogram over the bit patterns of the floats, streamed in chunks: scores are
never concatenated, the memory is that of the bins and of one layer, and the counts are integers, so that the result
depends neither on threads nor on the order of summation. Of equal scores, those with the lowest (layer, flat index) go
first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

VERSION = 1  # raised when the same scores give other masks
WITHIN = ("model", "modality", "layer", "row")

Scores = Mapping[str, Float[Tensor, "*_"]]
Kept = dict[str, Bool[Tensor, "*_"]]

_CHUNK = 1 << 18  # entries at a time: temporaries that stay in the cache
_DIGIT = 16  # bits resolved by one pass
_BINS = 1 << _DIGIT
_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}


def select(scores: Scores, sparsity: float, within: str, modality: Mapping[str, str] | None = None) -> Kept:
    """Entries to keep at one sparsity; see `select_many`."""
    return select_many(scores, [sparsity], within, modality)[0]


def select_many(
    scores: Scores, sparsities: Sequence[float], within: str, modality: Mapping[str, str] | None = None
) -> list[Kept]:
    """Entries to keep at each sparsity, from one shared first pass over the scores.

    Exactly round(sparsity * N) of all N entries are pruned, whatever they compete within: the groups share that number
    in proportion to their sizes, by largest remainder (the earlier group on a tie). A higher sparsity keeps a subset,
    except that a group of fewer than 1 / (difference in sparsity) entries may keep one more.

    Args:
        scores: {layer name: (out, in)}, float32 or float64 and finite, in tie-break order; -0.0 equals 0.0.
        sparsities: pruned fractions, each in [0, 1).
        within: who competes with whom, one of WITHIN; a row is the input edges of one output node.
        modality: {layer name: modality}, for within="modality".

    Returns:
        One {layer name: bool (out, in)} for each sparsity, True = kept.

    Raises:
        ValueError: for a NaN or infinite score (with the layer's name), another dtype, an unknown `within`, a missing
            modality, a sparsity outside [0, 1).
    """
    if within == "row":
        _check(scores, sparsities)
        return _select_rows(scores, sparsities)
    return _select_groups(scores, *_shared(scores, sparsities, within, modality))


def modality_counts(scores: Scores, sparsities: Sequence[float], modality: Mapping[str, str]) -> list[dict[str, int]]:
    """How many entries of each layer `select_many` prunes within modalities, at each sparsity, without making masks.

    Args and errors as there.

    Returns:
        One {layer name: number of pruned entries} for each sparsity.
    """
    groups, counts = _shared(scores, sparsities, "modality", modality)
    pruned: list[dict[str, int]] = [dict.fromkeys(scores, 0) for _ in sparsities]
    for i, group in enumerate(groups):
        cuts = _cuts({name: scores[name] for name in group}, [share[i] for share in counts])
        left = [cut.n_tied for cut in cuts]
        for name in group:
            for chunk in _chunks(scores[name]):
                for j, cut in enumerate(cuts):
                    n_tied = min(left[j], _number(chunk == cut.value)) if left[j] else 0
                    pruned[j][name] += _number(chunk < cut.value) + n_tied
                    left[j] -= n_tied
    return pruned


def select_counts(scores: Scores, n_pruned: Mapping[str, int]) -> Kept:
    """Entries to keep for one allocation; see `select_counts_many`."""
    return select_counts_many(scores, [n_pruned])[0]


def select_counts_many(scores: Scores, n_pruned: Sequence[Mapping[str, int]]) -> list[Kept]:
    """Entries to keep when every layer's number of pruned entries is given.

    Args:
        scores: as in `select_many`.
        n_pruned: allocations, each {layer name: number of entries to prune} for exactly the layers of `scores`.

    Returns:
        One {layer name: bool, in the shape of its scores} for each allocation, True = kept.
    """
    _check_dtypes(scores)
    for allocation in n_pruned:
        if allocation.keys() != scores.keys():
            odd = sorted(allocation.keys() ^ scores.keys())
            raise ValueError(f"an allocation must name exactly the scored layers, these are only in one of them: {odd}")
        for name, count in allocation.items():
            if not 0 <= count <= scores[name].numel():
                raise ValueError(f"layer '{name}': cannot prune {count} of {scores[name].numel()} entries")
    counts = [[allocation[name] for name in scores] for allocation in n_pruned]
    return _select_groups(scores, [[name] for name in scores], counts)


def select_lowest(scores: Scores, n_pruned: int) -> Kept:
    """Entries to keep when `n_pruned` entries of the whole model go; scores and errors as in `select_many`."""
    _check_dtypes(scores)
    total = sum(values.numel() for values in scores.values())
    if not 0 <= n_pruned <= total:
        raise ValueError(f"cannot prune {n_pruned} of {total} entries")
    return _select_groups(scores, [list(scores)], [[n_pruned]])[0]


def select_pattern(scores: Scores, kept: int, of: int) -> Kept:
    """Entries to keep where every `of` consecutive inputs of an output node keep the `kept` with the highest scores.

    Args:
        scores: {layer name: (out, in)}, as in `select_many`; of equal ones, the first goes.
        kept: number of entries that each group keeps, in (0, of).
        of: number of consecutive inputs in a group.

    Raises:
        ValueError: as in `select_many`; a layer whose number of inputs is no multiple of `of`.
    """
    _check_dtypes(scores)
    if not 0 < kept < of:
        raise ValueError(f"a pattern keeps N of M entries with 0 < N < M, got {kept} of {of}")
    masks = _blank(scores)
    for name, values in scores.items():
        if values.shape[1] % of:
            raise ValueError(f"layer '{name}': {values.shape[1]} inputs cannot be cut into groups of {of}")
        for mask, groups in zip(_rows(masks[name].view(-1, of)), _rows(values.reshape(-1, of))):
            _check_finite(name, _array(groups))
            _array(mask)[:] = (_ranks(groups) >= of - kept).T
    return masks


def _ranks(groups: Float[Tensor, "n of"]) -> Any:
    """The places (of, n) of the entries in the ascending order of their group.

    Comparing all pairs is faster than many small sorts.
    """
    columns = _array(groups.T.contiguous())
    ranks = _array(torch.zeros(groups.T.shape, dtype=torch.int16, device=groups.device))
    for j in range(len(columns)):
        for i in range(j):
            first = columns[i] <= columns[j]
            ranks[j] += first
            ranks[i] += ~first
    return ranks


def _check(scores: Scores, sparsities: Sequence[float]) -> None:
    for sparsity in sparsities:
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    _check_dtypes(scores)


def _check_dtypes(scores: Scores) -> None:
    dtypes = {name: values.dtype for name, values in scores.items()}
    for name, dtype in dtypes.items():
        if dtype not in _INTEGER:
            raise ValueError(f"layer '{name}': scores must be float32 or float64, got {dtype}")
    if len(set(dtypes.values())) > 1:
        raise ValueError(f"scores that compete must have one dtype, got {dtypes}")


def _shared(
    scores: Scores, sparsities: Sequence[float], within: str, modality: Mapping[str, str] | None
) -> tuple[list[list[str]], list[list[int]]]:
    """The groups of layers that compete, and for each sparsity how many entries each of them loses."""
    _check(scores, sparsities)
    groups = _groups(scores, within, modality)
    sizes = [sum(scores[name].numel() for name in group) for group in groups]
    return groups, [shares(sizes, sparsity).tolist() for sparsity in sparsities]


def _groups(scores: Scores, within: str, modality: Mapping[str, str] | None) -> list[list[str]]:
    if within == "model":
        return [list(scores)]
    if within == "layer":
        return [[name] for name in scores]
    if within == "modality":
        groups: dict[str, list[str]] = {}
        for name in scores:
            if modality is None or name not in modality:
                raise ValueError(f"within='modality' needs the modality of every layer, got none for '{name}'")
            groups.setdefault(modality[name], []).append(name)
        return list(groups.values())
    raise ValueError(f"unknown within {within!r}; there are: {', '.join(WITHIN)}")


def shares(sizes: Sequence[int], sparsity: float) -> Int[np.ndarray, " groups"]:
    """The number of entries to prune in each group: together round(sparsity * N), by largest remainder.

    Of groups of 5, 7 and 3 entries at sparsity 0.5, 3, 4 and 1 go.
    """
    quotas = sparsity * np.asarray(sizes, dtype=np.float64)
    counts = np.floor(quotas).astype(np.int64)
    missing = round(sparsity * sum(sizes)) - int(counts.sum())
    counts[np.argsort(counts - quotas, kind="stable")[:missing]] += 1
    return counts


@dataclass(frozen=True)
class _Cut:
    """Where a group is cut: entries below `value` are pruned, and the first `n_tied` of those equal to it."""

    value: float
    n_tied: int


def _select_groups(scores: Scores, groups: Sequence[Sequence[str]], counts: Sequence[Sequence[int]]) -> list[Kept]:
    """Masks for each list of `counts`, which holds the number of entries to prune in each group."""
    kept = [_blank(scores) for _ in counts]
    for i, group in enumerate(groups):
        cuts = _cuts({name: scores[name] for name in group}, [share[i] for share in counts])
        left = [cut.n_tied for cut in cuts]
        for name in group:
            for chunk, *parts in zip(_chunks(scores[name]), *(_chunks(masks[name]) for masks in kept)):
                left = [_apply_cut(part, chunk, cut.value, n) for part, cut, n in zip(parts, cuts, left)]
    return kept


def _apply_cut(mask: Any, chunk: Any, value: float, n_tied: int) -> int:
    """Writes the mask of a chunk; returns how many of the `n_tied` entries equal to `value` are still to fall."""
    mask[:] = chunk >= value
    if n_tied == 0:
        return 0
    tied = chunk == value
    n_here = _number(tied)
    if n_here > n_tied:
        tied &= tied.cumsum(0) <= n_tied
    mask ^= tied
    return max(0, n_tied - n_here)


def _select_rows(scores: Scores, sparsities: Sequence[float]) -> list[Kept]:
    sizes = [size for values in scores.values() for size in [values.shape[1]] * len(values)]
    pruned = [torch.from_numpy(shares(sizes, sparsity)) for sparsity in sparsities]
    kept = [_blank(scores) for _ in sparsities]
    first = 0
    for name, values in scores.items():
        for part, *parts in zip(_rows(values), *(_rows(masks[name]) for masks in kept)):
            rows = _array(part)
            ordered = np.sort(rows, axis=1) if isinstance(rows, np.ndarray) else rows.sort(dim=1).values
            _check_finite(name, ordered[:, [0, -1]])
            for mask, counts in zip(parts, pruned):
                counts = _array(counts[first : first + len(rows)].to(part.device))
                _array(mask)[:] = _row_mask(rows, ordered, counts)
            first += len(rows)
    return kept


def _row_mask(rows: Any, ordered: Any, counts: Any) -> Any:
    """Entries to keep of rows (n, in), given the same rows in ascending order and the entries to prune in each (n,)."""
    cut = ordered[range(len(rows)), (counts - 1).clip(0)][:, None]
    mask = rows > cut
    missing = rows.shape[1] - counts - mask.sum(1)  # entries equal to the cut that stay: the last ones
    tied = missing > 0
    equal = rows[tied] == cut[tied]
    mask[tied] |= equal & (equal.cumsum(1) > (equal.sum(1) - missing[tied])[:, None])
    return mask


def _cuts(scores: Scores, counts: Sequence[int]) -> list[_Cut]:
    """Where to cut the scores of one group so that each of `counts` entries fall."""
    if not scores:
        return [_Cut(-math.inf, 0) for _ in counts]
    first = _top_digits(scores)
    dtype = next(iter(scores.values())).dtype
    one = torch.ones(1, dtype=first.dtype, device=first.device)
    # For each count: the leading digits of its key, its rank among the entries that share them, and their number.
    found = {count: _descend(first, -(_BINS // 2), count) for count in counts if count > 0}
    for shift in range(torch.finfo(dtype).bits - 2 * _DIGIT, -1, -_DIGIT):
        histograms: dict[int, Tensor] = {prefix: torch.zeros_like(first) for prefix, _, _ in found.values()}
        edges = [[_value(p << (shift + _DIGIT), dtype) for p in (prefix, prefix + 1)] for prefix in histograms]
        for values in scores.values() if found else ():
            keys = _flip(_bits(_between(values, edges)))
            leading = keys >> (shift + _DIGIT)
            for prefix, histogram in histograms.items():
                digits = (keys[leading == prefix] >> shift) & (_BINS - 1)
                histogram.index_add_(0, digits, one.expand(len(digits)))
        found = {
            count: _descend(histograms[prefix], prefix << _DIGIT, rank) for count, (prefix, rank, _) in found.items()
        }
    cuts = {0: _Cut(-math.inf, 0)}
    for count, (key, rank, n_equal) in found.items():
        # When all equal entries go, the cut is the next float: nothing is left to break.
        cuts[count] = _Cut(_value(key + 1, dtype), 0) if rank == n_equal else _Cut(_value(key, dtype), rank)
    return [cuts[count] for count in counts]


def _descend(histogram: Int[Tensor, " bins"], base: int, rank: int) -> tuple[int, int, int]:
    """The bin (counted from `base`) with the rank-th entry, the rank within that bin, the number of entries there."""
    cumulative = histogram.cumsum(0)
    digit = int(torch.searchsorted(cumulative, rank))
    n_equal = int(histogram[digit])
    return base + digit, rank - int(cumulative[digit]) + n_equal, n_equal


def _top_digits(scores: Scores) -> Int[Tensor, " bins"]:
    """Histogram of the leading digits of the keys, counted from the lowest; refuses NaN and infinity."""
    first = next(iter(scores.values()))
    half, shift = _BINS // 2, torch.finfo(first.dtype).bits - _DIGIT
    infinite = int(_bits(torch.tensor([math.inf], dtype=first.dtype)) >> shift)  # and NaN lies beyond
    positive, negative = torch.zeros(2, half, dtype=torch.int64, device=first.device)
    for name, values in scores.items():
        for chunk in values.reshape(-1).split(_CHUNK):
            counts = torch.bincount(_bits(chunk).bitwise_right_shift_(shift).bitwise_and_(_BINS - 1))
            positive[: len(counts)] += counts[:half]
            negative[: max(0, len(counts) - half)] += counts[half:]
        if positive[infinite:].any() or negative[infinite:].any():
            raise _not_finite(name)
    return torch.cat([negative.flip(0), positive])  # as bits, negative numbers count backwards


def _between(values: Float[Tensor, "*_"], edges: Sequence[Sequence[float]]) -> Float[Tensor, " n"]:
    """The values in any of the intervals [low, high)."""

    def inside(chunk: Any) -> Any:
        return reduce(or_, ((chunk >= low) & (chunk < high) for low, high in edges))

    return torch.cat([torch.as_tensor(chunk[inside(chunk)]) for chunk in _chunks(values)])


def _bits(values: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The bit patterns, in memory of their own; adding zero makes -0.0 and 0.0 one pattern."""
    return (values + 0.0).view(_INTEGER[values.dtype])


def _value(key: int, dtype: torch.dtype) -> float:
    """The float whose key this is."""
    return _flip(torch.tensor(key, dtype=_INTEGER[dtype])).view(dtype).item()


def _flip(bits: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Sign and magnitude to two's complement and back, so that integers are in the order of the floats."""
    info = torch.iinfo(bits.dtype)
    return bits ^ ((bits >> (info.bits - 1)) & info.max)


def _blank(scores: Scores) -> Kept:
    """Masks to be written."""
    return {name: torch.empty(s.shape, dtype=torch.bool, device=s.device) for name, s in scores.items()}


def _chunks(values: Tensor) -> Iterator[Any]:
    yield from map(_array, values.reshape(-1).split(_CHUNK))


def _rows(values: Tensor) -> tuple[Tensor, ...]:
    return values.split(max(1, _CHUNK // values.shape[1]))


def _array(values: Tensor) -> Any:
    """The same memory, on a CPU as a NumPy array, which compares faster there."""
    return values.detach().numpy() if values.device.type == "cpu" else values.detach()


def _number(mask: Any) -> int:
    """How many entries are True."""
    return int(np.count_nonzero(mask) if isinstance(mask, np.ndarray) else mask.sum())


def _check_finite(name: str, values: Any) -> None:
    if not (abs(values) < math.inf).all():
        raise _not_finite(name)


def _not_finite(name: str) -> ValueError:
    return ValueError(f"layer '{name}': scores must be finite, got NaN or infinity")
