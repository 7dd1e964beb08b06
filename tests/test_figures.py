"""Every figure has data and shows it correctly; missing data omits a figure, and breaks none."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState

from studies import definition as definitions
from studies import figures, notebook, results
from studies.definition import Definition, parse

COMPLETE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL
BEGAN = datetime(2026, 1, 1)


@pytest.fixture
def digits() -> Definition:
    """Depth and dropout are searched."""
    return definitions.load("digits")


@pytest.fixture
def trial(digits: Definition) -> Callable[..., FrozenTrial]:
    """A finished trial of `digits`, one minute after the other."""

    def make(number: int, state: TrialState, value: float | None, **attrs: Any) -> FrozenTrial:
        definition = attrs.pop("definition", digits)
        params = attrs.pop("params", {"depth": (3, 5, 7)[number % 3], "dropout": number / 20})
        return FrozenTrial(
            number=number,
            state=state,
            value=value,
            datetime_start=BEGAN + timedelta(minutes=number),
            datetime_complete=BEGAN + timedelta(minutes=number + 1),
            params=params,
            distributions={name: definition.space[name].distribution() for name in params},
            user_attrs=attrs,
            system_attrs={},
            intermediate_values={1: 0.5, 2: value or 0.4} if state != FAIL else {},
            trial_id=number + 100,
        )

    return make


@pytest.fixture
def trials(trial: Callable[..., FrozenTrial]) -> list[FrozenTrial]:
    """Six complete trials, a pruned one and a failed one."""
    values = (0.90, 0.92, 0.91, 0.95, 0.93, 0.94)
    complete = [
        trial(n, COMPLETE, value, parameters=1000 * (6 - n), seconds=10.0 + n, history=f"digits/{n}/history.json")
        for n, value in enumerate(values)
    ]
    return [*complete, trial(6, PRUNED, 0.6), trial(7, FAIL, None)]


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    """A folder with the histories of trials 3 and 5, of which that of 5 is broken."""
    history = [
        {"epoch": e, "loss": 1 / e, "accuracy": 0.9, "val_loss": 2 / e, "val_accuracy": 0.8, "seconds": 1.0}
        for e in (1, 2, 3)
    ]
    for number, text in ((3, json.dumps(history)), (5, '{"epoch": 1}')):
        (tmp_path / "digits" / str(number)).mkdir(parents=True)
        (tmp_path / "digits" / str(number) / "history.json").write_text(text, encoding="utf-8")
    return tmp_path


def _trace(figure: Any, name: str) -> Any:
    (trace_of_name,) = [trace for trace in figure.data if trace.name == name]
    return trace_of_name


def test_every_figure_of_a_finished_study_has_data(
    trials: list[FrozenTrial], digits: Definition, artifacts: Path
) -> None:
    plots = figures.all_figures(trials, digits, results.curves_of(trials, artifacts))
    assert set(plots) == {"learning-curves", "dropout", "cost", "progress"}  # digits is not the notebook's
    for figure in plots.values():
        assert all(len(trace.x) == len(trace.y) > 0 for trace in figure.data)
        # An older dashboard's Plotly cannot read packed arrays.
        assert "bdata" not in figure.to_json()


def test_curves_are_those_of_the_history_best_trial_first(trials: list[FrozenTrial], artifacts: Path) -> None:
    curves = results.curves_of(trials, artifacts)
    assert [curve.number for curve in curves] == [3, 5, 4, 1, 2, 0, 6]
    assert (curves[0].loss, curves[0].val_loss) == ((1.0, 1 / 2, 1 / 3), (2.0, 1.0, 2 / 3))
    # If a history is broken or on another machine, the database's values are used.
    assert (curves[1].loss, curves[1].val_accuracy) == ((), (0.5, 0.94))
    assert (curves[-1].state, curves[-1].val_accuracy) == ("pruned", (0.5, 0.6))
    assert len(results.curves_of(trials, artifacts, 2)) == 2


def test_losses_are_drawn_as_in_the_notebook(trials: list[FrozenTrial], digits: Definition, artifacts: Path) -> None:
    figure = figures.learning_curves(results.curves_of(trials, artifacts), digits)
    assert list(_trace(figure, "trial 3, training").y) == [1.0, 1 / 2, 1 / 3]
    assert list(_trace(figure, "trial 3, validation").x) == [1, 2, 3]
    assert len(figure.data) == 2


def test_without_any_history_the_accuracy_by_epoch_is_drawn(
    trials: list[FrozenTrial], digits: Definition, tmp_path: Path
) -> None:
    figure = figures.learning_curves(results.curves_of(trials, tmp_path), digits)
    assert list(_trace(figure, "trial 3").y) == [0.5, 0.95]
    assert "not on this machine" in figure.layout.title.text


def test_accuracy_against_dropout_has_a_colour_a_depth_and_marks_pruned_trials(
    trials: list[FrozenTrial], digits: Definition
) -> None:
    figure = figures.against_hyperparameter(trials, digits)
    assert figure.layout.xaxis.title.text == "dropout"
    names = ["depth 3", "depth 3, pruned", "depth 5", "depth 7"]
    assert [trace.name for trace in figure.data] == names
    assert len({_trace(figure, name).marker.color for name in ("depth 3", "depth 5", "depth 7")}) == 3
    assert _trace(figure, "depth 3").marker.color == _trace(figure, "depth 3, pruned").marker.color
    assert _trace(figure, "depth 3").marker.symbol != _trace(figure, "depth 3, pruned").marker.symbol
    assert (list(_trace(figure, "depth 5").x), list(_trace(figure, "depth 5").y)) == ([1 / 20, 4 / 20], [0.92, 0.93])
    assert list(_trace(figure, "depth 3, pruned").y) == [0.6]


@pytest.mark.parametrize(
    ("space", "params", "title", "kind"),
    [
        ("learning_rate = { low = 1e-4, high = 1e-2, log = true }", {"learning_rate": 1e-3}, "learning rate", "log"),
        ("dense_dropout = { low = 0.0, high = 0.5 }", {"dense_dropout": 0.1}, "dense dropout", None),
        ('optimizer = { choices = ["adam", "sgd"] }', {"optimizer": "sgd"}, "optimizer", "category"),
    ],
)
def test_without_dropout_another_hyperparameter_is_drawn(
    trial: Callable[..., FrozenTrial], space: str, params: dict[str, Any], title: str, kind: str | None
) -> None:
    definition = parse(f'name = "x"\ndataset = "digits"\nmodel = "mnist_cnn"\n[budget]\ntrials = 2\n[space]\n{space}')
    one = trial(0, COMPLETE, 0.9, params=params, definition=definition)
    figure = figures.against_hyperparameter([one], definition)
    assert (figure.layout.xaxis.title.text, figure.layout.xaxis.type) == (title, kind)
    assert list(figure.data[0].x) == list(params.values())


def test_a_single_trial_has_axes_of_possible_values(trial: Callable[..., FrozenTrial], digits: Definition) -> None:
    one = [trial(0, COMPLETE, 0.9)]
    low, high = figures.best_so_far(one, digits).layout.yaxis.range
    assert 0.8 < low < 0.9 < high < 1.0
    low, high = figures.against_hyperparameter(one, digits).layout.xaxis.range
    assert -0.1 < low < 0.0 < 0.7 < high < 0.8


def test_the_pareto_front_is_cheapest_first_and_nothing_beats_it(trials: list[FrozenTrial], digits: Definition) -> None:
    complete = trials[:6]

    def cost(trial: FrozenTrial) -> float:
        return float(trial.user_attrs["parameters"])

    front = figures.pareto(complete, cost)
    assert [trial.number for trial in front] == [5, 3]
    for one in front:
        assert not any(
            cost(t) <= cost(one) and t.values[0] >= one.values[0] and t.number != one.number for t in complete
        )
    figure = figures.against_cost(trials, digits)
    seconds = [trace for trace in figure.data if trace.name == "Pareto front"][1]
    assert (list(seconds.x), list(seconds.y)) == ([10.0, 11.0, 13.0], [0.90, 0.92, 0.95])


def test_best_so_far_never_falls_and_ends_with_the_last_trial(trials: list[FrozenTrial], digits: Definition) -> None:
    figure = figures.best_so_far(trials, digits)
    by_count, by_time = figure.data
    assert list(by_count.x) == [1, 2, 4, 8]
    assert list(by_count.y) == list(by_time.y) == [0.90, 0.92, 0.95, 0.95]
    assert list(by_time.x) == pytest.approx([1.0, 2.0, 4.0, 8.0])
    assert figure.layout.xaxis2.title.text == "minutes since the first start"


@pytest.mark.parametrize(
    ("name", "label", "place"),
    [
        ("notebook-dropout-3", "Dropout=0.7", 0.07),
        ("notebook-dropout-3-labelled", "Dropout=0.7", 0.7),
        ("notebook-dropout-7", "Dropout=0.2", 0.02),
        ("notebook-dropout-7-labelled", "Dropout=0.2", 0.2),
        ("notebook-conclusion", "7 layers, dropout 0.2", "7 layers, dropout 0.2"),
    ],
)
def test_each_result_of_the_notebook_is_drawn_with_its_replay(
    trial: Callable[..., FrozenTrial], name: str, label: str, place: Any
) -> None:
    definition = definitions.load(name)
    rows = notebook.reference_results(definition)
    # Each of its results is a point of our study, and each point has a result.
    assert [point for point, _ in rows] == definition.queue()
    replayed = [
        trial(n, COMPLETE, 0.98 + n / 1000, params=point, definition=definition) for n, (point, _) in enumerate(rows)
    ]
    figure = figures.notebook_comparison(replayed, definition)
    theirs, ours = (_trace(figure, which) for which in ("the notebook", "this study"))
    assert list(theirs.x) == list(ours.x)
    index = next(n for n, (_, result) in enumerate(rows) if result.label == label)
    assert (theirs.x[index], theirs.y[index]) == (place, rows[index][1].accuracy)
    assert ours.y[index] == replayed[index].values[0]
    assert ("labels said" in figure.layout.title.text) == name.endswith("-labelled")


def test_a_smaller_replay_of_the_notebook_is_drawn_and_says_so() -> None:
    definition = definitions.load("notebook-dropout-3", limit=4000, epochs=2, name="small")
    figure = figures.notebook_comparison([], definition)
    assert "2 epochs of 4,000 images" in figure.layout.title.text
    assert len(figure.data) == 1


def test_without_trials_there_is_no_figure(digits: Definition, trial: Callable[..., FrozenTrial]) -> None:
    assert figures.all_figures([], digits) == {}
    assert figures.all_figures([trial(0, FAIL, None)], digits) == {}
    # It is not known when an imported trial ran, and what it cost.
    assert set(figures.all_figures([trial(0, COMPLETE, 0.9, imported=True)], digits)) == {"dropout"}


def test_a_large_study_s_figures_stay_small_and_keep_the_best(
    digits: Definition, trial: Callable[..., FrozenTrial]
) -> None:
    many = [
        trial(n, COMPLETE, (n * 7919 % 5000) / 5000, params={"depth": 3, "dropout": 0.1}, parameters=n, seconds=1.0)
        for n in range(5000)
    ]
    plots = figures.all_figures(many, digits)
    assert max(len(figure.to_json()) for figure in plots.values()) < 300_000
    shown = [value for trace in plots["dropout"].data for value in trace.y]
    assert len(shown) == figures.LIMIT
    assert max(shown) == 4999 / 5000
    assert "a sample" in plots["dropout"].layout.title.text


def test_names_from_users_are_escaped(trial: Callable[..., FrozenTrial]) -> None:
    definition = parse(
        'name = "x"\ndataset = "digits"\nmodel = "a:b"\n[budget]\ntrials = 2\n'
        '[space]\nkind = { choices = ["<img src=x>", "b"] }'
    )
    one = trial(0, COMPLETE, 0.9, params={"kind": "<img src=x>"}, definition=definition, label="<script>")
    curve = replace(results.curves_of([one], Path())[0], loss=(1.0,), val_loss=(1.0,))
    for figure in figures.all_figures([one], definition, [curve]).values():
        content = json.loads(figure.to_json())
        assert "<img" not in json.dumps(content)
        assert "<script" not in json.dumps(content)
