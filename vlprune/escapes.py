"""Plain texts made literal in each format that is written: names of models, data and settings may hold anything.

Every function returns one line: white space is a single space, and what no format can hold, or a terminal would obey
(control characters, lone surrogates, marks that change the direction of writing), is "?".
"""

from __future__ import annotations

import html as _html
import re

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
_MARKDOWN = str.maketrans({c: f"\\{c}" for c in r"\`*[]|~$#"} | {"&": "&amp;", "<": "&lt;", ">": "&gt;"})
_LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {c: f"{{{c}}}" for c in "[*"}  # else options of the end of the row above
    | {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "|": r"\textbar{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "±": r"$\pm$",
        "–": "--",
    }
)


def terminal(text: str) -> str:
    """A text for a terminal that is told to read no markup, as rich's `Text` and `markup=False` do."""
    return _UNPRINTABLE.sub("?", " ".join(text.split()))


def reason(error: BaseException) -> str:
    """What an error of a library says, as the end of a line of ours: one line that is not long."""
    return terminal(str(error))[:300] or type(error).__name__


def markdown(text: str) -> str:
    """A text in a heading, a paragraph or a cell; underscores inside words are literal there anyway."""
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\_", terminal(text).translate(_MARKDOWN))


def markdown_code(text: str) -> str:
    """A text as a span of code of Markdown, between more backticks than it has in a row."""
    line = terminal(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    pad = " " if len(fence) > 1 else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def latex(text: str) -> str:
    """A text in a paragraph or a cell of LaTeX, its hyphens as they are."""
    return terminal(text).translate(_LATEX)


def html(text: str) -> str:
    """A text between tags, or in a quoted attribute."""
    return _html.escape(terminal(text))


def figure(text: str) -> str:
    """A text that matplotlib draws, without formulas."""
    return terminal(text).replace("$", r"\$")
