"""Every figure has data and shows it correctly; missing data omits a figure, and breaks none."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import insert

import studies
from storage import database
from storage.artifacts import PREDICTIONS
from storage.tables import TrialUserAttributeModel
from studies import definition as definitions
from studies import (
    drawing,
    figures,
    notebook,
    notebook_figures,
    notes,
    predictions,
    results,
    search_figures,
    space_figures,
    text,
)
from studies.confirmation import Confirmed, Estimate
from studies.confirmation_figure import confirmed_estimates
from studies.definition import Candidate, Confirm, Data, Definition, parse
from studies.errors import StudyError
from studies.statistics import Interval

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
    for number, content in ((3, json.dumps(history)), (5, '{"epoch": 1}')):
        (tmp_path / "digits" / str(number)).mkdir(parents=True)
        (tmp_path / "digits" / str(number) / "history.json").write_text(content, encoding="utf-8")
    return tmp_path


def _figures(
    trials: list[FrozenTrial], definition: Definition, curves: Sequence[results.Curve] = (), **more: Any
) -> dict[str, Any]:
    return figures.all_figures(figures.Subject(trials=trials, definition=definition, curves=curves, **more))


def _trace(figure: Any, name: str) -> Any:
    (trace_of_name,) = [trace for trace in figure.data if trace.name == name]
    return trace_of_name


def test_every_figure_of_a_finished_study_has_data(
    trials: list[FrozenTrial], digits: Definition, artifacts: Path
) -> None:
    plots = _figures(trials, digits, results.curves_of(trials, artifacts))
    # digits is not the notebook's, was not confirmed, and has no predictions.
    assert set(plots) == {"learning-curves", "dropout", "hyperparameters", "parallel", "cost", "progress"}
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
    figure = search_figures.learning_curves(results.curves_of(trials, artifacts), digits)
    assert list(_trace(figure, "trial 3, training").y) == [1.0, 1 / 2, 1 / 3]
    assert list(_trace(figure, "trial 3, validation").x) == [1, 2, 3]
    assert list(_trace(figure, "trial 3, training, accuracy").y) == [0.9, 0.9, 0.9]
    assert len(figure.data) == 4


def test_without_any_history_the_accuracy_by_epoch_is_drawn(
    trials: list[FrozenTrial], digits: Definition, tmp_path: Path
) -> None:
    figure = search_figures.learning_curves(results.curves_of(trials, tmp_path), digits)
    assert list(_trace(figure, "trial 3").y) == [0.5, 0.95]
    title = "Accuracy by epoch, best trials first (the losses are not on this machine)"
    assert (figure.layout.title.text, figure.layout.xaxis.title.text) == (title, "epoch")
    one = search_figures.learning_curves(results.curves_of(trials[:1], tmp_path), digits)
    assert one.layout.title.text == "Accuracy by epoch (the losses are not on this machine)"


def test_without_any_history_the_accuracy_of_repeats_is_drawn_by_repeat(
    trials: list[FrozenTrial], digits: Definition, tmp_path: Path
) -> None:
    repeated = digits.model_copy(update={"budget": digits.budget.model_copy(update={"repeats": 2})})
    figure = search_figures.learning_curves(results.curves_of(trials, tmp_path), repeated)
    assert figure.layout.xaxis.title.text == "repeat"
    assert figure.layout.title.text.startswith("Accuracy by repeat, best trials first")


CONFIRM = Confirm(
    study="digits",
    incarnation="a" * 32,
    candidates=(Candidate(trial=0, epochs=2, hyperparameters={"depth": 3, "dropout": 0.1}),),
)


@pytest.mark.parametrize(
    ("change", "images"),
    [({}, "validation"), ({"confirm": CONFIRM}, "validation"), ({"data": Data(validation="test")}, "test")],
)
def test_accuracies_by_epoch_are_named_after_their_images(
    trials: list[FrozenTrial], digits: Definition, artifacts: Path, change: dict[str, Any], images: str
) -> None:
    """A confirmation is judged by test images, which it reads only after the last epoch."""
    definition = digits.model_copy(update=change)
    figure = search_figures.learning_curves(results.curves_of(trials[:1], artifacts), definition)
    assert figure.layout.yaxis.title.text == f"{images} accuracy"
    assert f"- last, epoch 2: {images} accuracy 0.9000" in text.trial_note(trials[0], definition, [])
    assert f"; {images} loss 0.6667" in text.trial_note(
        trials[3], definition, results.curves_of(trials[3:4], artifacts)
    )


def test_accuracy_against_dropout_has_a_colour_a_depth_and_marks_pruned_trials(
    trials: list[FrozenTrial], digits: Definition
) -> None:
    figure = search_figures.against_hyperparameter(trials, digits)
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
    figure = search_figures.against_hyperparameter([one], definition)
    assert (figure.layout.xaxis.title.text, figure.layout.xaxis.type) == (title, kind)
    assert list(figure.data[0].x) == list(params.values())


def test_a_single_trial_has_axes_of_possible_values(trial: Callable[..., FrozenTrial], digits: Definition) -> None:
    one = [trial(0, COMPLETE, 0.9)]
    low, high = search_figures.best_so_far(one, digits).layout.yaxis.range
    assert 0.8 < low < 0.9 < high < 1.0
    low, high = search_figures.against_hyperparameter(one, digits).layout.xaxis.range
    assert -0.1 < low < 0.0 < 0.7 < high < 0.8


def test_the_pareto_front_is_cheapest_first_and_nothing_beats_it(trials: list[FrozenTrial], digits: Definition) -> None:
    complete = trials[:6]

    def cost(trial: FrozenTrial) -> float:
        return float(trial.user_attrs["parameters"])

    front = search_figures.pareto(complete, cost)
    assert [trial.number for trial in front] == [5, 3]
    for one in front:
        assert not any(
            cost(t) <= cost(one) and t.values[0] >= one.values[0] and t.number != one.number for t in complete
        )
    figure = search_figures.against_cost(trials, digits)
    seconds = [trace for trace in figure.data if trace.name == "Pareto front"][1]
    assert (list(seconds.x), list(seconds.y)) == ([10.0, 11.0, 13.0], [0.90, 0.92, 0.95])


def test_best_so_far_never_falls_and_ends_with_the_last_trial(trials: list[FrozenTrial], digits: Definition) -> None:
    figure = search_figures.best_so_far(trials, digits)
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
    figure = notebook_figures.notebook_comparison(replayed, definition)
    theirs, ours = (_trace(figure, which) for which in ("the notebook", "this study"))
    assert list(theirs.x) == list(ours.x)
    index = next(n for n, (_, result) in enumerate(rows) if result.label == label)
    assert (theirs.x[index], theirs.y[index]) == (place, rows[index][1].accuracy)
    assert ours.y[index] == replayed[index].values[0]
    assert ("labels said" in figure.layout.title.text) == name.endswith("-labelled")


def test_a_smaller_replay_of_the_notebook_is_drawn_and_says_so() -> None:
    definition = definitions.load("notebook-dropout-3", limit=4000, epochs=2, name="small")
    figure = notebook_figures.notebook_comparison([], definition)
    assert "2 epochs of 4,000 images" in figure.layout.title.text
    assert len(figure.data) == 1


def test_without_trials_there_is_no_figure(digits: Definition, trial: Callable[..., FrozenTrial]) -> None:
    assert _figures([], digits) == {}
    assert _figures([trial(0, FAIL, None)], digits) == {}
    # It is not known when an imported trial ran, and what it cost.
    assert set(_figures([trial(0, COMPLETE, 0.9, imported=True)], digits)) == {"dropout", "hyperparameters"}


def test_a_large_study_s_figures_stay_small_and_keep_the_best(
    digits: Definition, trial: Callable[..., FrozenTrial]
) -> None:
    many = [
        trial(n, COMPLETE, (n * 7919 % 5000) / 5000, params={"depth": 3, "dropout": 0.1}, parameters=n, seconds=1.0)
        for n in range(5000)
    ]
    plots = _figures(many, digits)
    assert max(len(figure.to_json()) for figure in plots.values()) < 300_000
    lines = plots["parallel"].data
    assert sum(trace.y.count(None) for trace in lines) == space_figures.LINES
    shown = [value for trace in plots["dropout"].data for value in trace.y]
    assert len(shown) == drawing.LIMIT
    assert max(shown) == 4999 / 5000
    assert "a sample" in plots["dropout"].layout.title.text


def test_names_from_users_are_escaped(trial: Callable[..., FrozenTrial]) -> None:
    definition = parse(
        'name = "x"\ndataset = "digits"\nmodel = "a:b"\n[budget]\ntrials = 2\n'
        '[space]\nkind = { choices = ["<img src=x>", "b"] }'
    )
    one = trial(0, COMPLETE, 0.9, params={"kind": "<img src=x>"}, definition=definition, label="<script>")
    curve = replace(results.curves_of([one], Path())[0], loss=(1.0,), val_loss=(1.0,))
    for figure in _figures([one], definition, [curve]).values():
        content = json.loads(figure.to_json())
        assert "<img" not in json.dumps(content)
        assert "<script" not in json.dumps(content)


def test_choices_are_in_the_order_of_the_definition_and_escaped_once(trial: Callable[..., FrozenTrial]) -> None:
    definition = parse(
        'name = "x"\ndataset = "digits"\nmodel = "a:b"\n[budget]\ntrials = 3\n[space]\n'
        'depth = { choices = [3, 5, 7] }\nkind = { choices = ["a", "R&D <b>"] }'
    )
    made = [
        trial(number, COMPLETE, 0.9 - number / 10, params={"depth": depth, "kind": "R&D <b>"}, definition=definition)
        for number, depth in enumerate((7, 3, 5))
    ]
    once = "R&amp;D &lt;b&gt;"
    panels = space_figures.hyperparameters(made, definition)
    assert list(panels.layout.xaxis.categoryarray) == [3, 5, 7]
    assert list(panels.layout.xaxis2.categoryarray) == ["a", once]
    assert set(panels.data[1].x) == {once}
    assert list(search_figures.against_hyperparameter(made, definition).layout.xaxis.categoryarray) == [3, 5, 7]
    ends = [annotation.text for annotation in space_figures.parallel(made, definition).layout.annotations]
    assert ends == ["7", once, "0.9000"]


# --- the space --------------------------------------------------------------------------------------------


@pytest.fixture
def mixed() -> Definition:
    """A logarithmic hyperparameter, a whole one and a choice."""
    return parse(
        'name = "x"\ndataset = "digits"\nmodel = "a:b"\n[budget]\ntrials = 2\n[space]\n'
        "learning_rate = { low = 1e-4, high = 1e-2, log = true }\ndepth = { low = 3, high = 7 }\n"
        'optimizer = { choices = ["adam", "sgd"] }'
    )


def test_each_hyperparameter_has_a_panel_with_the_axis_of_its_space(
    trial: Callable[..., FrozenTrial], mixed: Definition
) -> None:
    params = {"learning_rate": 1e-3, "depth": 5, "optimizer": "sgd"}
    figure = space_figures.hyperparameters([trial(0, COMPLETE, 0.9, params=params, definition=mixed)], mixed)
    axes = [getattr(figure.layout, name) for name in ("xaxis", "xaxis2", "xaxis3")]
    assert [axis.title.text for axis in axes] == ["learning rate", "depth", "optimizer"]
    assert [axis.type for axis in axes] == ["log", None, "category"]
    assert [list(trace.x) for trace in figure.data] == [[1e-3], [5], ["sgd"]]


@pytest.mark.parametrize(("rates", "step"), [((1e-4, 1e-2), 1), ((2e-3, 8e-3), None), ((2e-3, 0.0), None)])
def test_a_logarithmic_axis_has_powers_of_ten_alone_where_there_are_several(
    trial: Callable[..., FrozenTrial], mixed: Definition, rates: tuple[float, float], step: int | None
) -> None:
    """Trials of a wide range may have values that are near each other; another program may have given one 0."""
    made = [
        trial(n, COMPLETE, 0.9, params={"learning_rate": rate, "depth": 5, "optimizer": "sgd"}, definition=mixed)
        for n, rate in enumerate(rates)
    ]
    axis = space_figures.hyperparameters(made, mixed).layout.xaxis
    assert (axis.type, axis.dtick) == ("log", step)


def test_parallel_coordinates_have_the_scale_of_the_space(trial: Callable[..., FrozenTrial], mixed: Definition) -> None:
    made = [
        trial(n, COMPLETE, value, params=params, definition=mixed)
        for n, (value, params) in enumerate(
            [
                (0.8, {"learning_rate": 1e-4, "depth": 3, "optimizer": "adam"}),
                (0.9, {"learning_rate": 1e-3, "depth": 7, "optimizer": "sgd"}),
            ]
        )
    ]
    figure = space_figures.parallel(made, mixed)
    assert list(_trace(figure, "best tenth").y) == pytest.approx([0.5, 1.0, 1.0, 1.0, None])
    assert list(_trace(figure, "lower half").y) == pytest.approx([0.0, 0.0, 0.0, 0.0, None])
    assert space_figures.parallel(made[:1], mixed) is None
    # Another program may give a trial a value outside the space, also 0 where the axis is logarithmic.
    made[0].params["learning_rate"] = 0.0
    assert space_figures.parallel(made, mixed) is not None


# --- a model's answers ------------------------------------------------------------------------------------


@pytest.fixture
def flawless() -> predictions.Predictions:
    """300 images of as many classes, all of them answered rightly."""
    return predictions.Predictions.of(
        judged_on="validation",
        images=np.zeros((300, 4, 4, 1), np.uint8),
        labels=np.arange(300),
        predicted=np.arange(300),
        probability=np.ones(300, np.float32),
        classes=300,
    )


@pytest.fixture
def answered() -> predictions.Answered:
    """100 images of two classes; the model takes each image of class 1 for class 0."""
    labels = np.arange(100) % 2
    found = predictions.Predictions.of(
        judged_on="validation",
        images=np.zeros((100, 4, 4, 1), np.uint8),
        labels=labels,
        predicted=np.zeros(100, np.int64),
        probability=np.full(100, 0.75, np.float32),
        classes=2,
    )
    return predictions.Answered(trial=4, predictions=found, class_names=["cat", "<dog>"])


def test_figures_of_answers_show_the_names_of_classes(answered: predictions.Answered, digits: Definition) -> None:
    plots = _figures([], digits, answered=answered)
    assert set(plots) == {"confusion", "classes", "mistakes", "samples"}
    right, wrong = plots["confusion"].data
    assert (right.text[0][0], wrong.text[1][0]) == (50, 50)
    assert right.text[1] == wrong.text[0] == ["", ""]  # class 1 was never right, class 0 never wrong
    assert list(plots["classes"].data[0].x) == ["&lt;dog&gt;", "cat"]
    assert list(plots["classes"].data[0].y) == [0.0, 1.0]
    assert plots["mistakes"].data[0].text[0] == "&lt;dog&gt;<br>&gt; cat, 0.75"
    assert len(plots["mistakes"].layout.images) == predictions.MISTAKES
    assert len(plots["samples"].layout.images) == predictions.SAMPLES
    for figure in plots.values():
        assert "<dog>" not in figure.to_json()
        assert "bdata" not in figure.to_json()


def test_the_names_of_classes_have_room(answered: predictions.Answered, digits: Definition) -> None:
    plots = _figures([], digits, answered=answered)
    matrix, bars = plots["confusion"].layout, plots["classes"].layout
    assert all(axis.automargin for axis in (matrix.xaxis, matrix.yaxis, bars.xaxis))


def test_a_confusion_matrix_of_very_many_classes_is_not_drawn(
    digits: Definition, flawless: predictions.Predictions
) -> None:
    answered = predictions.Answered(trial=4, predictions=flawless)
    assert "confusion" not in _figures([], digits, answered=answered)
    assert "confusion" not in notes._kinds(answered)
    assert "classes" in notes._kinds(answered)


def test_no_figure_has_a_background(
    trials: list[FrozenTrial], digits: Definition, artifacts: Path, answered: predictions.Answered
) -> None:
    """A white box would be the brightest thing of a dark page."""
    for name, figure in _figures(trials, digits, results.curves_of(trials, artifacts), answered=answered).items():
        assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == drawing.CLEAR, name
        assert figure.layout.font.color == drawing.GREY, name


def test_a_confirmation_shows_each_seed_and_the_interval_of_the_mean() -> None:
    estimate = Estimate(
        trial=3,
        hyperparameters={},
        epochs=2,
        parameters=None,
        seconds=None,
        searched=0.95,
        accuracies=(0.90, 0.92),
        mean=0.91,
        deviation=0.01,
        of_mean=Interval(low=0.88, high=0.93),
        of_one_model=None,
        of_new_seed=None,
    )
    found = Confirmed(
        study="digits",
        confirmation="digits-confirm",
        seeds=2,
        trained=2,
        trainings=2,
        images=100,
        openings=1,
        chosen_by=(),
        estimates=(estimate, replace(estimate, trial=5, mean=None, accuracies=())),
        comparisons=(),
        winner=None,
        tied=(),
        smallest=None,
    )
    figure = confirmed_estimates(found)
    assert list(_trace(figure, "one seed, test images").x) == [0.90, 0.92]
    mean = _trace(figure, "mean, with its 95 % interval")
    assert (list(mean.x), list(mean.y)) == ([0.91], ["trial 3"])
    assert (mean.error_x.array[0], mean.error_x.arrayminus[0]) == pytest.approx((0.02, 0.03))
    assert confirmed_estimates(None) is None


# --- one figure by name -----------------------------------------------------------------------------------


def _store_answers(found: predictions.Predictions, study: str, home: Path) -> int:
    """Stores `found` as the answers of the best model; returns the number of its trial."""
    (home / "yard" / "artifacts").mkdir(exist_ok=True)
    found.write(home / "yard" / "artifacts" / PREDICTIONS)
    storage = database.connect(f"sqlite:///{home}/yard/studies.db")
    best = studies.best_trial(study, storage)
    row = {"trial_id": best._trial_id, "key": "predictions", "value_json": json.dumps(PREDICTIONS)}
    with storage.engine.begin() as connection:
        connection.execute(insert(TrialUserAttributeModel), row)
    return best.number


def test_one_figure_is_drawn_by_its_kind(finished_study: str, home: Path, answered: predictions.Answered) -> None:
    best = _store_answers(answered.predictions, finished_study, home)
    title = studies.figure(finished_study, "mistakes").layout.title.text
    assert title.startswith(f"The most certain mistakes of trial {best}")
    with pytest.raises(StudyError, match=r"has nothing to draw as 'mistakes' of trial 0 yet"):
        studies.figure(finished_study, "mistakes", trial=0)
    curves = studies.figure(finished_study, "learning-curves", trial=0)
    assert {trace.legendgroup for trace in curves.data} == {"trial 0"}


def test_the_reason_why_nothing_is_drawn_is_true(
    finished_study: str, home: Path, flawless: predictions.Predictions
) -> None:
    best = _store_answers(flawless, finished_study, home)
    for trial in (None, best):
        with pytest.raises(StudyError, match=f"'mistakes': the model of trial {best} made no mistake on these images$"):
            studies.figure(finished_study, "mistakes", trial)
        with pytest.raises(StudyError, match=r"'confusion': it has more than 200 classes, and no matrix of so many"):
            studies.figure(finished_study, "confusion", trial)


@pytest.mark.parametrize(
    ("kind", "trial", "words"),
    [
        ("pie", None, "there is no figure of the kind 'pie': choose one of confirmed, learning-curves"),
        ("confusion", 99, "has no trial 99: it has the trials 0 to"),
        ("cost", 0, "is of the whole study"),
        ("confirmed", None, "has nothing to draw as 'confirmed' yet"),
    ],
)
def test_a_figure_that_does_not_exist_is_one_sentence(
    finished_study: str, kind: str, trial: int | None, words: str
) -> None:
    with pytest.raises(StudyError, match=re.escape(words)):
        studies.figure(finished_study, kind, trial)
