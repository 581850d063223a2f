"""Grid: a table ready to be printed, and the formats it is printed in."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

MISSING = "–"


@dataclass(frozen=True)
class Line:
    """One row of a grid: its label, its cells, and which of them are the best."""

    label: str
    cells: tuple[str, ...]
    best: tuple[bool, ...]


@dataclass(frozen=True)
class Grid:
    """A table ready to be printed in any format.

    Attributes:
        title: its caption.
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
        [line.label, *(f"**{cell}**" if best else cell for cell, best in zip(line.cells, line.best, strict=True))]
        for block in grid.blocks
        for line in block
    ]
    table = [[only, *labels], *body]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]

    def join(row: list[str]) -> str:
        first, *others = (
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        return "| " + " | ".join([first, *others]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([f"### {grid.title}", "", join(table[0]), rule, *(join(row) for row in body)])


def latex(grid: Grid) -> str:
    """The grid as a booktabs table."""
    n = sum(len(names) for _, names in grid.groups)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_tex(grid.title)}}}",
        rf"\begin{{tabular}}{{l{'r' * n}}}",
        r"\toprule",
    ]
    if any(group for group, _ in grid.groups):
        spans, rules, start = [], [], 2
        for group, names in grid.groups:
            spans.append(rf"\multicolumn{{{len(names)}}}{{c}}{{{_tex(group)}}}")
            rules.append(rf"\cmidrule(lr){{{start}-{start + len(names) - 1}}}")
            start += len(names)
        lines += [" & " + " & ".join(spans) + r" \\", " ".join(rules)]
    lines.append(" & " + " & ".join(_tex(name) for _, names in grid.groups for name in names) + r" \\")
    for block in grid.blocks:
        lines.append(r"\midrule")
        for line in block:
            cells = [
                rf"\textbf{{{_tex(cell)}}}" if best else _tex(cell)
                for cell, best in zip(line.cells, line.best, strict=True)
            ]
            lines.append(" & ".join([_tex(line.label), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"])


def _tex(text: str) -> str:
    for plain, tex in (("%", r"\%"), ("_", r"\_"), ("&", r"\&"), ("#", r"\#"), (" ± ", r" $\pm$ "), (MISSING, "--")):
        text = text.replace(plain, tex)
    return text


def html_table(grid: Grid) -> str:
    """The grid as an HTML table."""
    groups = "".join(f'<th colspan="{len(names)}">{html.escape(group)}</th>' for group, names in grid.groups)
    names = "".join(f"<th>{html.escape(name)}</th>" for _, names in grid.groups for name in names)
    bodies = []
    for block in grid.blocks:
        lines = []
        for line in block:
            cells = [
                f"<b>{html.escape(c)}</b>" if b else html.escape(c) for c, b in zip(line.cells, line.best, strict=True)
            ]
            lines.append(f"<tr><th>{html.escape(line.label)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
        bodies.append("<tbody>\n" + "\n".join(lines) + "\n</tbody>")
    head = f"<thead>\n<tr><th></th>{groups}</tr>\n<tr><th></th>{names}</tr>\n</thead>"
    return "\n".join(["<table>", f"<caption>{html.escape(grid.title)}</caption>", head, *bodies, "</table>"])


def terminal(grid: Grid, console: Console) -> list[Table]:
    """The grid as tables that fit a console: one, or one per sparsity where that is too wide."""
    whole = _table(grid, range(len(grid.groups)))
    unbound = console.options.update(max_width=10_000)  # what is measured is otherwise cut to the console
    if console.measure(whole, options=unbound).maximum <= console.width:
        return [whole]
    return [_table(grid, [i]) for i in range(len(grid.groups))]


def _table(grid: Grid, shown: Sequence[int]) -> Table:
    # A sparsity stands over the first column of its group; an empty column parts the groups.
    table = Table(title=grid.title, title_justify="left", title_style="bold", box=box.HORIZONTALS, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for i in shown:
        group, names = grid.groups[i]
        if i != shown[0]:
            table.add_column("", width=1)
        for j, name in enumerate(names):
            table.add_column(f"{group if j == 0 else ''}\n{name}", justify="right", no_wrap=True)
    starts = list(accumulate((len(names) for _, names in grid.groups), initial=0))
    for block in grid.blocks:
        for line in block:
            row = [Text(line.label)]
            for i in shown:
                row += [Text()] if i != shown[0] else []
                for j in range(starts[i], starts[i + 1]):
                    row.append(Text(line.cells[j], style="bold" if line.best[j] else ""))
            table.add_row(*row, end_section=line is block[-1])
    return table
