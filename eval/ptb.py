"""The words of a caption as COCO caption evaluation counts them."""

from __future__ import annotations

import re
from functools import lru_cache

# What the protocol drops after tokenising. The published list names the brackets in upper case, so the lower-cased
# ones that the tokenizer makes (-lrb-, -rrb-, ...) stay words, and so do runs such as "!!" or "?!".
_DROPPED = frozenset(("''", '"', "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_TYPOGRAPHY = str.maketrans(
    {"’": "'", "‘": "`", "“": '"', "”": '"', "«": '"', "»": '"', "‹": "`", "›": "`", "–": " - ", "—": " - ", "…": " . "}
    | {"―": " - ", "‐": "-", "‑": "-", "½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 ", "£": " # ", "€": " $ ", "¢": " cents "}
)

# Words that keep a final period wherever they stand: found by trying every sequence of up to four letters, and the
# words of 30,000 captions, on the Java tokenizer.
_ABBREVIATIONS = (
    "adj|adm|adv|al|ala|alex|apr|ariz|assn|assoc|asst|atty|attys|aug|ave|bancorp|bhd|bldg|blvd|brig|bros|calif|capt|"
    "cf|cie|cmdr|co|col|colo|comdr|conn|corp|cos|cpl|ct|dak|dec|dept|det|dr|drs|elec|ens|esq|est|etc|ext|feb|fla|fri|"
    "ft|ga|gen|gov|govs|hon|inc|ind|insp|intl|invt|jan|jos|jr|jul|jun|kan|kans|ky|lieut|lt|ltd|maj|mar|md|messrs|mfg|"
    "mich|minn|mlle|mme|mo|mon|mont|mr|mrs|ms|msgr|mt|mtg|natl|neb|nev|nov|oct|okla|penn|pfc|ph|plc|ppte|ppty|pres|"
    "prof|profs|pte|ptes|pty|ptys|pvt|rd|rep|reps|rev|rt|sen|sens|sep|sept|seq|sfc|sgt|spc|sq|sr|st|ste|supt|sys|tel|"
    "tenn|thu|thurs|treas|tue|tues|univ|va|vs|vt|wed|wis|wisc|wm|wyo"
)
# Words that keep it when they begin with a capital, and words that keep it before a number ("no. 5").
_STATES = "Ark|Az|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash"
_NUMBERING = "art|ca|figs?|nos?|op|pp|prop"
# After a single letter these begin a sentence, so the period belongs to the one before: "plan b. The man ...".
_STARTERS = (
    "A|About|After|An|As|At|But|He|Her|Here|If|In|It|Last|Many|More|Now|Once|One|Other|Our|She|Since|So|Some|Such|"
    "That|The|Their|Then|There|These|They|This|We|What|When|While|Yet|You"
)

_L, _LD = r"[^\W\d_]", r"[^\W_]"  # a letter; a letter or a digit
_CLITIC = r"'(?:s|d|m|ll|re|ve)(?!\w)"
_END = r"(?![\w'-])"
_NT = r"n['`]t(?!\w)"
_WORD = rf"(?:{_L}(?:{_LD}|_)*(?:[.!?]{_L}{_LD}*)*|{_LD}(?:{_LD}|_)*)(?:-{_LD}+)*"
# The first alternative that matches is the token.
_TOKEN = re.compile(
    rf"""
      </?[a-z][^<>]*>                                                              # <unk>
    | https?://[^"<>|]*[^"<>|.,;:!?()'-]
    | [\w.]*\w@\w[\w-]*(?:\.\w+)+ | [#@](?:{_L}|_)\w+                              # e-mail, hashtag, user
    | can(?=not{_END}) | (?:gon|wan)(?=na{_END}) | got(?=ta{_END}) | (?:lem|gim)(?=me{_END}) | 't(?=(?:is|was)(?!\w))
    | {_CLITIC} | '(?:em|till?|cause)(?!\w) | 'n(?!\w)'? | '[1-9]0s | (?<!\w)'\d\d(?!\S) | {_NT}
    | (?:cap'n|o'o|[ldo]'{_LD}{{2,}}|(?-i:[A-HJ-XZn])'{_L}{{2,}})(?!\w) | ol'(?!\w)
    | {_L}+[aeiouy](?!{_CLITIC})'(?:[aeiou]|(?-i:[A-Z])){_L}*                       # hallowe'en
    | [yljd](?!{_CLITIC})'
    | {_L}+(?={_NT})
    | {_WORD}\.(?=[,;:])                                                           # whatever ends in ".,"
    | (?:{_LD}+-)*{_L}(?:\.{_L})+\.?(?:-{_LD}+)*(?!\w|\.\w)                         # t.v. u.s.-based
    | ph\.d\. | (?:{_L}|{_ABBREVIATIONS}|(?=(?-i:[A-Z]))(?:{_STATES}))\.(?!{_L}) | (?:{_NUMBERING})\.(?=\d)
    | (?-i:[A-Z]+(?:&[A-Z]+)+)                                                     # AT&T
    | [+-]?(?:\d+-)?\d+/\d+(?:/\d+)?(?!\w) | {_LD}+(?:/{_LD}+)+                     # 1-1/2, black/white
    | [+-]?\d+(?:[.,:]\d+)+(?:-{_LD}+)* | [+-]?\.?\d+(?!\w|-\w)
    | {_WORD}
    | [?!]+ | \*+ | \#+ | @+ | _+ | << | >>
    | .
    """,
    re.VERBOSE | re.IGNORECASE,
)
_NUMBERED = re.compile(rf"(?:{_NUMBERING})\.", re.IGNORECASE)
_INITIAL, _STARTER = re.compile(rf"{_L}\."), re.compile(_STARTERS)


@lru_cache(maxsize=1 << 16)
def _split(chunk: str) -> tuple[str, ...]:
    """The words of a text without spaces, in lower case."""
    words = (_BRACKETS[word] if word in _BRACKETS else word.lower() for word in _TOKEN.findall(chunk))
    return tuple(word for word in words if word not in _DROPPED)


def words(caption: str) -> list[str]:
    """The words of a caption, lower-cased, without punctuation.

    Equal to the Java PTBTokenizer of Stanford CoreNLP 3.4.1 with `-preserveLines -lowerCase`, minus the punctuation
    that the COCO protocol (Chen et al. 2015, arXiv:1504.00325) drops, on all 29,955 human captions of COCO's Karpathy
    test images and 991 Flickr8k images. Known differences: emoticons, C++ and C#, addresses without http://, telephone
    numbers in brackets, some words written together with a number or a contraction ("isn'tred").

    Args:
        caption: any text; a line break counts as a space.
    """
    chunks = caption.translate(_TYPOGRAPHY).split()
    found: list[str] = []
    for chunk, following in zip(chunks, [*chunks[1:], ""]):
        if following[:1].isdigit() and _NUMBERED.fullmatch(chunk):
            found.append(chunk.lower())
        elif _INITIAL.fullmatch(chunk) and _STARTER.fullmatch(following):
            found.append(chunk[:-1].lower())
        else:
            found.extend(_split(chunk))
    return found
