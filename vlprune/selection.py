"""Exact selection of the entries with the lowest scores, over any number of tensors.

The k-th lowest score is found by a radix histogram over the bit patterns of the floats, streamed in chunks: scores are
never concatenated nor sorted, the memory is that of the bins, and the counts are integers, so that the result depends
neither on threads nor on the order of summation. Of equal scores, those with the lowest (layer, flat index) go first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

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
        One {layer name: bool (out, in)} a sparsity, True = kept.

    Raises:
        ValueError: for a NaN or infinite score (with the layer's name), another dtype, an unknown `within`, a missing
            modality, a sparsity outside [0, 1).
    """
    for sparsity in sparsities:
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    _check_dtypes(scores)
    if within == "row":
        return _select_rows(scores, sparsities)
    groups = _groups(scores, within, modality)
    sizes = [sum(scores[name].numel() for name in group) for group in groups]
    shares = [_shares(sizes, sparsity).tolist() for sparsity in sparsities]
    return _select_groups(scores, groups, shares)


def select_counts(scores: Scores, n_pruned: Mapping[str, int]) -> Kept:
    """Entries to keep for one allocation; see `select_counts_many`."""
    return select_counts_many(scores, [n_pruned])[0]


def select_counts_many(scores: Scores, n_pruned: Sequence[Mapping[str, int]]) -> list[Kept]:
    """Entries to keep when every layer's number of pruned entries is given.

    Args:
        scores: as in `select_many`.
        n_pruned: allocations, each {layer name: number of entries to prune} for exactly the layers of `scores`.

    Returns:
        One {layer name: bool, shape of the scores} an allocation, True = kept.
    """
    _check_dtypes(scores)
    for allocation in n_pruned:
        if allocation.keys() != scores.keys():
            odd = sorted(allocation.keys() ^ scores.keys())
            raise ValueError(f"an allocation must name exactly the scored layers, these are only in one of them: {odd}")
        for name, count in allocation.items():
            if not 0 <= count <= scores[name].numel():
                raise ValueError(f"layer '{name}': cannot prune {count} of {scores[name].numel()} entries")
    shares = [[allocation[name] for name in scores] for allocation in n_pruned]
    return _select_groups(scores, [[name] for name in scores], shares)


def select_lowest(scores: Scores, n_pruned: int) -> Kept:
    """Entries to keep when `n_pruned` entries of the whole model go; scores and errors as in `select_many`."""
    _check_dtypes(scores)
    total = sum(values.numel() for values in scores.values())
    if not 0 <= n_pruned <= total:
        raise ValueError(f"cannot prune {n_pruned} of {total} entries")
    return _select_groups(scores, [list(scores)], [[n_pruned]])[0]


def _check_dtypes(scores: Scores) -> None:
    dtypes = {name: values.dtype for name, values in scores.items()}
    for name, dtype in dtypes.items():
        if dtype not in _INTEGER:
            raise ValueError(f"layer '{name}': scores must be float32 or float64, got {dtype}")
    if len(set(dtypes.values())) > 1:
        raise ValueError(f"scores that compete must have one dtype, got {dtypes}")


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


def _shares(sizes: Sequence[int], sparsity: float) -> Int[np.ndarray, " groups"]:
    """Entries to prune in each group: together round(sparsity * N), by largest remainder."""
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


def _select_groups(scores: Scores, groups: Sequence[Sequence[str]], shares: Sequence[Sequence[int]]) -> list[Kept]:
    """Masks for each of `shares`, a list with the number of entries to prune in each group."""
    kept: list[Kept] = [{} for _ in shares]
    for i, group in enumerate(groups):
        parts = {name: scores[name] for name in group}
        for masks, cut in zip(kept, _cuts(parts, [share[i] for share in shares])):
            masks.update(_apply_cut(parts, cut))
    return [{name: masks[name] for name in scores} for masks in kept]


def _select_rows(scores: Scores, sparsities: Sequence[float]) -> list[Kept]:
    sizes = [size for values in scores.values() for size in [values.shape[1]] * len(values)]
    shares = [torch.from_numpy(_shares(sizes, sparsity)) for sparsity in sparsities]
    n_rows = [len(values) for values in scores.values()]
    kept: list[Kept] = [{} for _ in sparsities]
    for i, (name, values) in enumerate(scores.items()):
        ranks = _row_ranks(name, values)
        for masks, share in zip(kept, shares):
            masks[name] = ranks >= share.split(n_rows)[i].to(ranks.device)[:, None]
    return kept


def _row_ranks(name: str, values: Float[Tensor, "out in"]) -> Int[Tensor, "out in"]:
    """Place of every entry in the ascending order of its row."""
    ranks = torch.empty(values.shape, dtype=torch.int32, device=values.device)
    places = torch.arange(values.shape[1], dtype=torch.int32, device=values.device)
    step = max(1, _CHUNK // values.shape[1])
    for part, rows in zip(ranks.split(step), values.split(step)):
        if not rows.isfinite().all():
            raise _not_finite(name)
        part.scatter_(1, rows.argsort(dim=1, stable=True), places.expand_as(rows))
    return ranks


def _apply_cut(scores: Scores, cut: _Cut) -> Kept:
    left = cut.n_tied
    kept: Kept = {}
    for name, values in scores.items():
        kept[name] = (values >= cut.value).contiguous()
        for mask, chunk in zip(_chunks(kept[name]), _chunks(values)):
            if left == 0:
                break
            tied = (chunk == cut.value).nonzero().flatten()[:left]
            mask[tied] = False
            left -= len(tied)
    return kept


def _cuts(scores: Scores, counts: Sequence[int]) -> list[_Cut]:
    """Where to cut the scores of one group so that each of `counts` entries fall."""
    wanted = sorted({count for count in counts if count > 0})
    first = sum(_top_digits(name, values) for name, values in scores.items())
    if not isinstance(first, Tensor):  # no layers
        return [_Cut(-math.inf, 0) for _ in counts]
    dtype = next(iter(scores.values())).dtype
    # For each count: the leading digits of its key, its rank among the entries that share them, and their number.
    found = {count: _descend(first, -(_BINS // 2), count) for count in wanted}
    for shift in range(torch.finfo(dtype).bits - 2 * _DIGIT, -1, -_DIGIT):
        prefixes = sorted({prefix for prefix, _, _ in found.values()})
        histograms = {prefix: torch.zeros(_BINS, dtype=torch.int64, device=first.device) for prefix in prefixes}
        for values in scores.values():
            for chunk in _chunks(values):
                keys = _keys(chunk)
                leading = keys >> (shift + _DIGIT)
                for prefix, histogram in histograms.items():
                    digits = (keys[leading == prefix] >> shift) & (_BINS - 1)
                    histogram += torch.bincount(digits, minlength=_BINS)
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


def _top_digits(name: str, values: Float[Tensor, "*_"]) -> Int[Tensor, " bins"]:
    """Histogram of the leading digits of one layer; NaN and infinity show in the bins beyond the finite ones."""
    histogram = torch.zeros(_BINS, dtype=torch.int64, device=values.device)
    shift = torch.finfo(values.dtype).bits - _DIGIT
    for chunk in _chunks(values):
        histogram += torch.bincount((_keys(chunk) >> shift) + _BINS // 2, minlength=_BINS)
    limits = torch.tensor([-math.inf, math.inf], dtype=values.dtype)
    low, high = ((_keys(limits) >> shift) + _BINS // 2).tolist()
    if histogram[: low + 1].any() or histogram[high:].any():
        raise _not_finite(name)
    return histogram


def _keys(values: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Signed integers in the order of the values; adding zero makes -0.0 and 0.0 one key."""
    return _flip((values + 0.0).view(_INTEGER[values.dtype]))


def _value(key: int, dtype: torch.dtype) -> float:
    """The float whose key this is."""
    return _flip(torch.tensor(key, dtype=_INTEGER[dtype])).view(dtype).item()


def _flip(bits: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Sign and magnitude to two's complement and back: only negative numbers change."""
    info = torch.iinfo(bits.dtype)
    return bits ^ ((bits >> (info.bits - 1)) & info.max)


def _chunks(values: Tensor) -> Iterator[Tensor]:
    yield from values.reshape(-1).split(_CHUNK)


def _not_finite(name: str) -> ValueError:
    return ValueError(f"layer '{name}': scores must be finite, got NaN or infinity")
