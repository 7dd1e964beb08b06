"""The report is self-contained and says what cannot be concluded; workers write the dashboard's notes."""

import json
import logging
import random
import threading
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import sqlalchemy
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from optuna_dashboard import get_note, save_note
from optuna_dashboard._custom_plot_data import get_plotly_graph_objects
from optuna_dashboard._note import get_note_from_system_attrs
from optuna_dashboard._serializer import serialize_frozen_trial

from search import dashboard
from search.data import load
from search.publisher import Publisher
from storage import claims, database, ledger, promises, transactions
from storage.claims import Claim
from storage.hits import Hits
from storage.ledger import Imported
from storage.owners import Owner
from storage.tables import TrialSystemAttributeModel
from storage.transactions import PatientStorage
from studies import definition as definitions
from studies import drawing, findings, importance, notebook, notes, registry, results
from studies.content import collect
from studies.definition import Data, Definition, parse
from studies.errors import StudyError
from studies.imported import import_trials
from studies.rendering import report

COMPLETE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL
DATA = {"fingerprint": "0" * 16, "train": 1438, "validation": 359, "image_shape": [8, 8, 1], "classes": 10}
EVIL = "</script><script src='https://evil.example/x.js'></script> & `<img src=x onerror=alert(1)>` |a|"


@pytest.fixture
def artifacts(home: Path) -> Path:
    """The folder of the trials' histories: the default one."""
    return home / "yard" / "artifacts"


@pytest.fixture
def run(storage: PatientStorage, me: Owner, artifacts: Path) -> Callable[..., Claim]:
    """Runs one trial of a study without training."""

    def end(study: str, params: dict[str, Any], state: TrialState, value: float | None, **attrs: Any) -> Claim:
        claim = claims.claim(storage, ledger.find(storage, study), me, 60.0)
        assert claim is not None
        space = registry.definition_of(study, storage).space
        for name, chosen in params.items():
            distribution = space[name].distribution()
            storage.set_trial_param(claim.trial_id, name, distribution.to_internal_repr(chosen), distribution)
        if state == FAIL:
            claims.finish(storage, claim, state, None, attrs)
            return claim
        claims.record_epochs(storage, claim, {1: 0.5, 2: value or 0.0}, resumed_after=None)
        history = [
            {"epoch": e, "loss": 0.5 / e, "accuracy": 0.9, "val_loss": 0.7 / e, "val_accuracy": 0.8, "seconds": 1.0}
            for e in (1, 2)
        ]
        folder = artifacts / study / str(claim.number)
        folder.mkdir(parents=True)
        (folder / "history.json").write_text(json.dumps(history), encoding="utf-8")
        (folder / "summary.txt").write_text("layer  weights\nDense      650\n", encoding="utf-8")
        attributes = {
            "parameters": 668_810,
            "epochs": 2,
            "best_epoch": 2,
            "seconds": 33.25,
            "images_per_second": 1234.5,
            "device": "cpu",
            "slot": "cpu:0",
            "precision": "float32",
            "versions": {"keras": "3.15.1"},
            "history": f"{study}/{claim.number}/history.json",
            "model": f"{study}/{claim.number}/model.keras",
        }
        claims.finish(storage, claim, state, value, attributes | attrs)
        return claim

    return end


@pytest.fixture
def digits(storage: PatientStorage, run: Callable[..., Claim]) -> str:
    """A finished study of 12 trials of `digits`: nine complete, two pruned, one failed."""
    registry.create(definitions.load("digits"), storage, DATA)
    for n in range(9):
        run("digits", {"depth": (3, 5, 7)[n % 3], "dropout": 0.05 * n}, COMPLETE, 0.90 + 0.01 * n)
    for n in range(2):
        run("digits", {"depth": 3, "dropout": 0.6 + n / 20}, PRUNED, 0.5)
    run("digits", {"depth": 7, "dropout": 0.7}, FAIL, None, failure={"kind": "nan", "message": EVIL})
    return "digits"


class _Page(HTMLParser):
    """The requests, the scripts and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    def attributes(self, *names: str) -> list[str]:
        return [value or "" for _, attributes in self.tags for name, value in attributes.items() if name in names]


# --- the report -------------------------------------------------------------------------------------------


def test_the_page_is_self_contained(storage: PatientStorage, digits: str) -> None:
    page = _Page(report(digits, storage))
    # The page loads nothing, and its policy makes the browser block requests.
    assert page.attributes("src", "href", "data", "action", "srcset", "poster") == []
    assert {tag for tag, _ in page.tags} & {"link", "iframe", "img", "object", "embed", "base", "form"} == set()
    (policy,) = [one["content"] for tag, one in page.tags if tag == "meta" and "http-equiv" in one]
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert "http" not in policy
    # Plotly itself is in the page once, and no style imports anything.
    assert sum(len(script) > 1_000_000 for script in page.scripts) == 1
    assert "@import" not in report(digits, storage).partition("<style>")[2].partition("</style>")[0]


def test_every_figure_of_the_page_has_data(storage: PatientStorage, digits: str) -> None:
    page = _Page(report(digits, storage))
    drawn = [script for script in page.scripts if "Plotly.newPlot(" in script and len(script) < 1_000_000]
    assert [one["id"] for tag, one in page.tags if tag == "figure"] == [
        "learning-curves",
        "dropout",
        "hyperparameters",
        "parallel",
        "cost",
        "progress",
    ]
    assert len(drawn) == 6
    for script in drawn:
        start = script.index("[", script.index("Plotly.newPlot("))
        traces, _ = json.JSONDecoder().raw_decode(script[start:])
        assert traces
        assert all(len(trace["x"]) == len(trace["y"]) > 0 for trace in traces)
    (curves,) = [script for script in drawn if "Loss and accuracy by epoch" in script]
    assert "trial 8, training" in curves


@pytest.mark.parametrize("form", ["html", "markdown"])
def test_the_report_says_what_was_found_and_what_cannot_be_concluded(
    storage: PatientStorage, digits: str, form: Any
) -> None:
    text = report(digits, storage, form)
    said = _Page(text).text if form == "html" else text.replace("\\", "")
    for sentence in (
        "12 of 12 trials",
        "9 complete, 2 pruned, 1 failed, 0 running, 0 waiting",
        "the study has ended",
        "The best of 9 complete trials is trial 8, with depth 7, dropout 0.4: validation accuracy 0.9800.",
        # Wilson's interval of 352 of 359.
        "The sampling error of one such accuracy on 359 validation images: 0.9603 to 0.9905 (95 %). It leaves "
        "out the luck of being the best of many trials; `trialyard confirm digits` measures it again.",
        "On 359 validation images the best is not reliably better than 2 trials of the 8 others, such as trial 7 "
        "(0.9700).",
        "Pruned: 2 trials of 12.",
        "Failed: 1 trial (nan 1).",
        "with one seed",
        "668,810",
        "3.15.1",
        "float32",
        "one of 3, 5, 7",
        "batch_size = 64",
        "fingerprint 0000000000000000",
    ):
        assert sentence in said, sentence


@pytest.mark.parametrize("form", ["html", "markdown"])
def test_text_from_users_is_escaped(storage: PatientStorage, run: Callable[..., Claim], form: Any) -> None:
    definition = parse(
        f'name = "evil"\ndescription = {json.dumps(EVIL)}\ndataset = "digits"\nmodel = "a:b"\n[budget]\ntrials = 4\n'
        f'[space]\nkind = {{ choices = [{json.dumps(EVIL)}, "b"] }}\n[fixed]\nnote = {json.dumps(EVIL)}'
    )
    registry.create(definition, storage, DATA)
    run("evil", {"kind": EVIL}, COMPLETE, 0.9, device=EVIL, label=EVIL)
    run("evil", {"kind": "b"}, FAIL, None, failure={"kind": EVIL, "message": EVIL})
    text = report("evil", storage, form)
    if form == "html":
        page = _Page(text)
        assert EVIL in page.text
        assert page.attributes("src", "onerror") == []
        assert sum(tag == "script" for tag, _ in page.tags) == len(page.scripts) == text.count("</script>")
    else:
        prose = text.partition("```toml")[0] + text.rpartition("```")[2]
        assert "<script" not in prose.replace("\\<", "")
        assert "<img" not in prose.replace("\\<", "")
        table = [line for line in text.splitlines() if line.startswith("| ")]
        assert all(line.replace("\\|", "").count("|") in (3, 7, 8) for line in table), table


def test_cautions_stay_if_only_poor_configurations_were_repeated(
    storage: PatientStorage, run: Callable[..., Claim]
) -> None:
    registry.create(definitions.load("digits"), storage, DATA)
    for rate, accuracy in ((0.1, 0.98), (0.2, 0.96), (0.3, 0.5), (0.3, 0.5), (0.4, 0.4)):
        run("digits", {"depth": 3, "dropout": rate}, COMPLETE, accuracy)
    cautions = collect("digits", storage).findings.cautions
    assert any("The best configuration was trained once" in sentence for sentence in cautions)
    # On 359 images 0.96 is outside the interval of the best, but inside that of the difference.
    assert (
        "On 359 validation images the best is not reliably better than 1 trial of the 4 others, such as trial 1 "
        "(0.9600)." in cautions
    )


def test_an_infeasible_trial_never_wins(storage: PatientStorage, run: Callable[..., Claim]) -> None:
    registry.create(definitions.load("digits"), storage, DATA)
    for accuracy, constraint in ((0.90, 0.0), (0.99, 1.0)):
        claim = run("digits", {"depth": 3, "dropout": 0.1}, COMPLETE, accuracy)
        with storage.engine.begin() as connection:  # Optuna lets nobody add one to a finished trial
            row = {"trial_id": claim.trial_id, "key": "constraints:size", "value_json": str(constraint)}
            connection.execute(sqlalchemy.insert(TrialSystemAttributeModel).values(row))
    trials = storage.get_all_trials(registry.find("digits", storage).id)
    assert [trial.number for trial in findings.ranked(trials)] == [0]
    assert "The best of 1 complete trial is trial 0" in collect("digits", storage).findings.best[0]
    assert [trial.number for trial in dashboard._best(trials, StudyDirection.MAXIMIZE)] == [0]


def test_an_imported_accuracy_has_no_interval(storage: PatientStorage) -> None:
    registry.create(definitions.load("digits"), storage, DATA)
    import_trials("digits", [{"depth": 3, "dropout": 0.1, "accuracy": 0.9}], storage)
    assert not [sentence for sentence in collect("digits", storage).findings.best if "95 % interval" in sentence]


def test_a_study_without_trials_has_a_report(storage: PatientStorage, home: Path) -> None:
    registry.create(definitions.load("digits"), storage, DATA)
    page = _Page(report("digits", storage))
    assert "No trial is complete: there is nothing to conclude." in page.text
    assert page.scripts == [""]
    assert "No trial is complete" in report("digits", storage, "markdown")
    with pytest.raises(StudyError, match="there is no study 'digist'"):
        report("digist", storage)


def test_a_study_with_one_trial_has_a_report(storage: PatientStorage, run: Callable[..., Claim]) -> None:
    registry.create(definitions.load("digits"), storage, DATA)
    run("digits", {"depth": 3, "dropout": 0.2}, COMPLETE, 1.0)
    conclusions = collect("digits", storage).findings
    assert "0.9894 to 1.0000 (95 %)" in conclusions.best[1]
    assert conclusions.influences == (
        "These trials do not show which hyperparameter matters most: chance could give as much.",
    )


def test_the_report_of_a_study_that_is_out_of_time_says_that_it_has_ended(
    storage: PatientStorage, run: Callable[..., Claim]
) -> None:
    """As `status` does. A person may stop or pause it all the same."""
    registry.create(definitions.load("digits"), storage, DATA)
    run("digits", {"depth": 3, "dropout": 0.1}, COMPLETE, 0.9)
    assert "the study is open." in report("digits", storage, format="markdown")
    study = ledger.find(storage, "digits")
    storage.set_study_user_attr(study.id, "trialyard:budget", {"trials": 12, "hours": 1e-9})
    assert results.status("digits", storage).ended
    assert "**1 of 12 trials** (1 complete, 0 pruned, 0 failed, 0 running, 2 waiting); the study has ended." in report(
        "digits", storage, format="markdown"
    )
    registry.stop("digits", storage)
    assert "the study is stopped." in report("digits", storage, format="markdown")


def test_the_report_warns_of_the_notebook_s_protocol_and_labels(storage: PatientStorage, home: Path) -> None:
    notebook.create(storage)
    cautions = collect("notebook", storage).findings.cautions
    labels = [sentence for sentence in cautions if "labelled its sweeps 0.0 to 0.7" in sentence]
    assert any("the rates that they ran with" in sentence for sentence in labels)
    assert any("chosen by the test images" in sentence for sentence in cautions)
    assert any("Imported, not run here: 21 trials" in sentence for sentence in cautions)
    labelled = definitions.load("notebook-dropout-7-labelled")
    assert any("never ran" in one for one in findings.findings([], labelled, {}).cautions)
    assert notebook.caution(definitions.load("digits")) == []
    assert "after the last epoch" in notebook.caution(definitions.load("notebook-conclusion"))[0]
    assert "15 trials of the 20 others" in report("notebook", storage, "markdown")


# --- findings ---------------------------------------------------------------------------------------------


def _searched(space: str, model: str = "convnet", fixed: str = "") -> Definition:
    return parse(
        f'name = "x"\ndataset = "digits"\nmodel = "{model}"\n[budget]\ntrials = 9\n[space]\n{space}\n[fixed]\n{fixed}'
    )


def _best(definition: Definition, **params: Any) -> FrozenTrial:
    distributions = {name: definition.space[name].distribution() for name in params}
    return optuna.trial.create_trial(value=0.9, params=params, distributions=distributions)


@pytest.mark.parametrize(
    ("space", "params", "warning"),
    [
        ("dropout = { low = 0.0, high = 0.7 }", {"dropout": 0.695}, "dropout = 0.695 is at the upper end"),
        ("dropout = { low = 0.1, high = 0.7 }", {"dropout": 0.105}, "dropout = 0.105 is at the lower end"),
        ("dropout = { low = 0.0, high = 0.7 }", {"dropout": 0.0}, None),  # no rate is less than 0
        ("dropout = { low = 0.0, high = 0.7 }", {"dropout": 0.6}, None),
        ("dropout = { low = 0.0, high = 0.7, step = 0.1 }", {"dropout": 0.7}, "dropout = 0.7 is at the upper end"),
        ("dropout = { low = 0.0, high = 0.07, step = 0.01 }", {"dropout": 0.06}, None),
        # 2e-4 is far from 1e-4 where the range is logarithmic, and near where it is not.
        ("learning_rate = { low = 1e-4, high = 1e-1, log = true }", {"learning_rate": 2e-4}, None),
        ("learning_rate = { low = 1e-4, high = 1e-1 }", {"learning_rate": 2e-4}, "learning_rate = 0.0002 is at"),
        ("batch_size = { choices = [32, 64, 128] }", {"batch_size": 128}, "batch_size = 128 is at the upper end"),
        ("batch_size = { choices = [32, 64, 128] }", {"batch_size": 64}, None),
        ("optimizer = { choices = ['adam', 'sgd', 'adamw'] }", {"optimizer": "adam"}, None),
    ],
)
def test_a_best_value_at_an_end_of_its_range_is_warned_of(
    space: str, params: dict[str, Any], warning: str | None
) -> None:
    definition = _searched(space, fixed="depth = 3")
    warnings = findings.edges([_best(definition, **params)], definition)
    assert len(warnings) == (warning is not None)
    assert warning is None or warning in warnings[0]


def test_nothing_is_advised_below_0_for_a_model_of_one_s_own() -> None:
    for low, high, value, warned in [(0.0, 0.6, 0.001, False), (0.0, 1.0, 0.999, False), (0.1, 0.6, 0.101, True)]:
        definition = _searched(f"own_rate = {{ low = {low}, high = {high} }}", model="mine:build")
        assert bool(findings.edges([_best(definition, own_rate=value)], definition)) == warned


def test_a_depth_at_an_end_is_not_warned_of() -> None:
    definition = _searched("depth = { choices = [3, 5, 7] }")
    assert findings.edges([_best(definition, depth=7)], definition) == []


@pytest.mark.parametrize(("effect", "says"), [(0.0, False), (0.2, True)])
def test_an_influence_that_chance_could_give_is_not_reported(effect: float, says: bool) -> None:
    definition, dice = definitions.load("dropout-depth"), random.Random(3)
    distributions = {name: parameter.distribution() for name, parameter in definition.space.items()}
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=3))
    for _ in range(60):
        trial = study.ask(distributions)
        study.tell(trial, dice.gauss(0.9, 0.01) - effect * trial.params["dropout"])
    assert importance.is_significant(study.trials) == says
    sentence = findings.findings(study.trials, definition, {}).influences[0]
    assert sentence.startswith(
        "The hyperparameter that matters most is dropout" if says else "These trials do not show which hyperparameter"
    )


def _scored(number: int, depth: int, values: list[float], state: TrialState = COMPLETE, **attrs: Any) -> FrozenTrial:
    trial = optuna.trial.create_trial(
        state=state,
        value=max(values, default=0.5) if state == COMPLETE else None,
        params={"depth": depth, "dropout": (0.25, 0.1, 0.5)[number % 3]},
        distributions={n: p.distribution() for n, p in definitions.load("digits").space.items()},
        intermediate_values=dict(enumerate(values, start=1)),
        user_attrs=attrs,
    )
    trial.number = number
    trial._trial_id = number
    return trial


def test_pruned_trials_count_by_what_they_had_when_they_were_pruned() -> None:
    """Where depth decides everything by pruning, complete trials alone cannot show it."""
    trials = [_scored(number, 5, [0.7, 0.9, 0.95 + number / 1000]) for number in range(0, 20, 2)]
    trials += [_scored(number, 7, [0.2 + number / 1000], TrialState.PRUNED) for number in range(1, 20, 2)]
    found = importance.scored(trials)
    assert [each.trial.params["depth"] for each in found] == [5] * 10 + [7] * 10
    assert found[0].score == 1.0
    assert found[-1].score == 0.0
    assert next(iter(importance.importances(trials))) == "depth"
    assert importance.is_significant(trials)
    complete = [trial for trial in trials if trial.state == COMPLETE]
    assert not importance.is_significant(complete)
    influences = findings.findings(trials, definitions.load("digits"), {}).influences
    assert influences[0].startswith("The hyperparameter that matters most is depth: it explains 7")
    assert "All 5 best have depth 5." in influences
    assert "The best accuracy by depth: 0.9680 for 5 (10 complete), 0.2190 for 7 (0 complete, 10 pruned)." in influences
    alike = [sentence for sentence in influences if sentence.startswith("With the same dropout 0.25")]
    assert alike == ["With the same dropout 0.25: depth 5 has 0.9500, depth 7 has 0.2030 (pruned after epoch 1)."]


def test_a_pruned_trial_with_repeats_counts_by_their_mean() -> None:
    """Its best repeat is luck, which the means of the others do not have."""
    repeats = [0.98, 0.95, 0.95, 0.95]
    pruned = _scored(0, 5, repeats, TrialState.PRUNED, repeats=repeats)
    pruned.values = [0.9575]
    complete = _scored(1, 7, [0.97, 0.96, 0.97, 0.96, 0.97], repeats=[0.97, 0.96, 0.97, 0.96, 0.97])
    complete.values = [0.966]
    influences = findings.findings([pruned, complete], definitions.load("digits"), {}).influences
    assert "The best accuracy by depth: 0.9660 for 7 (1 complete), 0.9575 for 5 (0 complete, 1 pruned)." in influences
    assert [each.trial.number for each in importance.scored([pruned, complete])] == [1, 0]
    assert ", pruned after repeat 4<br>" in drawing.trial_text(pruned, definitions.load("digits"))


def test_what_the_best_have_in_common_is_said() -> None:
    trials = [_scored(number, 5 if number < 3 else 3, [0.99 - number / 100]) for number in range(10)]
    influences = findings.findings(trials, definitions.load("digits"), {}).influences
    assert "Of the 5 best, 3 have depth 5, 2 have depth 3." in influences
    assert "The 5 best have dropout from 0.1 to 0.5; searched: 0.0 to 0.7." in influences


@pytest.mark.parametrize("state", [TrialState.WAITING, TrialState.RUNNING, FAIL])
def test_the_best_have_nothing_in_common_before_others_were_measured(state: TrialState) -> None:
    trials = [_scored(number, 3, [0.9]) for number in range(5)]
    unmeasured = [_scored(number, 5, [], state) for number in range(5, 10)]
    influences = findings.findings([*trials, *unmeasured], definitions.load("digits"), {}).influences
    assert not any("5 best" in sentence for sentence in influences)
    pruned = [_scored(number, 5, [0.1], PRUNED) for number in range(5, 10)]
    influences = findings.findings([*trials, *pruned], definitions.load("digits"), {}).influences
    assert "All 5 best have depth 3." in influences


def test_a_trial_is_compared_with_others_at_the_last_epoch_that_both_reached() -> None:
    slow = _scored(0, 5, [0.1, 0.5, 0.99])
    fast = _scored(1, 3, [0.6], TrialState.PRUNED)
    late = _scored(2, 7, [0.3, 0.7, 0.8])
    # fast beats both after epoch 1, slow beats late at the end.
    assert [(each.trial.number, each.score) for each in importance.scored([slow, fast, late])] == [
        (1, 1.0),
        (0, 0.5),
        (2, 0.0),
    ]


def test_only_a_pruned_trial_is_compared_before_its_end() -> None:
    # With `patience_epochs`, the first one ended after two epochs. The second was behind it then, and won.
    early = _scored(0, 5, [0.9, 0.95])
    later = _scored(1, 3, [0.9, 0.94, 0.99])
    assert [each.trial.number for each in importance.scored([early, later])] == [1, 0]


def test_a_pruned_trial_does_not_beat_an_imported_one_which_has_no_epochs() -> None:
    imported, pruned = _scored(0, 5, []), _scored(1, 3, [0.2], TrialState.PRUNED)
    trained = _scored(2, 7, [0.1, 0.6])
    # The pruned one beats the trained one after epoch 1, and the trained one the imported one at the end.
    assert [(each.trial.number, each.score) for each in importance.scored([imported, pruned, trained])] == [
        (1, 0.75),
        (2, 0.5),
        (0, 0.25),
    ]


def test_trials_without_epochs_and_foreign_steps_are_compared_at_the_end() -> None:
    trained = [_scored(number, 5, [0.5, 0.97]) for number in range(3)]
    imported: list[FrozenTrial] = []
    for number in (3, 4):
        trial = optuna.trial.create_trial(
            value=0.9,
            params={"depth": 3, "dropout": 0.1},
            distributions=trained[0].distributions,
            intermediate_values={} if number == 3 else {0: 0.1, 10_000_000: 0.9},
        )
        trial.number = number
        imported.append(trial)
    found = importance.scored([*trained, *imported])
    assert {each.trial.number for each in found[:3]} == {0, 1, 2}
    only_zero = _scored(0, 5, [])
    only_zero.intermediate_values = {0: 0.3}
    assert len(importance.scored([only_zero, only_zero])) == 2


def test_a_foreign_value_in_percent_is_no_accuracy() -> None:
    trials = [_scored(0, 5, [93.5]), _scored(1, 3, [0.9])]
    found = findings.findings(trials, definitions.load("digits"), {"validation": 359, "classes": 10})
    assert not any("sampling error" in sentence for sentence in found.best)


@pytest.mark.parametrize(("dropout", "once"), [(0.3, False), (0.1, True)])
def test_points_that_differ_by_a_float_s_last_digits_are_one_configuration(dropout: float, once: bool) -> None:
    """The steps of a float are sums: 0.1 + 0.2 is 0.30000000000000004, and a table that is imported has 0.3."""
    trials = [_scored(0, 5, [0.9]), _scored(1, 5, [0.8])]
    trials[0].params["dropout"], trials[1].params["dropout"] = 0.1 + 0.2, dropout
    cautions = findings.findings(trials, definitions.load("digits"), {}).cautions
    assert any("was trained once, with one seed" in sentence for sentence in cautions) is once


def test_hits_tell_apart_what_two_accuracies_cannot() -> None:
    """Of 1,000 images the second trial gets 12 wrong that the first gets right, and none the other way round."""
    first = np.ones(1000, dtype=bool)
    first[:20] = False
    second = first.copy()
    second[-12:] = False
    trials = [_scored(0, 5, [0.980]), _scored(1, 3, [0.968])]
    data = {"validation": 1000, "classes": 10}
    definition = definitions.load("digits")
    unpaired = findings.findings(trials, definition, data).cautions
    assert any("the best is not reliably better than the other one, trial" in sentence for sentence in unpaired)
    hits = {0: Hits.of(first, "validation", "a"), 1: Hits.of(second, "validation", "a")}
    paired = findings.findings(trials, definition, data, hits).cautions
    assert not any("the best is not reliably better" in sentence for sentence in paired)
    other_images = hits | {1: Hits.of(second, "validation", "b")}
    assert findings.findings(trials, definition, data, other_images).cautions == unpaired


@pytest.mark.parametrize(
    ("value", "trained", "more", "words"),
    [
        (0.12, 0.11, {}, "0.1200, is at the level of chance for 10 classes"),
        (
            0.12,
            0.11,
            {"most_frequent": 320},
            "no better than always answering the most frequent class, 0.8914: nothing",
        ),
        (0.9, 0.91, {"most_frequent": 320}, "0.9000, is not reliably better than always answering"),
        (0.95, 0.95, {"most_frequent": 320}, None),
        (0.9, 0.91, {}, None),
        (0.9, 0.91, {"most_frequent": "many"}, None),
        (0.9, 0.91, {"most_frequent": 320, "validation": None}, None),
        (0.7, 0.99, {}, "The best trial has 0.9900 on the training images and 0.7000 on the others"),
        (0.95, 0.99, {}, None),
    ],
)
def test_results_that_look_wrong_are_warned_of(
    value: float, trained: float, more: dict[str, Any], words: str | None
) -> None:
    """Studies of older versions did not record how many images are of the most frequent class."""
    best = _scored(0, 5, [value], train_accuracy=trained)
    data = {"validation": 359, "classes": 10} | more
    cautions = findings.findings([best], definitions.load("digits"), data).cautions
    found = [sentence for sentence in cautions if "nothing was learned" in sentence or "training images" in sentence]
    assert len(found) == (words is not None)
    assert words is None or words in found[0]


def test_a_model_that_always_answers_the_most_frequent_class_has_learned_nothing(
    storage: PatientStorage, run: Callable[..., Claim], write_npz: Callable[..., Path]
) -> None:
    """Four of five images are of one class: so many are right by chance, of three classes."""
    number = np.arange(300)
    path = write_npz(y_train=np.where(number % 5 == 0, 1 + number // 5 % 2, 0))
    summary = load(str(path), Data(validation=0.2), []).summary()
    registry.create(definitions.load("digits"), storage, summary)
    run("digits", {"depth": 3, "dropout": 0.1}, COMPLETE, 0.8)
    caution = "The best accuracy, 0.8000, is no better than always answering the most frequent class, 0.8000: "
    assert [each for each in collect("digits", storage).findings.cautions if each.startswith(caution)]


def test_a_sample_of_a_grid_has_all_values_of_its_hyperparameters() -> None:
    distributions: dict[str, Any] = {
        "rate": optuna.distributions.FloatDistribution(0.0, 1.0),
        "kind": optuna.distributions.CategoricalDistribution(["a", "b"]),
    }
    trials = [
        optuna.trial.create_trial(
            value=0.9 if kind == "a" else 0.5, params={"rate": at / 300, "kind": kind}, distributions=distributions
        )
        for at in range(300)
        for kind in ("a", "b")
    ]
    assert next(iter(importance.importances(trials))) == "kind"


def test_a_number_whose_trials_are_mostly_at_its_top_can_make_a_difference() -> None:
    distribution = optuna.distributions.IntDistribution(1, 4)
    trials = [
        optuna.trial.create_trial(value=0.1 * value, params={"depth": value}, distributions={"depth": distribution})
        for value in [1, 2, 3, *[4] * 9]
    ]
    assert importance.importances(trials)["depth"] > 0.5


def test_importances_name_what_made_the_difference() -> None:
    definition = _searched(
        "dropout = { low = 0.0, high = 0.7 }\nweight_decay = { low = 0.0, high = 1.0 }", fixed="depth = 3"
    )
    distributions = {name: parameter.distribution() for name, parameter in definition.space.items()}
    trials = [
        optuna.trial.create_trial(
            value=0.9 - 0.1 * (n / 40),
            params={"dropout": n * 0.7 / 40, "weight_decay": (n * 17 % 40) / 40},
            distributions=distributions,
        )
        for n in range(40)
    ]
    shares = importance.importances(trials)
    assert next(iter(shares)) == "dropout"
    # By thirds: 8/9 of a straight line's variance is between them, of 40 trials and 3 groups.
    assert shares["dropout"] == pytest.approx(1 - (1 / 9) * 39 / 37, abs=0.01)
    assert shares["weight_decay"] < 0.1
    assert importance.importances(trials[:3]) == {}
    assert importance.importances([trials[0]] * 10) == {}


# --- the dashboard's notes and figures --------------------------------------------------------------------


@pytest.fixture
def publish(storage: PatientStorage, artifacts: Path) -> Callable[..., bool]:
    """Publishes a study without waiting for the pause."""

    def call(study: str, last: bool = True, place: PatientStorage | None = None) -> bool:
        place = place or storage
        return notes.publish(study, place, artifacts, optuna.storages.get_storage(place), last=last)

    return call


def _attributes(storage: PatientStorage, study: str) -> dict[str, Any]:
    return storage.get_study_system_attrs(registry.find(study, storage).id)


def _trial_note(storage: PatientStorage, study: str, number: int) -> str:
    trial = optuna.load_study(study_name=study, storage=storage).trials[number]
    # As the dashboard's page reads it.
    serialized = serialize_frozen_trial(1, trial, _attributes(storage, study))
    return str(serialized["note"]["body"])


def test_the_dashboard_reads_what_is_published(
    storage: PatientStorage, digits: str, publish: Callable[..., bool]
) -> None:
    assert publish(digits)
    study = optuna.load_study(study_name=digits, storage=storage)
    note = get_note(study).replace("\\", "")
    for text in (
        "**12 of 12 trials**",
        "has ended",
        "depth",
        "0 to 0.7",
        "batch_size",
        "one of 3, 5, 7",
        "0.9603 to 0.9905",
    ):
        assert text in note
    graphs = get_plotly_graph_objects(_attributes(storage, digits))
    assert set(graphs) == {"learning-curves", "dropout", "cost", "progress"}
    assert all(json.loads(graph)["data"] for graph in graphs.values())
    complete = _trial_note(storage, digits, 8).replace("\\", "")
    for text in ("0.9800", "668,810 weights", "cpu (cpu:0) in float32", "1,234 images/s", "33.2 s", "loss 0.2500"):
        assert text in complete, text
    assert "```\nlayer  weights\nDense      650\n```" in complete
    assert "Pruned after epoch" in _trial_note(storage, digits, 9)
    failed = _trial_note(storage, digits, 11)
    assert "Failed (nan)" in failed
    assert f"```\n{EVIL}\n```" in failed


def test_the_best_at_an_edge_is_in_the_study_s_note(
    storage: PatientStorage, run: Callable[..., Claim], publish: Callable[..., bool]
) -> None:
    registry.create(definitions.load("digits"), storage, DATA)
    run("digits", {"depth": 3, "dropout": 0.7}, COMPLETE, 0.9)
    publish("digits")
    note = get_note(optuna.load_study(study_name="digits", storage=storage))
    assert "dropout = 0.7 is at the upper end of the searched range (0 to 0.7)" in note


def test_it_is_published_at_most_once_in_ten_seconds_and_only_after_a_change(
    storage: PatientStorage, run: Callable[..., Claim], publish: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.create(definitions.load("digits"), storage, DATA)
    run("digits", {"depth": 3, "dropout": 0.1}, COMPLETE, 0.9)
    assert publish("digits", last=False)
    first = _attributes(storage, "digits")
    assert publish("digits", last=False)  # it is up to date
    assert _attributes(storage, "digits") == first
    run("digits", {"depth": 3, "dropout": 0.2}, COMPLETE, 0.8)
    assert not publish("digits", last=False)  # too early
    assert _attributes(storage, "digits") == first
    monkeypatch.setattr(notes, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(notes, "SHARE", 1e9)
    assert publish("digits", last=False)
    assert _attributes(storage, "digits") != first
    assert "2 of 12 trials" in get_note(optuna.load_study(study_name="digits", storage=storage))


def test_older_results_do_not_overwrite_newer_ones(
    storage: PatientStorage, run: Callable[..., Claim], artifacts: Path, publish: Callable[..., bool]
) -> None:
    registry.create(definitions.load("digits"), storage, DATA)
    run("digits", {"depth": 3, "dropout": 0.1}, COMPLETE, 0.9)

    class Slow(optuna.storages.RDBStorage):
        """Reads the trials; then another worker finishes one and publishes."""

        def __init__(self) -> None:
            pass

        def get_all_trials(self, *args: Any, **kwargs: Any) -> list[FrozenTrial]:
            trials = storage.get_all_trials(*args, **kwargs)
            run("digits", {"depth": 3, "dropout": 0.2}, COMPLETE, 0.8)
            assert publish("digits")
            return trials

    assert not notes.publish("digits", storage, artifacts, Slow(), last=True)
    assert "2 of 12 trials" in get_note(optuna.load_study(study_name="digits", storage=storage))


def test_a_user_s_text_is_kept(
    storage: PatientStorage, run: Callable[..., Claim], publish: Callable[..., bool]
) -> None:
    registry.create(definitions.load("digits"), storage, DATA)
    run("digits", {"depth": 3, "dropout": 0.1}, COMPLETE, 0.9)
    publish("digits")
    study = optuna.load_study(study_name="digits", storage=storage)
    save_note(study, "Mine, and long: " + "x" * 5000 + "\n\n" + get_note(study))
    run("digits", {"depth": 3, "dropout": 0.2}, COMPLETE, 0.8)
    publish("digits")
    note = get_note(study)
    assert note.startswith("Mine, and long: xxx")
    assert "2 of 12 trials" in note
    assert "1 of 12 trials" not in note
    assert note.count(notes.MARK) == 1
    # The dashboard accepts an edit only of the current version, so our change must have a new version.
    assert get_note_from_system_attrs(_attributes(storage, "digits"), None)["version"] == 3


def test_only_so_many_trials_have_a_note(
    storage: PatientStorage, home: Path, publish: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notes, "BEST_WITH_NOTE", 2)
    monkeypatch.setattr(notes, "LATEST_WITH_NOTE", 3)
    registry.create(definitions.load("digits"), storage, DATA)
    rate, depth = (
        registry.definition_of("digits", storage).space[name].distribution() for name in ("dropout", "depth")
    )

    def add(*values: float) -> None:
        ledger.import_trials(
            storage,
            ledger.find(storage, "digits"),
            [Imported(value=v, params={"depth": (depth, 3), "dropout": (rate, 0.1)}, attributes={}) for v in values],
        )

    def noted() -> list[int]:
        trials = optuna.load_study(study_name="digits", storage=storage).trials
        stored = _attributes(storage, "digits")
        return [t.number for t in trials if get_note_from_system_attrs(stored, t._trial_id)["body"]]

    add(0.9, 0.8, 0.7, 0.6, 0.5)
    publish("digits")
    assert noted() == [3, 4, 5, 6, 7]  # after three waiting points
    add(0.1, 0.2)
    publish("digits")
    assert noted() == [3, 4, 7, 8, 9]


def test_the_notebook_s_own_study_shows_its_replays_once_they_have_ended(
    storage: PatientStorage, run: Callable[..., Claim], publish: Callable[..., bool]
) -> None:
    notebook.create(storage)
    publish("notebook")

    def graphs() -> dict[str, Any]:
        return get_plotly_graph_objects(_attributes(storage, "notebook"))

    assert set(graphs()) == {"dropout"}
    note = get_note(optuna.load_study(study_name="notebook", storage=storage))
    assert "run notebook-dropout-3" in note.replace("\\", "")
    # With the rates of the labels it is another experiment, not a replay.
    for name, shift in (("notebook-dropout-3", 0.01), ("notebook-dropout-3-labelled", 0.1)):
        replay = definitions.load(name, epochs=2, limit=4000, name=f"my-{name}")
        registry.create(replay, storage, DATA)
        for step in range(8):
            assert len(replay.queue()) == 8
            run(replay.name, {"dense_dropout": replay.queue()[step]["dense_dropout"]}, COMPLETE, 0.97 + step / 1000)
            assert replay.queue()[step]["dense_dropout"] == pytest.approx(step * shift)
            if step == 3:
                publish(replay.name)
                assert ("notebook" in graphs()) == (name != "notebook-dropout-3")
        publish(replay.name)
    theirs, ours = json.loads(graphs()["notebook"])["data"]
    assert (len(theirs["x"]), len(ours["x"])) == (21, 8)
    assert ours["name"] == "my-notebook-dropout-3, 2 epochs of 4,000 images"
    places = dict(zip(theirs["x"], theirs["y"], strict=True))
    for step, (place, value) in enumerate(zip(ours["x"], ours["y"], strict=True)):
        assert value == 0.97 + step / 1000
        assert places[place] == notebook.SWEEP_3[step].accuracy
    # The report shows them, too.
    assert 'id="figure-notebook"' in report("notebook", storage)


def test_publishing_leaves_trials_and_claims_as_they_are(
    either_url: str, me: Owner, artifacts: Path, trivial: Definition, publish: Callable[..., bool]
) -> None:
    place = database.create(either_url)
    registry.create(trivial, place, DATA)
    running, done = (claims.claim(place, ledger.find(place, trivial.name), me, 60.0) for _ in range(2))
    assert running is not None
    assert done is not None
    claims.finish(place, done, COMPLETE, 0.9, {})
    before = (place.get_all_trials(running.study_id), place.get_study_user_attrs(running.study_id))
    assert publish(trivial.name, place=place)
    assert (place.get_all_trials(running.study_id), place.get_study_user_attrs(running.study_id)) == before
    assert claims.record_epochs(place, running, {1: 0.5}) == "open"
    claims.finish(place, running, COMPLETE, 0.8, {})
    assert promises.check(place) == []
    assert publish(trivial.name, place=place)
    assert "2 of 5 trials" in get_note(optuna.load_study(study_name=trivial.name, storage=place))
    place.engine.dispose()


def test_workers_publish_as_trials_end_and_the_last_state_before_they_leave(
    storage: PatientStorage, run: Callable[..., Claim], artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.publisher.LEAVE_SECONDS", 120.0)  # a busy machine imports Plotly meanwhile
    registry.create(definitions.load("digits"), storage, DATA)
    publisher = Publisher(storage, artifacts)
    with publisher:
        for n in range(3):
            claim = run("digits", {"depth": 3, "dropout": 0.1 * n}, COMPLETE, 0.9)
            publisher.ended(claim, storage.get_trial(claim.trial_id))
    assert "3 of 12 trials" in get_note(optuna.load_study(study_name="digits", storage=storage))


def test_a_worker_that_ends_leaves_the_notes_to_those_that_still_train(
    storage: PatientStorage, run: Callable[..., Claim], publish: Callable[..., bool], me: Owner
) -> None:
    """A hundred workers that end together would each draw all figures."""

    def note() -> str:
        return str(get_note(optuna.load_study(study_name="digits", storage=storage)))

    registry.create(definitions.load("digits"), storage, DATA)
    run("digits", {"depth": 3, "dropout": 0.1}, COMPLETE, 0.9)
    assert publish("digits")
    running = claims.claim(storage, ledger.find(storage, "digits"), me, 60.0)
    assert running is not None
    run("digits", {"depth": 3, "dropout": 0.2}, COMPLETE, 0.8)
    assert not publish("digits"), "within the pause"
    assert "1 of 12 trials" in note()
    claims.finish(storage, running, COMPLETE, 0.7, {})
    assert publish("digits")
    assert "3 of 12 trials" in note()


def test_a_study_that_takes_a_deleted_one_s_name_and_number_shows_its_own_trials(
    storage: PatientStorage, run: Callable[..., Claim], artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.publisher.LEAVE_SECONDS", 120.0)  # a busy machine imports Plotly meanwhile
    with Publisher(storage, artifacts) as publisher:
        for number, accuracy in enumerate((0.9, 0.1)):
            registry.create(definitions.load("digits"), storage, DATA)
            claim = run("digits", {"depth": 3, "dropout": 0.1}, COMPLETE, accuracy)
            assert publisher._publish("digits", last=True) is None
            assert f"validation accuracy {accuracy:.4f}" in get_note(
                optuna.load_study(study_name="digits", storage=storage)
            )
            if number == 0:
                registry.delete("digits", storage)
    assert claim.study_id == 1, "this database does not use numbers again, and the test shows nothing"


def test_a_failure_to_publish_is_logged_and_nothing_else(
    storage: PatientStorage,
    run: Callable[..., Claim],
    artifacts: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*_: Any, **__: Any) -> bool:
        raise ZeroDivisionError("a figure that cannot be drawn")

    monkeypatch.setattr(notes, "publish", broken)
    registry.create(definitions.load("digits"), storage, DATA)
    claim = run("digits", {"depth": 3, "dropout": 0.1}, COMPLETE, 0.9)
    with caplog.at_level(logging.WARNING), Publisher(storage, artifacts) as publisher:
        publisher.ended(claim, storage.get_trial(claim.trial_id))
    assert "the notes and figures of study digits were not written: a figure that cannot be drawn" in caplog.text


def test_a_worker_whose_turn_it_is_not_does_not_wait_for_one_that_publishes(
    storage: PatientStorage, run: Callable[..., Claim], publish: Callable[..., bool]
) -> None:
    """It would keep its only connection meanwhile, which its slots and its heartbeat need."""
    registry.create(definitions.load("digits"), storage, DATA)
    run("digits", {"depth": 3, "dropout": 0.1}, COMPLETE, 0.9)
    assert publish("digits")
    run("digits", {"depth": 5, "dropout": 0.1}, COMPLETE, 0.8)
    holds, free = threading.Event(), threading.Event()

    def hold(connection: sqlalchemy.Connection) -> None:
        holds.set()
        assert free.wait(240.0)

    other = threading.Thread(target=transactions.write, args=(storage, "digits (notes)", hold))
    other.start()
    holds.wait()
    answers: list[bool] = []
    worker = threading.Thread(target=lambda: answers.append(publish("digits", last=False)))
    worker.start()
    worker.join(60.0)
    free.set()
    other.join()
    assert answers == [False]


def test_workers_do_not_wait_for_a_slow_database(
    storage: PatientStorage, run: Callable[..., Claim], artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = threading.Event()

    def slow(name: str, place: PatientStorage, folder: Path, cached: BaseStorage, *, last: bool = False) -> bool:
        return free.wait(240.0)

    monkeypatch.setattr(notes, "publish", slow)
    monkeypatch.setattr("search.publisher.LEAVE_SECONDS", 0.1)
    registry.create(definitions.load("digits"), storage, DATA)
    claim = run("digits", {"depth": 3, "dropout": 0.1}, COMPLETE, 0.9)
    began = time.monotonic()
    with Publisher(storage, artifacts) as publisher:
        for _ in range(100):
            publisher.ended(claim, storage.get_trial(claim.trial_id))
    assert time.monotonic() - began < 120.0, "it waited for the database"
    free.set()
