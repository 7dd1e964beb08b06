"""The report of a study: its text as Markdown, or as one HTML page with figures that needs no network."""

import html
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from storage import settings
from studies import results, text
from studies.content import Content, collect
from studies.registry import StorageLike

if TYPE_CHECKING:
    import plotly.graph_objects as go

Format = Literal["html", "markdown"]

CURVES = 5  # trials in the figure of learning curves

# With this policy the browser blocks every request to another host.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; font-size: 14px; display: block; overflow-x: auto; }
th, td { padding: 0.25rem 0.75rem; border-bottom: 1px solid #eee; text-align: left; }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: 13px; }
.cautions li { color: #8a3b00; } figure { margin: 1.5rem 0; }
"""


def report(name: str, storage: StorageLike = None, format: Format = "html", artifacts: str | Path | None = None) -> str:
    """The report of study `name`: the result, what made the difference, and what cannot be concluded.

    As ``html`` it is one page with figures, which needs no network. As ``markdown`` it has no figures. Learning curves
    are read from the folder `artifacts`, by default the one of the settings.

    >>> print(studies.report("digits", format="markdown")[:8])
    # digits

    Raises StudyError if there is no such study.
    """
    content = collect(name, storage)
    if format == "markdown":
        return text.report(content)
    folder = Path(artifacts) if artifacts is not None else settings.load().artifact_folder
    return _html(content, results.curves_of(content.trials, folder, CURVES))


def _html(content: Content, curves: list[results.Curve]) -> str:
    # Importing Plotly takes a moment, and only this function needs it.
    import plotly.offline
    from markdown_it import MarkdownIt

    from studies import figures

    plots = figures.all_figures(content.trials, content.definition, curves, content.replays)
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    parts = [f"<h1>{html.escape(content.definition.name)}</h1>", markdown.render(text.head(content))]
    for section in text.sections(content):
        if section.name == "leaderboard":
            parts.append(_figures(plots))
        body = markdown.render(section.body)
        parts.append(f'<section class="{section.name}">\n<h2>{section.title}</h2>\n{body}</section>')
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(content.definition.name)}: Trialyard's report</title>
<style>{_STYLE}</style>
<script>{plotly.offline.get_plotlyjs() if plots else ""}</script>
</head>
<body>
{chr(10).join(parts)}
</body>
</html>
"""


def _figures(plots: dict[str, "go.Figure"]) -> str:
    import plotly.io

    config = {"displaylogo": False}
    drawn = "".join(
        f'<figure id="{name}">'
        + plotly.io.to_html(figure, full_html=False, include_plotlyjs=False, config=config, div_id=f"figure-{name}")
        + "</figure>\n"
        for name, figure in plots.items()
    )
    return f"<section>\n<h2>Figures</h2>\n{drawn or '<p>There is no trial to draw yet.</p>'}\n</section>"
