"""Grid: a table ready to be printed, and the formats it is printed in."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import pandas as pd
from pandas.io.formats.style import Styler
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlprune import escapes

MISSING = "–"
ONE_COLUMN = 48  # characters of a table that a column of two holds in small print


@dataclass(frozen=True)
class Line:
    """One row of a grid: its label, its cells, and which of them are the best."""

    label: str
    cells: tuple[str, ...]
    best: tuple[bool, ...]


@dataclass(frozen=True)
class Grid:
    """A table ready to be printed in any format; all texts are plain, and each format escapes them.

    Attributes:
        title: caption.
        groups: (label, column labels) from left to right.
        blocks: rows, with a rule between blocks.
    """

    title: str
    groups: tuple[tuple[str, tuple[str, ...]], ...]
    blocks: tuple[tuple[Line, ...], ...]


def markdown(grid: Grid) -> str:
    """The grid as a GitHub table under a heading; the sparsity stands in every column label."""
    labels = [
        f"{group} {name}".strip() if len(grid.groups) > 1 else name for group, names in grid.groups for name in names
    ]
    only = grid.groups[0][0] if len(grid.groups) == 1 else ""
    body = [
        [
            escapes.markdown(line.label),
            *(f"**{cell}**" if best else cell for cell, best in zip(map(escapes.markdown, line.cells), line.best)),
        ]
        for block in grid.blocks
        for line in block
    ]
    table = [[escapes.markdown(text) for text in (only, *labels)], *body]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]

    def join(row: list[str]) -> str:
        first, *others = (
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        return "| " + " | ".join([first, *others]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([f"### {escapes.markdown(grid.title)}", "", join(table[0]), rule, *(join(row) for row in body)])


def latex(grid: Grid, label: str = "table") -> str:
    """The grid as a floating table of LaTeX's booktabs and graphicx, over one column or, where it is wide, over two.

    It is made smaller where it is wider than the column.

    Args:
        grid: the table; its title is the caption.
        label: what `\\ref` calls it, after "tab:".
    """
    widest = [max(map(len, column)) for column in zip(*_rows(grid), strict=True)]
    text = _styler(grid, escapes.latex, bold="textbf: --rwrap;", rule="\\midrule\n").to_latex(
        caption=escapes.latex(grid.title),
        label=f"tab:{re.sub(r'[^0-9A-Za-z:-]+', '-', label)}",
        column_format="l" + "r" * sum(len(names) for _, names in grid.groups),
        environment="table*" if sum(widest) + 2 * len(widest) > ONE_COLUMN else "table",
        position_float="centering",
        hrules=True,
        multicol_align="c",
    )
    if _grouped(grid):
        ends = list(accumulate((len(names) for _, names in grid.groups), initial=1))
        rules = (rf"\cmidrule(lr){{{start + 1}-{end}}}" for start, end in pairwise(ends))
        text = text.replace("\\\\\n", "\\\\\n" + " ".join(rules) + "\n", 1)  # below the first row, the groups' labels
    fitted = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
    text = text.replace(r"\begin{tabular}", f"{fitted}\n\\begin{{tabular}}", 1)
    return text.replace(r"\end{tabular}", "\\end{tabular}}", 1).rstrip("\n")


def _rows(grid: Grid) -> list[tuple[str, ...]]:
    """The texts of the grid, with the labels of columns and rows."""
    lines = [line for block in grid.blocks for line in block]
    return [("", *(name for _, names in grid.groups for name in names)), *((line.label, *line.cells) for line in lines)]


def html_table(grid: Grid) -> str:
    """The grid as an HTML table with a style sheet of its own."""
    styler = _styler(grid, escapes.html, bold="font-weight: bold;", rule="")
    rules = ["border-top: 1px solid;" if i in _starts(grid) else "" for i in range(sum(map(len, grid.blocks)))]
    styler.apply(lambda _: rules).apply_index(lambda _: rules, axis="index")
    styler.set_caption(escapes.html(grid.title))
    styler.set_table_styles(
        [
            {"selector": "", "props": "border-collapse: collapse; border-bottom: 1px solid; margin-bottom: 2em;"},
            {"selector": "caption", "props": "text-align: left; font-weight: bold; padding-bottom: 0.4em;"},
            {"selector": "thead", "props": "border-top: 1px solid;"},
            {"selector": "th", "props": "padding: 0.15em 0.6em; font-weight: normal; white-space: nowrap;"},
            {"selector": "td", "props": "padding: 0.15em 0.6em; text-align: right; white-space: nowrap;"},
            {"selector": "th.row_heading", "props": "text-align: left;"},
            {"selector": "th.col_heading", "props": "text-align: right;"},
            {"selector": "th[colspan]", "props": "text-align: center;"},
        ]
    )
    # Style sheets of one page are told apart by the names of their tables; a name is the same each time.
    name = hashlib.sha256(grid.title.encode(errors="surrogatepass")).hexdigest()[:8]
    return styler.to_html(table_uuid=name).rstrip("\n")


def paragraph(text: str, form: str) -> str:
    """A plain sentence as a paragraph of "markdown", "latex" or "html"."""
    if form == "html":
        return f"<p>{escapes.html(text)}</p>"
    return escapes.markdown(text) if form == "markdown" else escapes.latex(text)


def _grouped(grid: Grid) -> bool:
    return any(group for group, _ in grid.groups)


def _starts(grid: Grid) -> list[int]:
    # Numbers of the rows that begin a block.
    return list(accumulate(map(len, grid.blocks[:-1]), initial=0))


def _styler(grid: Grid, escape: Callable[[str], str], *, bold: str, rule: str) -> Styler:
    """The grid with all texts but the caption escaped.

    Args:
        grid: the table; its rows and columns are numbered here, so that two may have one label.
        escape: makes a plain text literal in the format.
        bold: CSS of the best cells.
        rule: what stands before the first label of every block but the first.
    """
    lines = [line for block in grid.blocks for line in block]
    names = [(group, name) for group, (_, names) in enumerate(grid.groups) for name in names]
    columns = pd.MultiIndex.from_tuples([(group, i) for i, (group, _) in enumerate(names)])
    columns = columns if _grouped(grid) else columns.droplevel(0)
    best = pd.DataFrame([[bold if own else "" for own in line.best] for line in lines], columns=columns)
    styler = Styler(pd.DataFrame([line.cells for line in lines], columns=columns), cell_ids=False)
    styler.apply(lambda _: best, axis=None).format(escape)
    ruled = _starts(grid)[1:]
    styler.format_index(lambda i: (rule if i in ruled else "") + escape(lines[i].label), axis="index")
    styler.format_index(lambda i: escape(names[i][1]), axis="columns", level=columns.nlevels - 1)
    if _grouped(grid):
        styler.format_index(lambda group: escape(grid.groups[group][0]), axis="columns", level=0)
    return styler


def terminal(grid: Grid, console: Console) -> list[Table]:
    """The grid as tables that fit a console: one, or one per sparsity where that is too wide."""
    whole = _table(grid, range(len(grid.groups)))
    unbound = console.options.update(max_width=10_000)  # what is measured is otherwise cut to the console
    if console.measure(whole, options=unbound).maximum <= console.width:
        return [whole]
    return [_table(grid, [i]) for i in range(len(grid.groups))]


def _table(grid: Grid, shown: Sequence[int]) -> Table:
    # A sparsity stands over the first column of its group; an empty column parts the groups.
    title = Text(escapes.terminal(grid.title), style="bold")
    table = Table(title=title, title_justify="left", box=box.HORIZONTALS, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for i in shown:
        group, names = grid.groups[i]
        if i != shown[0]:
            table.add_column("", width=1)
        for j, name in enumerate(names):
            over = escapes.terminal(group) if j == 0 else ""
            table.add_column(Text(f"{over}\n{escapes.terminal(name)}"), justify="right", no_wrap=True)
    starts = list(accumulate((len(names) for _, names in grid.groups), initial=0))
    for block in grid.blocks:
        for line in block:
            row = [Text(escapes.terminal(line.label))]
            for i in shown:
                row += [Text()] if i != shown[0] else []
                for j in range(starts[i], starts[i + 1]):
                    row.append(Text(escapes.terminal(line.cells[j]), style="bold" if line.best[j] else ""))
            table.add_row(*row, end_section=line is block[-1])
    return table
