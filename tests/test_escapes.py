"""Plain texts come out literally in every format, whatever they hold."""

import re
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from vlprune import escapes
from vlprune.graph import BipartiteLayer, LayerGraph
from vlprune.masks import Masks
from vlprune.models.card import CardLines, card

# Short ones of characters that mean something somewhere; hypothesis finds few of them by itself.
HOSTILE = st.text(alphabet="ab _-*~^$%#&|{}[]()<>\\`!/\"'@:.=+\n\t\x1b\x07\x00\u202e\ud800é–±", max_size=24)


class Page(HTMLParser):
    """The tags of a page, and what it reads."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


@given(HOSTILE)
def test_a_terminal_gets_one_line_without_orders(text):
    line = escapes.terminal(text)
    assert line.isprintable()
    assert line.encode().decode() == line
    assert len(line) <= len(text)


@settings(max_examples=300)
@given(HOSTILE)
@example("<img src=x onerror=alert(1)>")
@example("a #")
@example("_a_b_ ~~c~~ **d** `e` [f](g) ![h](i) $j$ &lt; | \\")
def test_markdown_reads_as_the_text(text):
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    line, shown = escapes.terminal(text), escapes.markdown(text)
    heading = Page(reader.render(f"# x{shown}"))
    assert (heading.tags, heading.text) == (["h1"], f"x{line}\n")
    table = Page(reader.render(f"| x{shown} | y |\n|---|---|\n| x{shown} | z |"))
    assert (table.tags.count("th"), table.tags.count("td")) == (2, 2)
    assert table.text.count(f"x{line}") >= 2
    code = Page(reader.render(f"- x: {escapes.markdown_code(f'y{text}')}"))
    assert (code.tags, code.text.strip()) == (["ul", "li", "code"], f"x: {escapes.terminal(f'y{text}')}")


@given(HOSTILE)
def test_html_reads_as_the_text(text):
    page = Page(f'<p title="{escapes.html(text)}">{escapes.html(text)}</p>')
    assert (page.tags, page.text) == (["p"], escapes.terminal(text))


@given(HOSTILE)
@example(r"\input{/etc/passwd}")
def test_latex_holds_no_command_but_those_of_characters(text):
    signs = {
        **{f"\\{c}": c for c in "&%$#_{}"},
        **{f"{{{c}}}": c for c in "[*"},
        **{r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^", r"\textbar{}": "|"},
        **{r"\textless{}": "<", r"\textgreater{}": ">", r"$\pm$": "±"},
    }
    one = re.compile("|".join(map(re.escape, sorted(signs, key=len, reverse=True))) + r"|[^&%$#_{}\[*\\~^|<>±]")
    text = text.replace("–", "")
    shown, read = escapes.latex(text), ""
    while shown:
        found = one.match(shown)
        assert found, shown
        read, shown = read + signs.get(found[0], found[0]), shown[found.end() :]
    assert read == escapes.terminal(text)


@pytest.mark.parametrize("text", ["$a^{b$ $ {", r"\$x$", r"\frac{", "\x1b[31m"])
def test_matplotlib_draws_no_formula(text):
    chart = Figure()
    drawn = chart.suptitle(escapes.figure(text))
    chart.draw_without_rendering()
    assert drawn._preprocess_math(drawn.get_text()) == (escapes.terminal(text), False)


def test_a_model_card_shows_hostile_names_literally():
    graph = LayerGraph((BipartiteLayer("a", (1, 2), "text", "text"),))
    masks = Masks({"a": torch.tensor([[True, False]])})
    model = "<img src=x onerror=alert(1)>`x`\n# big 0123"
    text = card(CardLines("x", "load()", "note"), graph, masks, {"model": model, "data": "a`` ` <b>"})
    page = Page(MarkdownIt("commonmark").enable("table").render(text.split("---\n", 2)[2]))
    assert not {"img", "b"} & set(page.tags)
    assert "<img src=x onerror=alert(1)>`x` # big pruned to 50.00 %" in page.text
    assert "data: a`` ` <b>" in page.text
    assert page.tags.count("h1") == 1
