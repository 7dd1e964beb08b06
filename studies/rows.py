"""A list of trials that a notebook draws as a table."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from studies.results import Row
else:
    Row = "Row"


class Leaderboard(list[Row]):
    """The rows of a leaderboard, best first. It is a list; a notebook draws it as a table."""

    def _repr_html_(self) -> str:
        from studies import text

        return html(text.leaderboard(self))


def html(markdown: str) -> str:
    """`markdown` of `studies.text` as HTML. Nothing in it is taken for HTML, because users wrote parts of it."""
    from markdown_it import MarkdownIt

    return str(MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown))
