"""Answers to questions about images: how VQA compares them, and what an answer is worth."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

_NUMBERS = {"none": "0"} | {
    word: str(n)
    for n, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))
}
_ARTICLES = frozenset(("a", "an", "the"))
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_PERIODS = 32  # so many are taken away: the official code gives a flag of this value where the number belongs
# A word that is one of these but for one apostrophe becomes it.
_CONTRACTIONS = (  # noqa: SIM905
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll "
    "why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've"
).split()
_APOSTROPHES = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}


@lru_cache(maxsize=1 << 16)
def normalize(answer: str) -> str:
    """The answer as VQA's official evaluation compares it (Antol et al. 2015, arXiv:1505.00468).

    Without punctuation, case and articles, with digits for the numbers to ten and apostrophes in contractions.
    A mark goes away next to a space and becomes a space inside a word; if a comma stands between digits, all marks go.
    A period stays only before a digit: the look-behind that the official code meant has no effect there, nor here.
    """
    words = _without_marks(re.sub(r"[\n\t]", " ", answer).strip()).lower().split()
    return " ".join(
        _APOSTROPHES.get(word, word) for word in (_NUMBERS.get(w, w) for w in words) if word not in _ARTICLES
    )


@lru_cache(maxsize=1 << 16)
def _without_marks(text: str) -> str:
    joined = re.search(r"\d,\d", text)
    result = text
    for mark in _MARKS:
        result = result.replace(mark, "" if joined or mark + " " in text or " " + mark in text else " ")
    return re.sub(r"\.(?!\d)", "", result, count=_PERIODS)


def accuracy(answer: str, ground_truths: Sequence[str]) -> float:
    """VQA accuracy of an answer, 0-100, as the official evaluation computes it (Goyal et al. 2017, arXiv:1612.00837).

    The mean over people of min(1, others who gave the same answer / 3). The answer is normalised; people's answers lose
    their punctuation if not all are the same, and are else taken as they are, so that "2" against ten times "two" is
    worth 0. This is what the evaluation server and the code of BLIP, X-VLM and MULTIFLOW do; a later version of VQA's
    own code normalises both sides where people differ, and neither where they agree. People are told apart by
    position.

    Raises:
        ValueError: fewer than two ground truths.
    """
    alike = len(set(ground_truths)) == 1
    return _share(normalize(answer), ground_truths if alike else [_without_marks(truth) for truth in ground_truths])


def normalized_accuracy(answer: str, ground_truths: Sequence[str]) -> float:
    """VQA accuracy of an answer, 0-100, with both sides normalised: "2" against ten times "two" is worth 100.

    It is no published metric and stands beside `accuracy` to tell whether spelling decides.

    Raises:
        ValueError: fewer than two ground truths.
    """
    return _share(normalize(answer), [normalize(truth) for truth in ground_truths])


def _share(answer: str, truths: Sequence[str]) -> float:
    n = len(truths)
    if n < 2:
        raise ValueError(f"VQA accuracy leaves one person out and needs at least 2 answers, got {n}")
    same = sum(truth == answer for truth in truths)
    return 100 * (same * min(1, (same - 1) / 3) + (n - same) * min(1, same / 3)) / n


def exact_match(answer: str, ground_truth: str) -> float:
    """100 if an answer is the only one that is right, as GQA, CLEVR and DAQUAR count, else 0; both are normalised."""
    return 100.0 * (normalize(answer) == normalize(ground_truth))


def answer_type(ground_truths: Sequence[str]) -> str:
    """ "yes_no", "number" or "other", by the answer that most people gave, the first of equals.

    VQA's annotations say it themselves (`answer_type`), not always by this rule.
    """
    counts = Counter(map(normalize, ground_truths))
    common = max(counts, key=lambda answer: counts[answer])
    if common in ("yes", "no"):
        return "yes_no"
    return "number" if re.fullmatch(r"[0-9]+([.,][0-9]+)?", common) else "other"
