"""The report of a study: one self-contained HTML file, or Markdown. All text that a user wrote is escaped."""

import html
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from optuna.trial import FrozenTrial, TrialState

from storage import attributes, settings
from studies import findings, notebook, notes, registry, results
from studies.definition import Definition, from_json, to_toml
from studies.findings import Findings
from studies.registry import StorageLike
from studies.results import Row, Status

Format = Literal["html", "markdown"]

SHOWN_ROWS = 50  # of the leaderboard
CURVES = 5  # trials in the figure of learning curves

# With this policy the browser blocks every request to another host.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; font-size: 14px; } .wide { overflow-x: auto; }
th, td { padding: 0.25rem 0.75rem; border-bottom: 1px solid #eee; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } td.text, th.text { text-align: left; white-space: normal; }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: 13px; }
li.caution { color: #8a3b00; } .quiet { color: #666; } figure { margin: 1.5rem 0; }
"""


@dataclass(frozen=True, kw_only=True)
class ReportContent:
    """Everything that a report says, before it is rendered."""

    definition: Definition
    status: Status
    findings: Findings
    rows: list[Row]  # complete trials, best first
    environment: dict[str, str]  # what the trials ran on: different values with their numbers of trials
    trials: Sequence[FrozenTrial]
    replays: Sequence[notebook.Replay]  # for the study that has the notebook's own results
    made: datetime


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
        return _markdown(content)
    folder = Path(artifacts) if artifacts is not None else settings.load().artifact_folder
    return _html(content, results.curves_of(content.trials, folder, CURVES))


def collect(name: str, storage: StorageLike = None) -> ReportContent:
    """What a report of study `name` says. Raises StudyError where there is none."""
    opened = registry.storage_of(storage)
    study = registry.find(name, opened)
    definition = from_json(study.definition)
    trials = opened.get_all_trials(study.id, deepcopy=False)
    return ReportContent(
        definition=definition,
        status=results.status_of(study, opened),
        findings=findings.findings(trials, definition, study.data),
        rows=results.leaderboard(name, opened),
        environment=_environment(trials, definition, study.data),
        trials=trials,
        replays=notebook.replays(definition, opened),
        made=datetime.now().astimezone(),
    )


def counts(status: Status) -> str:
    """Trials by state, on one line."""
    return (
        f"{status.complete} complete, {status.pruned} pruned, {status.failed} failed, {status.running} running, "
        f"{status.waiting} waiting, of a budget of {status.budget}"
    )


def _environment(trials: Sequence[FrozenTrial], definition: Definition, data: Mapping[str, Any]) -> dict[str, str]:
    images = ", ".join(
        f"{data[key]:,} {key}" for key in ("train", "validation", "test") if isinstance(data.get(key), int)
    )
    fingerprint = data.get("fingerprint", "unknown")
    environment = {"images": f"{definition.dataset}: {images or 'unknown'}; fingerprint {fingerprint}"}
    for key, title in (("device", "device"), ("precision", "precision"), ("precision_reason", "why that precision")):
        environment[title] = _with_counts(trial.user_attrs[key] for trial in trials if key in trial.user_attrs)
    versions: dict[str, list[str]] = {}
    for trial in trials:
        of_trial = trial.user_attrs.get("versions")
        for package, number in (of_trial if isinstance(of_trial, dict) else {}).items():
            versions.setdefault(str(package), []).append(str(number))
    environment |= {package: _with_counts(numbers) for package, numbers in sorted(versions.items())}
    return {key: value for key, value in environment.items() if value}


def _with_counts(values: Iterable[Any]) -> str:
    """The different values, with how often each occurs if there are several."""
    counted = Counter(map(str, values))
    if len(counted) <= 1:
        return next(iter(counted), "")
    return ", ".join(f"{value} ({count} trials)" for value, count in counted.most_common())


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The leaderboard's titles and cells, without empty columns."""
    names = list(dict.fromkeys(name for row in rows for name in row.params))
    titles = ["rank", "trial", "accuracy", *names, "epochs", "weights", "seconds"]
    cells = [
        [
            str(row.rank),
            str(row.number),
            f"{row.value:.4f}",
            *(findings.value_text(row.params[name]) if name in row.params else "" for name in names),
            "" if row.epochs is None else str(row.epochs),
            "" if row.parameters is None else f"{row.parameters:,}",
            "" if row.seconds is None else f"{row.seconds:.1f}",
        ]
        for row in rows
    ]
    known = [column for column in range(len(titles)) if any(row[column] for row in cells)]
    return [titles[column] for column in known], [[row[column] for column in known] for row in cells]


def _failed(trials: Sequence[FrozenTrial]) -> list[str]:
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    failures = (attributes.failure(trial.user_attrs.get("failure")) for trial in failed)
    reasons = (f"{failure['kind']}: {failure['message']}" for failure in failures)
    return [f"{reason} ({count})" for reason, count in Counter(reasons).most_common(20)]


def _left_out(rows: Sequence[Row]) -> str:
    more = len(rows) - SHOWN_ROWS
    return f"{more:,} more are in `trialyard leaderboard`." if more > 0 else ""


# --- Markdown ---------------------------------------------------------------------------------------------


def _markdown(content: ReportContent) -> str:
    definition, escaped = content.definition, notes.escaped
    titles, cells = table(content.rows[:SHOWN_ROWS])
    lines = [
        f"# {escaped(definition.name)}",
        escaped(definition.description),
        f"{counts(content.status)}; {content.made:%Y-%m-%d %H:%M %z}, Trialyard {version('trialyard')}.",
        "## What was found",
        _bullets(content.findings.best),
        "## What made the difference",
        _bullets(content.findings.influences) or "This is not known yet.",
        "## What cannot be concluded",
        _bullets(content.findings.cautions) or "There are no cautions.",
        "## Leaderboard",
        _rows(titles, cells) if cells else "No trial is complete.",
        _left_out(content.rows),
        *(["## Failures", _bullets(_failed(content.trials))] if content.status.failed else []),
        "## Searched",
        _rows(["hyperparameter", "over"], [[name, text] for name, text in findings.ranges(definition).items()]),
        "## Definition",
        notes.fenced(to_toml(definition).rstrip(), "toml"),
        "## Environment",
        _rows(["what", "which"], [[key, value] for key, value in content.environment.items()]),
    ]
    return "\n\n".join(line for line in lines if line) + "\n"


def _bullets(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {notes.escaped(sentence)}" for sentence in sentences)


def _rows(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *cells]
    return "\n".join(
        "| " + " | ".join(cell if cell == "---" else notes.escaped(cell) for cell in line) + " |" for line in lines
    )


# --- HTML -------------------------------------------------------------------------------------------------


def _html(content: ReportContent, curves: Sequence[results.Curve]) -> str:
    # Importing Plotly takes a moment, and only this function needs it.
    import plotly.io
    import plotly.offline

    from studies import figures

    definition = content.definition
    plots = figures.all_figures(content.trials, definition, curves, content.replays)
    config = {"displaylogo": False}
    figures_html = "".join(
        f'<figure id="{name}">'
        + plotly.io.to_html(figure, full_html=False, include_plotlyjs=False, config=config, div_id=f"figure-{name}")
        + "</figure>\n"
        for name, figure in plots.items()
    )
    titles, cells = table(content.rows[:SHOWN_ROWS])
    ranges = [[name, text] for name, text in findings.ranges(definition).items()]
    ranges += [[name, f"fixed: {findings.value_text(value)}"] for name, value in definition.fixed.items()]
    name = html.escape(definition.name)
    failures = f"<h2>Failures</h2>{_list(_failed(content.trials))}" if content.status.failed else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}: Trialyard's report</title>
<style>{_STYLE}</style>
<script>{plotly.offline.get_plotlyjs() if plots else ""}</script>
</head>
<body>
<h1>{name}</h1>
<p>{html.escape(definition.description)}</p>
<p class="quiet">{html.escape(counts(content.status))}; made {content.made:%Y-%m-%d %H:%M %z} by Trialyard \
{html.escape(version("trialyard"))}</p>
<h2>What was found</h2>
{_list(content.findings.best)}
<h2>What made the difference</h2>
{_list(content.findings.influences) or "<p>This is not known yet.</p>"}
<h2>What cannot be concluded</h2>
{_list(content.findings.cautions, "caution") or "<p>There are no cautions.</p>"}
<h2>Figures</h2>
{figures_html or "<p>There is no trial to draw yet.</p>"}
<h2>Leaderboard</h2>
{_html_table(titles, cells) if cells else "<p>No trial is complete.</p>"}
<p class="quiet">{html.escape(_left_out(content.rows))}</p>
{failures}
<h2>Searched and fixed</h2>
{_html_table(["hyperparameter", "over"], ranges, text=True)}
<h2>Definition</h2>
<pre>{html.escape(to_toml(definition).rstrip())}</pre>
<h2>Environment</h2>
{_html_table(["what", "which"], [[key, value] for key, value in content.environment.items()], text=True)}
</body>
</html>
"""


def _list(sentences: Iterable[str], kind: str = "") -> str:
    items = "\n".join(f'<li class="{kind}">{html.escape(sentence)}</li>' for sentence in sentences)
    return f"<ul>\n{items}\n</ul>" if items else ""


def _html_table(titles: Sequence[str], cells: Sequence[Sequence[str]], text: bool = False) -> str:
    kind = ' class="text"' if text else ""
    head = "".join(f"<th{kind}>{html.escape(title)}</th>" for title in titles)
    body = "\n".join("<tr>" + "".join(f"<td{kind}>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in cells)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
