"""What other programs write into the database breaks no command: it is understood, left alone or refused."""

import json
import math
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from conftest import TRIVIAL, Call
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

import search
from storage import artifacts, attributes, claims, ledger
from storage.owners import Owner
from storage.tables import StudyUserAttributeModel
from storage.transactions import PatientStorage
from studies import exports, registry, results
from studies.definition import parse

NOT_UTF_8 = "cannot open \udcff.png"  # as Python reads the name of such a file
JUNK: list[Any] = [None, True, -1, 4.5, math.inf, math.nan, 1e308, "\n[red]x", [], [1], {}, {"a": 1}, [{"host": "a"}]]
JUNK += [NOT_UTF_8, {"kind": "error", "message": NOT_UTF_8}]
OUR_KEYS = (
    *("failure", "imported", "import_key", "retry_of", "model", "history", "protocol", "seed", "precision", "device"),
    *("slot", "versions", "epochs", "best_epoch", "parameters", "seconds", "images_per_second", "data_fingerprint"),
)
DROPOUT = FloatDistribution(0.0, 0.7)
HISTORY = [{"loss": 1.0, "accuracy": 0.5, "val_loss": 1.0, "val_accuracy": 0.5, "seconds": 1.0}]


def added(value: float | None = 0.99, **rest: Any) -> FrozenTrial:
    """A trial that another program has run."""
    known = {"params": {"dropout": 0.1}, "distributions": {"dropout": DROPOUT}}
    return create_trial(**{"value": value} | known | rest)


@pytest.fixture
def good(home: Path, me: Owner) -> PatientStorage:
    """The database of the home, with a study `trivial` whose two trials are complete, and whose files exist."""
    search.create(parse(TRIVIAL), trials=2)
    storage = registry.storage_of(None)
    assert isinstance(storage, PatientStorage)
    for value in (0.8, 0.9):
        claim = claims.claim(storage, ledger.find(storage, "trivial"), me, 60.0)
        assert claim is not None
        claims.begin(storage, claim, {"dropout": (DROPOUT, value / 2)})
        claims.record_epochs(storage, claim, {1: value})
        folder = home / "yard" / "artifacts" / claim.folder
        folder.mkdir(parents=True)
        (folder / artifacts.MODEL).write_bytes(b"the model")
        (folder / artifacts.HISTORY).write_text(json.dumps(HISTORY), encoding="utf-8")
        files = {name.partition(".")[0]: str(claim.folder / name) for name in (artifacts.MODEL, artifacts.HISTORY)}
        claims.finish(storage, claim, TrialState.COMPLETE, value, files | {"epochs": 1})
    return storage


def _add_other_studies(storage: PatientStorage) -> None:
    for number, directions in enumerate((["minimize"], ["maximize"], ["minimize", "maximize"])):
        other = optuna.create_study(study_name=f"other {number} [red]\n", storage=storage, directions=directions)
        for name in attributes.SHAPES:
            other.set_user_attr(name, {"gpu_hours": 40})
        for value in (0.5, math.inf, -3.0):
            other.add_trial(create_trial(values=[value] * len(directions), user_attrs=dict.fromkeys(OUR_KEYS, "x")))
        other.ask()
        other.enqueue_trial({"x": 1})
    ours = storage.get_study_user_attrs(registry.find("trivial", storage).id)
    for number, changed in enumerate(({"later": 1}, {"space": {"dropout": 3}}, {"confirm": {}}, {"fixed": None})):
        later = optuna.create_study(study_name=f"later {number}", storage=storage, direction="maximize")
        for key, value in (ours | {"trialyard:definition": ours["trialyard:definition"] | changed}).items():
            later.set_user_attr(key, value)
    optuna.copy_study(
        from_study_name="trivial", from_storage=storage, to_storage=storage, to_study_name="a copy ../[red]"
    )
    with storage.engine.begin() as connection:
        row = {"study_id": other._study_id, "key": "note", "value_json": "{no json"}
        connection.execute(sqlalchemy.insert(StudyUserAttributeModel).values(row))


def _add_trials(storage: PatientStorage) -> None:
    study = registry.open("trivial", storage)
    for junk in JUNK:
        junk_attributes = dict.fromkeys(OUR_KEYS, junk)
        study.add_trial(added(user_attrs=junk_attributes))
        study.add_trial(create_trial(state=TrialState.FAIL, user_attrs=junk_attributes))
        study.add_trial(create_trial(state=TrialState.PRUNED, user_attrs=junk_attributes))
        for key in ("constraints", "constraints:size"):
            study.add_trial(added(system_attrs={key: junk}))
    for value in (math.inf, -math.inf, 99.3, -5.0, 1e308):
        study.add_trial(added(value))
    for epochs in ({0: 0.5}, {-1: 0.5}, {1: math.nan}, {1: math.inf, 2: -math.inf}, {10**6: 0.3}):
        study.add_trial(added(intermediate_values=epochs))
        study.add_trial(added(None, state=TrialState.PRUNED, intermediate_values=epochs))
    for path in ("/etc/passwd/model.keras", "../../model.keras", "a/../../model.keras"):
        study.add_trial(added(1.0, user_attrs={"model": path, "history": path}))
    kinds = {"depth": CategoricalDistribution(["a", None]), "x[red]\n": IntDistribution(0, 5)}
    study.add_trial(create_trial(value=0.98, params={"depth": None, "x[red]\n": 3}, distributions=kinds))
    storage.create_new_trial(study._study_id, added(None, values=[0.5, 0.6]))
    study.ask()
    for point in ({"dropout": "x"}, {"dropout": 99}, {"nothing": [1]}, {}):
        study.enqueue_trial(point)


COMMANDS = [
    *("status", "status --json", "status trivial", "status trivial --json", "leaderboard trivial"),
    *(
        "leaderboard trivial --json",
        "best trivial",
        "best trivial --json",
        "report trivial",
        "report trivial --format table",
    ),
    *("export trivial out", "compare trivial trivial", "compare trivial trivial --json", "create small.toml"),
    *("run small.toml --json", "work trivial", "storage create", "storage backup copy.db", "storage upgrade"),
    *("import trivial rows.csv", "import notebook", "storage prune --yes", "pause trivial", "resume trivial"),
    *("enqueue trivial dropout=0.33", "retry trivial", "stop trivial", "delete trivial --yes", "status"),
]


def test_every_command_of_a_study_works_beside_what_other_programs_wrote(
    home: Path, good: PatientStorage, trialyard: Call
) -> None:
    (home / "small.toml").write_text(TRIVIAL.replace("trials = 5", "trials = 2"), encoding="utf-8")
    (home / "rows.csv").write_text("dropout,accuracy\n0.2,0.7\n", encoding="utf-8")
    _add_other_studies(good)
    _add_trials(good)
    code, _, err = trialyard("storage", "check")  # it says what is wrong, in one line
    assert (code, len(err.splitlines())) == (1, 1)
    for command in COMMANDS:
        code, out, err = trialyard(*command.split())
        assert (command, code) == (command, 0), err
        assert "Traceback" not in err
        if "--json" in command:
            json.loads(out, parse_constant=pytest.fail)  # NaN and Infinity are not JSON


def test_a_trial_without_a_model_is_not_in_the_way_of_the_best_model(
    home: Path, good: PatientStorage, trialyard: Call
) -> None:
    (home / "rows.csv").write_text("dropout,accuracy\n0.2,0.95\n", encoding="utf-8")
    trialyard("import", "trivial", "rows.csv")
    registry.open("trivial", good).add_trial(added(0.97, user_attrs={"model": "../other/model.keras"}))
    assert results.best_trial("trivial").number == 3
    assert results.best_with_model(registry.find("trivial", good), good).number == 1
    folder = exports.export("trivial", home / "out")
    assert json.loads((folder / "trial.json").read_text())["number"] == 1


def test_an_imported_trial_is_marked(home: Path, good: PatientStorage, trialyard: Call) -> None:
    (home / "rows.csv").write_text("dropout,accuracy\n0.2,0.95\n", encoding="utf-8")
    trialyard("import", "trivial", "rows.csv")
    assert [row.imported for row in results.leaderboard("trivial")] == [True, False, False]
    titles, first, second, _ = trialyard("leaderboard", "trivial")[1].splitlines()
    assert (titles.split()[-1], first.split()[-1], second.split()[-1]) == ("imported", "yes", "1")
    assert "model            none: the trial was imported" in trialyard("best", "trivial")[1]
    assert json.loads(trialyard("best", "trivial", "--json")[1])["imported"] is True
