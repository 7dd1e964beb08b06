"""The catalog: the notebook's studies, to the point, and better ones."""

import pytest

from studies.definition import Definition, catalog, load
from studies.model_rules import DEPTHS
from studies.space import Float

NOTEBOOK = [
    "notebook-conclusion",
    "notebook-dropout-3",
    "notebook-dropout-3-labelled",
    "notebook-dropout-7",
    "notebook-dropout-7-labelled",
]
AS_RUN = [0.00, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07]
AS_LABELLED = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]


def test_the_catalog_has_these_definitions() -> None:
    assert list(catalog()) == ["digits", "dropout-depth", "mnist-best", "mnist-cnn", "mnist-tiny", *NOTEBOOK]


@pytest.mark.parametrize("name", list(catalog()))
def test_a_definition_is_filed_under_its_name_and_says_what_it_is(name: str) -> None:
    definition = load(name)
    assert definition.name == name
    assert definition == catalog()[name]
    assert 20 < len(definition.description) <= 120
    assert definition.description.isprintable()


@pytest.mark.parametrize(
    ("name", "depth", "rate", "rates"),
    [
        ("notebook-dropout-3", 3, "dense_dropout", AS_RUN),
        ("notebook-dropout-3-labelled", 3, "dense_dropout", AS_LABELLED),
        ("notebook-dropout-7", 7, "conv_dropout", AS_RUN),
        ("notebook-dropout-7-labelled", 7, "conv_dropout", AS_LABELLED),
    ],
)
def test_a_sweep_has_the_notebooks_rates_in_its_order(name: str, depth: int, rate: str, rates: list[float]) -> None:
    definition = load(name)
    assert definition.queue() == [{rate: value} for value in rates]
    assert definition.trials == 8
    assert definition.fixed["depth"] == depth


def test_the_conclusion_has_the_five_rows_of_the_notebooks_table() -> None:
    definition = load("notebook-conclusion")
    # Depth, dropout layers, rate; batch normalisation follows from the depth.
    rows = [(point["depth"], point["dropout_layers"], point.get("dropout")) for point in definition.queue()]
    assert rows == [(3, False, None), (3, True, 0.0), (5, False, None), (7, True, 0.0), (7, True, 0.2)]
    assert definition.trials == 5
    assert "batch_norm" not in {*definition.space, *definition.fixed}


@pytest.mark.parametrize("name", NOTEBOOK)
def test_the_notebooks_studies_follow_its_protocol(name: str) -> None:
    definition = load(name)
    assert (definition.dataset, definition.model) == ("mnist", "convnet")
    assert definition.data.validation == "test"
    assert definition.data.limit is None
    assert definition.budget.epochs == 20
    # Adam's learning rate in Keras by default, and the batch size.
    trained_with: dict[str, object] = {"batch_size": 128, "optimizer": "adam", "learning_rate": 1e-3}
    if definition.fixed.get("depth") != 3:  # depth 3 has no batch normalisation
        trained_with["batch_norm_averages"] = "keras"
    assert {key: value for key, value in definition.fixed.items() if key != "depth"} == trained_with
    # Every trial of it is trained to the end.
    assert definition.pruner.kind == "none"
    assert definition.budget.hours is definition.budget.trial_minutes is None
    assert "test set" in definition.description, "its protocol must be marked"


def test_the_cited_example_trains_as_in_keras_2() -> None:
    definition = load("mnist-cnn")
    assert (definition.dataset, definition.model) == ("mnist", "mnist_cnn")
    assert definition.fixed == {"batch_size": 128, "optimizer": "adadelta", "learning_rate": 1.0}
    assert definition.queue() == [{"conv_dropout": 0.25, "dense_dropout": 0.5}]
    assert (definition.trials, definition.budget.epochs) == (1, 12)
    assert definition.data.validation == "test"
    assert definition.pruner.kind == "none"
    assert "test set" in definition.description, "its protocol must be marked"


def _ours() -> list[Definition]:
    return [definition for name, definition in catalog().items() if name not in (*NOTEBOOK, "mnist-cnn")]


@pytest.mark.parametrize("definition", _ours(), ids=lambda definition: definition.name)
def test_every_other_definition_is_judged_on_a_validation_split(definition: Definition) -> None:
    assert isinstance(definition.data.validation, float)
    assert 0.05 <= definition.data.validation <= 0.5
    assert "test set" not in definition.description


@pytest.mark.parametrize("name", ["digits", "dropout-depth"])
def test_a_search_over_depth_has_all_depths_and_tries_each_at_first(name: str) -> None:
    definition = load(name)
    assert tuple(definition.space["depth"].points() or ()) == DEPTHS
    assert definition.space["dropout"] == Float(low=0.0, high=0.7)
    assert [point["depth"] for point in definition.queue()][: len(DEPTHS)] == list(DEPTHS)
    assert definition.trials > len(definition.queue())
    assert definition.pruner.min_epochs < definition.budget.epochs
