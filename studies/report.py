"""The report of a study: one HTML file, complete in itself, or Markdown. Everything that a person wrote is escaped."""

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

# The browser itself sees to it that the page asks nobody for anything.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; font-size: 14px; } .wide { overflow-x: auto; }
th, td { padding: 0.25rem 0.75rem; border-bottom: 1px solid #eee; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } td.text, th.text { text-align: left; white-space: normal; }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: 13px; }
li.mind { color: #8a3b00; } .quiet { color: #666; } figure { margin: 1.5rem 0; }
"""


@dataclass(frozen=True, kw_only=True)
class ReportContent:
    """All that a report says, before it has a form."""

    definition: Definition
    status: Status
    findings: Findings
    rows: list[Row]  # complete trials, best first
    environment: dict[str, str]  # what the trials ran on: each value once, with its number of trials where they differ
    trials: Sequence[FrozenTrial]
    replays: Sequence[notebook.Replay]  # where it is the study of the notebook's own results
    made: datetime


def report(name: str, storage: StorageLike = None, format: Format = "html", artifacts: str | Path | None = None) -> str:
    """The report of study `name`: what was found, what made the difference, and what cannot be concluded.

    As ``html`` it is one page with figures that opens without a network; as ``markdown`` it has no figures. Learning
    curves are read below the folder `artifacts`, by default the one of the settings.

    >>> print(studies.report("digits", format="markdown")[:8])
    # digits

    Raises StudyError where there is no such study.
    """
    told = collect(name, storage)
    if format == "markdown":
        return _markdown(told)
    folder = Path(artifacts) if artifacts is not None else settings.load().artifact_folder
    return _html(told, results.curves_of(told.trials, folder, CURVES))


def collect(name: str, storage: StorageLike = None) -> ReportContent:
    """What a report of study `name` says. Raises StudyError where there is none."""
    place = registry.storage_of(storage)
    study = registry.find(name, place)
    definition = from_json(study.definition)
    trials = place.get_all_trials(study.id, deepcopy=False)
    return ReportContent(
        definition=definition,
        status=results.status_of(study, place),
        findings=findings.findings(trials, definition, study.data),
        rows=results.leaderboard(name, place),
        environment=_environment(trials, definition, study.data),
        trials=trials,
        replays=notebook.replays(definition, place),
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
    told = {"images": f"{definition.dataset}: {images or 'unknown'}; fingerprint {data.get('fingerprint', 'unknown')}"}
    for key, title in (("device", "device"), ("precision", "precision"), ("precision_reason", "why that precision")):
        told[title] = _each(trial.user_attrs[key] for trial in trials if key in trial.user_attrs)
    versions: dict[str, list[str]] = {}
    for trial in trials:
        told_versions = trial.user_attrs.get("versions")
        for package, number in (told_versions if isinstance(told_versions, dict) else {}).items():
            versions.setdefault(str(package), []).append(str(number))
    told |= {package: _each(numbers) for package, numbers in sorted(versions.items())}
    return {key: value for key, value in told.items() if value}


def _each(values: Iterable[Any]) -> str:
    counted = Counter(map(str, values))
    if len(counted) <= 1:
        return next(iter(counted), "")
    return ", ".join(f"{value} ({count} trials)" for value, count in counted.most_common())


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The leaderboard's titles and cells, without columns of which nothing is known."""
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
    reasons = (attributes.failure(trial.user_attrs.get("failure")) for trial in failed)
    told = (f"{reason['kind']}: {reason['message']}" for reason in reasons)
    return [f"{reason} ({count})" for reason, count in Counter(told).most_common(20)]


def _left_out(rows: Sequence[Row]) -> str:
    more = len(rows) - SHOWN_ROWS
    return f"{more:,} more are in `trialyard leaderboard`." if more > 0 else ""


# --- Markdown ---------------------------------------------------------------------------------------------


def _markdown(told: ReportContent) -> str:
    definition, escaped = told.definition, notes.escaped
    titles, cells = table(told.rows[:SHOWN_ROWS])
    lines = [
        f"# {escaped(definition.name)}",
        escaped(definition.description),
        f"{counts(told.status)}; {told.made:%Y-%m-%d %H:%M %z}, Trialyard {version('trialyard')}.",
        "## What was found",
        _bullets(told.findings.found),
        "## What made the difference",
        _bullets(told.findings.mattered) or "Nothing can be said of that yet.",
        "## What cannot be concluded",
        _bullets(told.findings.cautions) or "Nothing speaks against the result.",
        "## Leaderboard",
        _rows(titles, cells) if cells else "No trial is complete.",
        _left_out(told.rows),
        *(["## Failures", _bullets(_failed(told.trials))] if told.status.failed else []),
        "## Searched",
        _rows(["hyperparameter", "over"], [[name, span] for name, span in findings.searched(definition).items()]),
        "## Definition",
        notes.fenced(to_toml(definition).rstrip(), "toml"),
        "## Environment",
        _rows(["what", "which"], [[key, value] for key, value in told.environment.items()]),
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


def _html(told: ReportContent, curves: Sequence[results.Curve]) -> str:
    # Plotly takes a moment to import, which only this needs.
    import plotly.io
    import plotly.offline

    from studies import figures

    definition = told.definition
    drawn = figures.drawn(told.trials, definition, curves, told.replays)
    config = {"displaylogo": False}
    shown = "".join(
        f'<figure id="{name}">'
        + plotly.io.to_html(figure, full_html=False, include_plotlyjs=False, config=config, div_id=f"figure-{name}")
        + "</figure>\n"
        for name, figure in drawn.items()
    )
    titles, cells = table(told.rows[:SHOWN_ROWS])
    searched = [[name, span] for name, span in findings.searched(definition).items()]
    searched += [[name, f"fixed: {findings.value_text(value)}"] for name, value in definition.fixed.items()]
    name = html.escape(definition.name)
    failures = f"<h2>Failures</h2>{_list(_failed(told.trials))}" if told.status.failed else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}: Trialyard's report</title>
<style>{_STYLE}</style>
<script>{plotly.offline.get_plotlyjs() if drawn else ""}</script>
</head>
<body>
<h1>{name}</h1>
<p>{html.escape(definition.description)}</p>
<p class="quiet">{html.escape(counts(told.status))}; made {told.made:%Y-%m-%d %H:%M %z} by Trialyard \
{html.escape(version("trialyard"))}</p>
<h2>What was found</h2>
{_list(told.findings.found)}
<h2>What made the difference</h2>
{_list(told.findings.mattered) or "<p>Nothing can be said of that yet.</p>"}
<h2>What cannot be concluded</h2>
{_list(told.findings.cautions, "mind") or "<p>Nothing speaks against the result.</p>"}
<h2>Figures</h2>
{shown or "<p>There is no trial to draw yet.</p>"}
<h2>Leaderboard</h2>
{_html_table(titles, cells) if cells else "<p>No trial is complete.</p>"}
<p class="quiet">{html.escape(_left_out(told.rows))}</p>
{failures}
<h2>Searched and fixed</h2>
{_html_table(["hyperparameter", "over"], searched, text=True)}
<h2>Definition</h2>
<pre>{html.escape(to_toml(definition).rstrip())}</pre>
<h2>Environment</h2>
{_html_table(["what", "which"], [[key, value] for key, value in told.environment.items()], text=True)}
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
