"""The report of a study or of one trial: text as Markdown, or one HTML page with figures that needs no network."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from storage import settings
from storage.artifact_store import ArtifactStore
from storage.errors import nearest
from storage.tables import storable
from studies import results, text, trial_report
from studies.content import Content, collect
from studies.errors import StudyError
from studies.registry import StorageLike
from studies.text import Section
from studies.trial_report import TrialContent

if TYPE_CHECKING:
    import plotly.graph_objects as go

Format = Literal["html", "markdown"]

# With this policy the browser blocks every request to another host.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_STYLE = """
:root { color-scheme: light dark; --text: #222; --page: #fff; --line: #ddd; --block: #f6f6f6; --caution: #8a3b00; }
@media (prefers-color-scheme: dark) {
  :root { --text: #ddd; --page: #161616; --line: #444; --block: #242424; --caution: #ffb27a; }
}
@media print {
  :root { color-scheme: light; --text: #000; --page: #fff; --line: #ccc; --block: #f6f6f6; --caution: #8a3b00; }
  figure, tr, pre { break-inside: avoid; } h2 { break-after: avoid; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 1100px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; overflow-wrap: anywhere; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; font-size: 14px; display: block; overflow-x: auto; }
th, td { padding: 0.25rem 0.75rem; border-bottom: 1px solid var(--line); text-align: left; }
pre { background: var(--block); padding: 1rem; overflow-x: auto; font-size: 13px; } code { overflow-wrap: anywhere; }
.cautions li { color: var(--caution); } figure { margin: 1.5rem 0; }
/* The figures' own grey is for pages whose colours they do not know. */
.infolayer text, [class$="tick"] text, .textpoint text { fill: var(--text) !important; }
"""
# On a phone the panels of a figure are one below the other; on paper a figure is as wide as the page.
_SCRIPT = """
const graphs = [...document.querySelectorAll(".js-plotly-plot")];
if (window.matchMedia("(max-width: 600px)").matches) {
  for (const graph of graphs) {
    const axes = Object.keys(graph.layout).filter((key) => /^xaxis\\d*$/.test(key));
    const legend = graph.querySelector(".legend .bg")?.getBBox().height ?? 0;
    const below = 55 + legend, change = { "title.font.size": 13, "margin.b": below };
    if (graph.layout.xaxis.visible !== false) Object.assign(change, { "margin.l": 55, "margin.r": 10 });
    change.height = axes.length > 1 ? 70 + below + 240 * axes.length : graph.layout.height + legend;
    graph.style.height = graph.parentElement.style.height = change.height + "px";
    axes.forEach((axis, at) => {
      const vertical = axis.replace("x", "y"), share = 1 / axes.length;
      if (axes.length === 1) return;
      change[axis + ".domain"] = [0, 1];
      change[axis + ".showticklabels"] = true;
      change[vertical + ".showticklabels"] = true;
      change[vertical + ".domain"] = [1 - (at + 0.65) * share, 1 - at * share];
    });
    Plotly.relayout(graph, change);
  }
}
window.addEventListener("beforeprint", () => graphs.forEach((graph) => Plotly.relayout(graph, { width: 680 })));
window.addEventListener("afterprint", () => graphs.forEach((graph) => Plotly.relayout(graph, { width: null })));
"""


def report(
    name: str,
    storage: StorageLike = None,
    format: Format = "html",
    artifacts: str | Path | None = None,
    *,
    trial: int | None = None,
) -> str:
    """The report of study `name`: the result, what made the difference, and what cannot be concluded.

    With `trial` it is that of the trial with this number, in whatever state: hyperparameters, learning curve, what its
    model answered, attempts, and the end of its log.

    As ``html`` it is one page with figures, which needs no network. As ``markdown`` it has no figures. Learning curves
    and answers are read from `artifacts`, a folder or the URL of an object store, by default that of the settings.

    >>> print(studies.report("digits", format="markdown")[:8])
    # digits

    Raises StudyError if there is no such study, trial or format.
    """
    if format not in (known := get_args(Format)):
        raise StudyError(f"format = {format!r} must be one of {', '.join(known)}{nearest(str(format), known)}")
    # Other versions and other programs may have stored text that no file in UTF-8 can have.
    return storable(_report(name, storage, format, artifacts, trial))


def _report(name: str, storage: StorageLike, format: Format, artifacts: str | Path | None, trial: int | None) -> str:
    if trial is not None:
        of_trial = trial_report.collect(name, trial, storage, artifacts)
        return trial_report.report(of_trial) if format == "markdown" else _html_of_trial(of_trial)
    content = collect(name, storage)
    if format == "markdown":
        return text.report(content)
    return _html(content, settings.load(artifacts=artifacts).artifact_store)


def _html(content: Content, store: ArtifactStore) -> str:
    from studies import figures

    plots = figures.all_figures(
        figures.Subject(
            trials=content.trials,
            definition=content.definition,
            curves=results.curves_of(content.trials, store, figures.CURVES),
            replays=content.replays,
            confirmed=content.confirmed,
            answered=figures.best_answers(content.trials, store, content.class_names),
        )
    )
    return _page(content.definition.name, text.head(content), text.sections(content), plots, before="leaderboard")


def _html_of_trial(content: TrialContent) -> str:
    from studies import figures

    subject = figures.Subject(
        trials=(), definition=content.definition, curves=(content.details.curve,), answered=content.answered
    )
    title = f"Trial {content.details.record.number} of {content.details.study}"
    plots = figures.all_figures(subject, figures.OF_A_TRIAL)
    return _page(title, trial_report.head(content), trial_report.sections(content), plots, before="curve")


def _page(title: str, head: str, sections: Sequence[Section], plots: "dict[str, go.Figure]", *, before: str) -> str:
    """The page; the figures come `before` the section of this name, or at the end."""
    # Importing Plotly takes a moment, and only this function needs it.
    import plotly.offline
    from markdown_it import MarkdownIt

    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    parts = [f"<h1>{html.escape(title)}</h1>", markdown.render(head)]
    drawn = False
    for section in sections:
        if section.name == before:
            parts.append(_figures(plots))
            drawn = True
        body = markdown.render(section.body)
        parts.append(f'<section class="{section.name}">\n<h2>{section.title}</h2>\n{body}</section>')
    if not drawn and plots:
        parts.append(_figures(plots))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}: Trialyard's report</title>
<style>{_STYLE}</style>
<script>{plotly.offline.get_plotlyjs() if plots else ""}</script>
</head>
<body>
{chr(10).join(parts)}
{f"<script>{_SCRIPT}</script>" if plots else ""}
</body>
</html>
"""


def _figures(plots: dict[str, "go.Figure"]) -> str:
    import plotly.io

    config = {"displaylogo": False, "responsive": True}
    drawn = "".join(
        f'<figure id="{name}">'
        + plotly.io.to_html(figure, full_html=False, include_plotlyjs=False, config=config, div_id=f"figure-{name}")
        + "</figure>\n"
        for name, figure in plots.items()
    )
    return f"<section>\n<h2>Figures</h2>\n{drawn or '<p>There is no trial to draw yet.</p>'}\n</section>"
