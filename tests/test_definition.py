"""The definition: any text gives a Definition, or one sentence that says what to correct."""

import itertools
import json
import math
import tomllib
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studies.definition import Definition, catalog, differences, from_json, load, parse
from studies.errors import DefinitionError
from studies.space import Choice, Float, Int

HEAD = """
name = "small"
dataset = "digits"
model = "convnet"
"""


def _text(
    *,
    top: str = "",
    head: str = HEAD,
    budget: str = "trials = 5",
    space: str = "depth = { choices = [3, 5] }\ndropout = { low = 0.0, high = 0.5 }",
    fixed: str = "",
    tail: str = "",
) -> str:
    """A valid definition, except for the parts that are replaced."""
    return f"{head}\n{top}\n[budget]\n{budget}\n[space]\n{space}\n[fixed]\n{fixed}\n{tail}\n"


def _dropout(range_: str, more: str = "") -> str:
    return _text(space=f"depth = {{ choices = [3, 5] }}\ndropout = {{ {range_} }}\n{more}")


def _refused(text: str) -> str:
    """The sentence with which `text` is refused."""
    with pytest.raises(DefinitionError) as caught:
        parse(text)
    return _one_line(caught.value)


def _one_line(error: DefinitionError) -> str:
    sentence = str(error)
    assert sentence.isprintable(), f"more than a line, or a control character: {sentence!r}"
    assert len(sentence) < 1000
    return sentence


def test_the_parts_of_the_table_below_are_good_by_themselves() -> None:
    definition = parse(_text())
    assert (definition.name, definition.trials) == ("small", 5)
    assert parse(_dropout("low = 0.0, high = 0.5, step = 0.1")).space["dropout"] == Float(low=0, high=0.5, step=0.1)


GRID = '[sampler]\nkind = "grid"'
POINTS = '[sampler]\nkind = "points"\n'
CONDITIONAL = "depth = { choices = [3, 5] }\ndropout = { low = 0.0, high = 0.5, when = { depth = 3 } }"
SWITCHES = """
depth = { choices = [3, 5] }
batch_norm = { choices = [true, false], when = { dropout_layers = true } }
dropout_layers = { choices = [true, false], when = { batch_norm = true } }
"""
HUGE = "9" * 30

BAD = {
    # Unknown keys, each with the nearest known one.
    "top-level key": (_text(top='precison = "auto"'), r"unknown key 'precison'.*did you mean 'precision'\?"),
    "top-level key like none": (
        _text(top="qqq = 1"),
        r"unknown key 'qqq': the known ones are name, .*, confirm$",
    ),
    "mistyped required key": (
        _text(head=HEAD.replace("dataset", "datset")),
        r"unknown key 'datset'.*did you mean 'dataset'\?",
    ),
    "table": (_text(tail="[smapler]\nseed = 1"), r"unknown key 'smapler'.*did you mean 'sampler'\?"),
    "key in [data]": (_text(tail="[data]\nvalidaton = 0.1"), r"'data.validaton'.*did you mean 'validation'\?"),
    "key in [budget]": (_text(budget="trails = 5"), r"unknown key 'budget.trails'.*did you mean 'trials'\?"),
    "key in [sampler]": (_text(tail="[sampler]\nsede = 5"), r"unknown key 'sampler.sede'.*did you mean 'seed'\?"),
    "key in [pruner]": (_text(tail="[pruner]\nkid = 'none'"), r"unknown key 'pruner.kid'.*did you mean 'kind'\?"),
    "key in a range": (_dropout("low = 0.0, hihg = 0.5"), r"unknown key 'space.dropout.hihg'.*did you mean 'high'\?"),
    "key in a whole range": (
        _text(space="depth = { choices = [3] }\nbatch_size = { low = 1, high = 4, setp = 1 }"),
        r"unknown key 'space.batch_size.setp'.*did you mean 'step'\?",
    ),
    "key in choices": (_text(space="depth = { choices = [3], wehn = {} }"), r"'space.depth.wehn'.*mean 'when'\?"),
    "range and choices": (_dropout("choices = [0.1], low = 0.0"), r"unknown key 'space.dropout.low'.*when, choices"),
    "hyperparameter in [space]": (
        _text(space="depth = { choices = [3] }\ndropuot = { low = 0.0, high = 0.5 }"),
        r"space.dropuot: the model convnet has no hyperparameter 'dropuot'.*did you mean 'dropout'\?",
    ),
    "hyperparameter in [fixed]": (
        _text(fixed="bach_size = 64"),
        r"fixed.bach_size: .*no hyperparameter 'bach_size'.*did you mean 'batch_size'\?",
    ),
    "hyperparameter of another model": (
        _text(head=HEAD.replace("convnet", "mnist_cnn"), space="depth = { choices = [3] }"),
        r"space.depth: the model mnist_cnn has no hyperparameter 'depth'",
    ),
    "momentum of adam": (
        _text(fixed='optimizer = "adam"\nmomentum = 0.9'),
        r"momentum is given, and the optimizer adam has none: choose sgd or rmsprop, or leave momentum out$",
    ),
    "warm-up of one cycle": (
        _text(fixed='schedule = "one_cycle"\nwarmup_epochs = 1'),
        r"warmup_epochs is given, and the schedule one_cycle has a warm-up of its own: leave warmup_epochs out$",
    ),
    # Wrong types: nothing is converted.
    "string for int": (_text(budget='trials = "5"'), r'budget.trials = "5" must be a whole number$'),
    "bool for int": (_text(budget="trials = true"), r"budget.trials = true must be a whole number$"),
    "real for int": (_text(budget="trials = 5.0"), r"budget.trials = 5.0 must be a whole number$"),
    "list for int": (_text(budget="trials = [5]"), r"budget.trials = \[5\] must be a whole number$"),
    "int for string": (_text(head=HEAD.replace('"small"', "3")), r"name = 3 must be a string$"),
    "bool for string": (_text(head=HEAD.replace('"digits"', "true")), r"dataset = true must be a string$"),
    "list for string": (_text(head=HEAD.replace('"convnet"', '["convnet"]')), r"model = \[.*\] must be a string$"),
    "number for text": (_text(top="description = 1.5"), r"description = 1.5 must be a string$"),
    "string for number": (_dropout('low = "0", high = 0.5'), r'space.dropout.low = "0" must be a number$'),
    "bool for number": (_dropout("low = true, high = 0.5"), r"space.dropout.low = true must be a number$"),
    "list for number": (_dropout("low = [0.0], high = 0.5"), r"space.dropout.low = \[0.0\] must be a number$"),
    "string for minutes": (_text(budget="trials = 5\nhours = '2'"), r'budget.hours = "2" must be a number$'),
    "int for bool": (_dropout("low = 0.1, high = 0.5, log = 1"), r"space.dropout.log = 1 must be true or false$"),
    "string for bool": (
        _dropout("low = 0.1, high = 0.5, log = 'true'"),
        r'space.dropout.log = "true" must be true or false$',
    ),
    "string for list": (_dropout("choices = '0.1'"), r'space.dropout.choices = "0.1" must be a list$'),
    "number for list": (_dropout("choices = 0.1"), r"space.dropout.choices = 0.1 must be a list$"),
    "table for list": (_text(top="points = { depth = 3 }"), r'points = {"depth": 3} must be a list$'),
    "list in a list": (_dropout("choices = [[0.1]]"), r"space.dropout.choices\[1\] = \[0.1\] must be .*a number"),
    "empty list": (_dropout("choices = []"), r"space.dropout.choices = \[\] must not be empty$"),
    "list for a value": (
        _text(fixed="batch_size = [64]"),
        r"fixed.batch_size = \[64\] must be true or false, a number or a string$",
    ),
    "date for a value": (_text(fixed="batch_size = 2020-01-01"), r"fixed.batch_size = .*2020, 1, 1.* must be "),
    "number for a parameter": (
        _text(space="depth = 3"),
        r"space.depth = 3 must be a table such as \{ low = 0.0, high = 0.7 \} or \{ choices = \[3, 5, 7\] \}",
    ),
    "list for a parameter": (_text(space="depth = [3, 5]"), r"space.depth = \[3, 5\] must be a table such as"),
    "list for a table": (_text(top="data = [0.1]"), r"data = \[0.1\] must be a table$"),
    "number for a point": (_text(top="points = [3]"), r"points\[1\] = 3 must be a table$"),
    "string for validation": (
        _text(tail="[data]\nvalidation = '0.1'"),
        r'data.validation = "0.1" must be a number or must be "test"$',
    ),
    "bool for validation": (_text(tail="[data]\nvalidation = true"), r"data.validation = true must be a number or"),
    "string for when": (_dropout("low = 0.0, high = 0.5, when = 'depth'"), r'space.dropout.when = "depth" must be a'),
    "unknown type": (
        _dropout("low = 0.0, high = 0.5, type = 'real'"),
        r'space.dropout.type = "real" must be .*"float"',
    ),
    # Ranges.
    "half a range called as its kind": (
        _text(head=HEAD.replace("convnet", "my.models:build"), space="Float = { low = 0.5 }"),
        r"space.Float.high is missing: add it$",
    ),
    "reversed range": (_dropout("low = 0.5, high = 0.0"), r"space.dropout: .*low = 0.5 to high = 0 is reversed"),
    "reversed whole range": (
        _text(space="depth = { choices = [3] }\nbatch_size = { low = 64, high = 32 }"),
        r"space.batch_size: .*low = 64 to high = 32 is reversed",
    ),
    "empty range": (_dropout("low = 0.5, high = 0.5"), r"space.dropout: .*from 0.5 to 0.5 is empty.*under \[fixed\]"),
    "half a range": (_dropout("low = 0.5"), r"space.dropout.high is missing: add it$"),
    "log from zero": (_dropout("low = 0.0, high = 0.5, log = true"), r"space.dropout: log needs low > 0.*low is 0:"),
    "log from below zero": (_dropout("low = -1.0, high = 0.5, log = true"), r"space.dropout: log needs .*low is -1:"),
    "log with step": (
        _dropout("low = 0.1, high = 0.5, log = true, step = 0.1"),
        r"space.dropout: log and step exclude each other: leave one out$",
    ),
    "whole log with step": (
        _text(space="depth = { choices = [3] }\nbatch_size = { low = 1, high = 9, log = true, step = 2 }"),
        r"space.batch_size: log and step exclude each other",
    ),
    "step that does not divide": (
        _dropout("low = 0.0, high = 0.5, step = 0.3"),
        r"space.dropout: high = 0.5 is not a whole number of steps of 0.3 above low = 0: choose a step",
    ),
    "whole step that does not divide": (
        _text(space="depth = { choices = [3] }\nbatch_size = { low = 1, high = 9, step = 3 }"),
        r"space.batch_size: high = 9 is not a whole number of steps of 3 above low = 1: choose a step",
    ),
    "step beyond the range": (
        _dropout("low = 0.0, high = 0.5, step = 1.0"),
        r"high = 0.5 is not a whole number of steps",
    ),
    "no step": (_dropout("low = 0.0, high = 0.5, step = 0.0"), r"space.dropout.step = 0.0 must be greater than 0$"),
    "step back": (_dropout("low = 0.0, high = 0.5, step = -0.1"), r"space.dropout.step = -0.1 must be greater than 0$"),
    "choice named twice": (_dropout("choices = [0.1, 0.2, 0.1]"), r"space.dropout: choices names 0.1 twice"),
    # Values that are not numbers.
    "nan in a range": (_dropout("low = nan, high = 0.5"), r"space.dropout.low = NaN must be finite$"),
    "infinite range": (_dropout("low = 0.0, high = inf"), r"space.dropout.high = Infinity must be finite$"),
    "infinite step": (_dropout("low = 0.0, high = 0.5, step = inf"), r"space.dropout.step = Infinity must be finite$"),
    "nan among choices": (_dropout("choices = [nan]"), r"space.dropout.choices\[1\] = NaN must be .*finite"),
    "infinity among choices": (
        _dropout("choices = [-inf]"),
        r"space.dropout.choices\[1\] = -Infinity must be .*finite",
    ),
    "fixed nan": (_text(fixed="learning_rate = nan"), r"fixed.learning_rate = NaN must be .*finite"),
    "fixed infinity": (_text(fixed="learning_rate = inf"), r"fixed.learning_rate = Infinity must be .*finite"),
    "nan in a point": (_text(tail="[[points]]\ndropout = nan"), r"points\[1\].dropout = NaN must be .*finite"),
    "nan in [data]": (_text(tail="[data]\nvalidation = nan"), r"data.validation = NaN must be finite$"),
    "endless budget": (_text(budget="trials = 5\nhours = inf"), r"budget.hours = Infinity must be finite$"),
    "wilcoxon without repeats": (
        _text(tail='[pruner]\nkind = "wilcoxon"'),
        r'pruner.kind = "wilcoxon" compares the repeats of two configurations, and needs budget.repeats of 5 or more '
        r"\(it is 1\): raise it, or choose hyperband$",
    ),
    "epochs of repeats": (
        _text(budget="trials = 5\nrepeats = 3", tail='[pruner]\nkind = "asha"'),
        r'pruner.kind = "asha" ends trials by their epochs, and with budget.repeats = 3 a trial is judged by whole '
        r"trainings: choose wilcoxon or none$",
    ),
    "no repeats": (_text(budget="trials = 5\nrepeats = 0"), r"budget.repeats = 0 must be greater than or equal to 1$"),
    "huge budget": (_text(budget=f"trials = {HUGE}"), rf"budget.trials = {HUGE} must be less than or equal to 1e\+06$"),
    "huge range": (
        _text(space=f"depth = {{ choices = [3] }}\nbatch_size = {{ low = 1, high = {HUGE} }}"),
        rf"space.batch_size.high = {HUGE} must be less than or equal to",
    ),
    "huge fixed": (_text(fixed=f"batch_size = {HUGE}"), rf"fixed.batch_size = {HUGE} must be .*less than or equal to"),
    "huge choice": (_text(space=f"depth = {{ choices = [{HUGE}] }}"), rf"space.depth.choices\[1\] = {HUGE} must be "),
    "huge point": (_text(tail=f"[[points]]\ndepth = {HUGE}"), rf"points\[1\].depth = {HUGE} must be "),
    "huge number of a model of one's own": (
        _text(head=HEAD.replace("convnet", "my.models:build"), fixed=f"key = {2**60}"),
        rf"fixed.key = {2**60} must be .*less than or equal to",  # and not 1.152921504606847e18
    ),
    "huge seed": (_text(tail=f"[sampler]\nseed = {2**32}"), rf"sampler.seed = {2**32} must be less than"),
    "thousands of digits": (_text(budget=f"trials = {'9' * 5000}"), r"not valid TOML .*digits"),
    # Conditions.
    "when on unknown": (
        _dropout("low = 0.0, high = 0.5, when = { dept = 3 }"),
        r"space.dropout.when.dept: there is no 'dept' in \[space\] to depend on; did you mean 'depth'\?",
    ),
    "when on fixed": (
        _text(space="dropout = { low = 0.0, high = 0.5, when = { depth = 3 } }", fixed="depth = 3"),
        r"space.dropout.when.depth: there is no 'depth' in \[space\]",
    ),
    "when on an unknown value": (
        _dropout("low = 0.0, high = 0.5, when = { depth = [3, 4] }"),
        r"space.dropout.when.depth = 4 must be one of 3, 5, as space.depth says$",
    ),
    "when on a value of another type": (
        _dropout("low = 0.0, high = 0.5, when = { depth = '3' }"),
        r'space.dropout.when.depth = "3" must be one of 3, 5, as space.depth says$',
    ),
    "when on a real number": (
        _dropout("low = 0.0, high = 0.5, when = { width = 1.0 }", "width = { low = 0.5, high = 2.0 }"),
        r"space.dropout.when.width: 'width' is a float",
    ),
    "when on itself": (
        _dropout("choices = [0.1, 0.2], when = { dropout = 0.1 }"),
        r"space.dropout.when.dropout: a parameter cannot depend on itself",
    ),
    "when in a circle": (_text(space=SWITCHES), r"space.(batch_norm|dropout_layers).when is circular: "),
    "circle beside an innocent": (
        _text(space=f"{SWITCHES}\ndropout = {{ low = 0.0, high = 0.5, when = {{ batch_norm = true }} }}".lstrip()),
        r"space.(batch_norm|dropout_layers).when is circular: ",
    ),
    "innocent before a circle": (
        _text(space=f"dropout = {{ low = 0.0, high = 0.5, when = {{ batch_norm = true }} }}\n{SWITCHES}"),
        r"space.(batch_norm|dropout_layers).when is circular: ",
    ),
    "when on no value": (
        _dropout("low = 0.0, high = 0.5, when = { depth = [] }"),
        r"space.dropout.when.depth = \[\] has no value",
    ),
    "depth only sometimes": (
        _text(
            space="depth = { choices = [3], when = { batch_norm = true } }\nbatch_norm = { choices = [true, false] }"
        ),
        r'space.depth.when = \{"batch_norm": \[true\]\}: .*leave `when` out',
    ),
    # What the models know.
    "empty space": (_text(space="", fixed="depth = 3"), r"space is empty.*name a hyperparameter"),
    "searched and fixed": (_text(fixed="depth = 3"), r"fixed.depth = 3 is in \[space\] too: leave one"),
    "depth missing": (_text(space="dropout = { low = 0.0, high = 0.5 }"), r"depth is missing: .*one of 3, 5, 7$"),
    "unknown depth in choices": (
        _text(space="depth = { choices = [3, 4] }"),
        r"space.depth.choices = 4: depth must be one of 3, 5, 7$",
    ),
    "unknown depth in a range": (
        _text(space="depth = { low = 3, high = 7 }"),
        r"space.depth.* = 4: depth must be one of 3, 5, 7$",
    ),
    "unknown depth fixed": (
        _text(space="dropout = { low = 0.0, high = 0.5 }", fixed="depth = 9"),
        r"fixed.depth = 9 must be one of 3, 5, 7$",
    ),
    "depth as a real number": (
        _text(space="dropout = { low = 0.0, high = 0.5 }", fixed="depth = 3.0"),
        r"fixed.depth = 3.0 must be one of 3, 5, 7$",
    ),
    "dropout 1 fixed": (
        _text(space="depth = { choices = [3] }", fixed="dropout = 1.0"),
        r"fixed.dropout = 1.0 must be at least 0 and less than 1$",
    ),
    "dropout 1 at the end": (
        _dropout("low = 0.0, high = 1.0"),
        r"space.dropout.high = 1.0: dropout must be at least 0",
    ),
    "dropout 1 among choices": (_dropout("choices = [0.0, 1.0]"), r"space.dropout.choices = 1.0: dropout must be at"),
    "dropout below 0": (_dropout("low = -0.1, high = 0.5"), r"space.dropout.low = -0.1: dropout must be at least 0"),
    "batch size 0": (_text(fixed="batch_size = 0"), r"fixed.batch_size = 0 must be at least 1$"),
    "real batch size": (_text(fixed="batch_size = 64.5"), r"fixed.batch_size = 64.5 must be a whole number$"),
    "range of real batch sizes": (
        _text(space="depth = { choices = [3] }\nbatch_size = { low = 16.0, high = 64.0 }"),
        r"space.batch_size.low = 16.0: batch_size must be a whole number$",
    ),
    "range of batch sizes from 0": (
        _text(space="depth = { choices = [3] }\nbatch_size = { low = 0, high = 64 }"),
        r"space.batch_size.low = 0: batch_size must be at least 1$",
    ),
    "learning rate 0": (_text(fixed="learning_rate = 0.0"), r"fixed.learning_rate = 0.0 must be more than 0$"),
    "switch as a number": (_text(fixed="batch_norm = 1"), r"fixed.batch_norm = 1 must be one of "),
    "unknown optimizer": (
        _text(fixed='optimizer = "adan"'),
        r'fixed.optimizer = "adan" must be one of adam, adamw, .*',
    ),
    "unknown optimizer among choices": (
        _text(space='depth = { choices = [3] }\noptimizer = { choices = ["adam", "Adam"] }'),
        r'space.optimizer.choices = "Adam": optimizer must be one of adam, ',
    ),
    # Points.
    "point of unknown": (
        _text(tail="[[points]]\ndropuot = 0.1"),
        r"points\[1\].dropuot = 0.1: there is no 'dropuot' in \[space\]; did you mean 'dropout'\?",
    ),
    "point off the choices": (
        _text(tail="[[points]]\ndepth = 3\n[[points]]\ndepth = 7"),
        r"points\[2\].depth = 7 must be one of 3, 5, as space.depth says$",
    ),
    "point off the range": (
        _text(tail="[[points]]\ndropout = 0.6"),
        r"points\[1\].dropout = 0.6 must be from 0 to 0.5",
    ),
    "point of another type": (
        _text(tail="[[points]]\ndropout = '0.1'"),
        r'points\[1\].dropout = "0.1" must be a number',
    ),
    "point twice": (
        _text(tail="[[points]]\ndepth = 3\n[[points]]\ndepth = 5\n[[points]]\ndepth = 3"),
        r"points\[3\] repeats points\[1\]: leave one out$",
    ),
    "point twice, written differently": (
        _text(tail="[[points]]\ndropout = 0\n[[points]]\ndropout = 0.0"),
        r"points\[2\] repeats points\[1\]: leave one out$",
    ),
    "point that does not apply": (
        _text(space=CONDITIONAL, tail="[[points]]\ndepth = 5\ndropout = 0.1"),
        r"points\[1\].dropout = 0.1 does not apply, as space.dropout.when says: leave it out$",
    ),
    "half a point": (
        _text(tail=f"{POINTS}[[points]]\ndepth = 3"),
        r"points\[1\] has no 'dropout': .*must be complete$",
    ),
    "half a point of a grid": (
        _text(
            space="depth = { choices = [3, 5] }\nbatch_size = { choices = [32] }", tail=f"{GRID}\n[[points]]\ndepth=3"
        ),
        r"points\[1\] has no 'batch_size': .*must be complete$",
    ),
    "list in a point": (_text(tail="[[points]]\ndepth = [3]"), r"points\[1\].depth = \[3\] must be "),
    # Samplers, pruners, budgets, data.
    "points without points": (
        _text(tail=POINTS),
        r'sampler.kind = "points" tries only the points under \[\[points\]\]',
    ),
    "cmaes with one number": (
        _text(tail='[sampler]\nkind = "cmaes"'),
        r'sampler.kind = "cmaes" needs two .*choose tpe$',
    ),
    "cmaes with a conditional number": (
        _text(space=f"{CONDITIONAL}\nwidth = {{ low = 0.5, high = 2.0 }}", tail='[sampler]\nkind = "cmaes"'),
        r'sampler.kind = "cmaes" needs two .*\[space\] has 1',
    ),
    "grid over a continuous range": (_text(tail=GRID), r"space.dropout is continuous .*give it a step$"),
    "grid too large": (
        _text(
            space="depth = { choices = [3] }\nbatch_size = { low = 1, high = 1000 }\n"
            "dropout = { low = 0.0, high = 0.5, step = 0.001 }",
            tail=GRID,
        ),
        r"the grid has more than 100000 points: widen a step",
    ),
    "no budget": (_text(budget=""), r"budget.trials is missing, and the sampler tpe never ends by itself"),
    "budget of 0": (_text(budget="trials = 0"), r"budget.trials = 0 must be greater than or equal to 1$"),
    "no epochs": (_text(budget="trials = 5\nepochs = 0"), r"budget.epochs = 0 must be greater than or equal to 1$"),
    "no time": (_text(budget="trials = 5\ntrial_minutes = 0"), r"budget.trial_minutes = 0 must be greater than 0$"),
    "unknown sampler": (
        _text(tail='[sampler]\nkind = "tpee"'),
        r'sampler.kind = "tpee" must be "tpe", .* or "points"$',
    ),
    "number for sampler": (_text(tail="[sampler]\nkind = 1"), r'sampler.kind = 1 must be "tpe", .* or "points"$'),
    "unknown pruner": (_text(tail='[pruner]\nkind = "hyper"'), r'pruner.kind = "hyper" must be "hyperband", .*"none"$'),
    "unknown precision": (_text(top='precision = "float16"'), r'precision = "float16" must be "auto", .*bfloat16"$'),
    "validation on everything": (
        _text(tail="[data]\nvalidation = 1.0"),
        r"data.validation = 1.0 must be less than 1 or",
    ),
    "validation on nothing": (_text(tail="[data]\nvalidation = 0"), r"data.validation = 0 must be greater than 0 or"),
    "no images": (_text(tail="[data]\nlimit = 0"), r"data.limit = 0 must be greater than or equal to 1$"),
    "unknown dataset": (
        _text(head=HEAD.replace('"digits"', '"minst"')),
        r'dataset = "minst" must be one of mnist, .*\.npz.*"package.module:function"; did you mean \'mnist\'\?$',
    ),
    "unknown model": (
        _text(head=HEAD.replace('"convnet"', '"convent"')),
        r'model = "convent" must be one of convnet, mnist_cnn, .*; did you mean \'convnet\'\?$',
    ),
    "no dataset": (_text(head=HEAD.replace('dataset = "digits"', "")), r"dataset is missing: add it$"),
    "empty dataset": (_text(head=HEAD.replace('"digits"', '""')), r'dataset = "" must not be empty$'),
    "a path that is none": (
        _text(head=HEAD.replace('"digits"', r'"a\u0000.npz"')),
        r'dataset = "a\\u0000.npz" is not a path',
    ),
    "nothing": ("", r"(name|dataset|model|space) is missing: add it$"),
    # Names become folders.
    "name with a slash": (_text(head=HEAD.replace("small", "a/b")), r'name = "a/b" must be letters, digits'),
    "name of the folder above": (_text(head=HEAD.replace("small", "..")), r'name = ".." must be letters, digits'),
    "path as a name": (_text(head=HEAD.replace("small", "../../etc")), r'name = "../../etc" must be letters'),
    "name with a backslash": (_text(head=HEAD.replace("small", r"a\\b")), r'name = "a\\\\b" must be letters'),
    "hidden name": (_text(head=HEAD.replace("small", ".small")), r'name = ".small" must be letters'),
    "name with a newline": (_text(head=HEAD.replace("small", r"small\n")), r'name = "small\\n" must be letters'),
    "name with a bell": (_text(head=HEAD.replace("small", r"sm\u0007all")), r'name = "sm\\u0007all" must be letters'),
    "empty name": (_text(head=HEAD.replace("small", "")), r'name = "" must be letters'),
    "long name": (_text(head=HEAD.replace("small", "s" * 101)), r'name = "s{50,}.* must be letters, .*at most 100'),
    # Keys and values that would break the line.
    "key with a newline": (_text(top=r'"a\nb" = 1'), r"unknown key .*the known ones are"),
    "hyperparameter with a newline": (
        _text(space='depth = { choices = [3] }\n"a\\nb" = { low = 0.0, high = 1.0 }'),
        r"space.*: a hyperparameter's name must be letters",
    ),
    "fixed with a newline": (_text(fixed='"a\\nb" = 1'), r"fixed.*: a hyperparameter's name must be letters"),
    "when with a newline": (_dropout('low = 0.0, high = 0.5, when = { "a\\nb" = 1 }'), r"space.dropout.when"),
    "control character in a dataset": (
        _text(head=HEAD.replace("digits", r"dig\u001bits")),
        r"dataset = .* must be one",
    ),
    "long key": (_text(top=f"{'k' * 5000} = 1"), r"unknown key .*the known ones are"),
    "long hyperparameter": (_text(fixed=f"{'k' * 5000} = 1"), r"fixed.*: a hyperparameter's name must be letters"),
    "long when": (_dropout(f"low = 0.0, high = 0.5, when = {{ {'k' * 5000} = 1 }}"), r"space.dropout.when"),
    "long description": (_text(top=f"description = '{'x' * 3000}'"), r"description = .* is too long"),
    "long value": (_text(top=f"precision = '{'x' * 3000}'"), r'precision = .* must be "auto"'),
    "choices that break the line": (
        _text(
            head=HEAD.replace("convnet", "my.models:build"),
            space='a = { choices = ["one\\ntwo"] }',
            tail="[[points]]\na = 1",
        ),
        r"points\[1\].a = 1 must be one of ",
    ),
    "more choices than a line": (
        _text(
            head=HEAD.replace("convnet", "my.models:build"),
            space=f"a = {{ choices = {list(range(900))} }}",
            tail="[[points]]\na = -1",
        ),
        r"points\[1\].a = -1 must be one of 0, 1, 2",
    ),
    "too many choices": (_dropout(f"choices = {list(range(1001))}"), r"space.dropout.choices = \[0, 1, .* is too long"),
    # Text that is not TOML.
    "prose": ("search the best dropout", r"the definition is not valid TOML \(.*\): correct it$"),
    "cut off": (_text().rstrip() + "\n[", r"is not valid TOML \("),
    "key twice": (_text(top="name = 'again'"), r"is not valid TOML \(.*(overwrite|twice)"),
    "table twice": (_text(tail="[budget]"), r"is not valid TOML \(.*twice"),
    "raw control character": (
        _text(head=HEAD.replace("small", "sm\x07all")),
        r"is not valid TOML \(Illegal character '\\x07'",
    ),
    "JSON": (json.dumps({"name": "small"}), r"is not valid TOML \("),
    "lists without end": ("a = " + "[" * 100_000, r"is not valid TOML \(.*nested too deeply|is nested too deeply"),
    "tables without end": (f"{'.'.join('a' * 5000)} = 1", r"unknown key"),
    "a value nested without end": (_text(top=f"data = {'[' * 200}{']' * 200}"), r"data = .* must be a table$"),
}


@pytest.mark.parametrize(("text", "sentence"), BAD.values(), ids=BAD.keys())
def test_a_mistake_is_refused_with_its_key_its_value_and_the_rule(text: str, sentence: str) -> None:
    with pytest.raises(DefinitionError, match=sentence) as caught:
        parse(text)
    assert str(caught.value).startswith("the definition")
    _one_line(caught.value)


def test_a_conditional_grid_is_measured_by_the_points_that_it_has() -> None:
    ranges = "\n".join(
        f"{name} = {{ low = 0, high = 999, when = {{ which = '{name}' }} }}" for name in ("one", "two", "three")
    )
    definition = parse(
        _text(
            head=HEAD.replace("convnet", "my.models:build"),
            budget="",
            space=f"which = {{ choices = ['one', 'two', 'three'] }}\n{ranges}",
            tail=GRID,
        )
    )
    assert definition.trials == 3000


def test_a_grid_of_thousands_of_hyperparameters_is_refused_or_made() -> None:
    names = [f"a{number}" for number in range(2000)]
    text = _text(
        head=HEAD.replace("convnet", "my.models:build"),
        budget="",
        space="\n".join(f"{name} = {{ choices = [0] }}" for name in names),
        tail=GRID,
    )
    try:
        assert parse(text).queue() == [dict.fromkeys(names, 0)]
    except DefinitionError as error:
        _one_line(error)


class TestFiles:
    """A definition is a file, or one of the catalog."""

    def test_a_file_is_read_and_named_in_its_mistakes(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.toml"
        path.write_text(_text(), encoding="utf-8")
        assert load(str(path)) == parse(_text())
        path.write_text(_text(budget="trials = 0"), encoding="utf-8")
        with pytest.raises(DefinitionError, match=r"mine\.toml: budget.trials = 0 must be"):
            load(str(path))

    def test_a_file_needs_no_ending(self, tmp_path: Path) -> None:
        (tmp_path / "mine").write_text(_text(), encoding="utf-8")
        assert load(str(tmp_path / "mine")).name == "small"

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(DefinitionError, match=r"none\.toml cannot be read .*give the path of a TOML file$"):
            load(str(tmp_path / "none.toml"))

    def test_a_folder_is_no_file(self, tmp_path: Path) -> None:
        (tmp_path / "folder.toml").mkdir()
        with pytest.raises(DefinitionError, match=r"folder\.toml cannot be read"):
            load(str(tmp_path / "folder.toml"))

    def test_what_is_no_utf_8_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "latin.toml"
        path.write_bytes(_text(top="description = 'Größe'").encode("latin-1"))
        with pytest.raises(DefinitionError, match=r"latin\.toml is not text in UTF-8"):
            load(str(path))

    @pytest.mark.parametrize("name", ["windows.toml", "a b%20c:d?.toml"])
    def test_an_editor_of_windows_and_odd_names_are_fine(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        path.write_bytes(b"\xef\xbb\xbf" + _text().replace("\n", "\r\n").encode())
        assert load(str(path)) == parse(_text())

    @pytest.mark.parametrize(
        ("name", "sentence"),
        [
            ("digit", r"'digit' is neither a file nor in the catalog \(digits, .*; did you mean 'digits'\?$"),
            ("notebook-dropout-5", r"did you mean 'notebook-dropout-[37]'\?$"),
            ("zzz", r"'zzz' is neither a file nor in the catalog .*`trialyard catalog` describes them$"),
            ("", r"'' is neither a file nor in the catalog"),
            (".", r"'.' is neither a file nor in the catalog"),
            ("a\nb", r"'a\\nb' is neither a file nor in the catalog"),
            ("\0", r"neither a file nor in the catalog"),
            ("zero\0.toml", r"zero.*cannot be read"),
            ("line\nfeed.toml", r"line.*feed.*cannot be read"),
            ("x" * 5000, r"x.* is neither a file nor in the catalog"),
            ("x" * 5000 + ".toml", r"x.* cannot be read"),
        ],
    )
    def test_a_name_of_nothing_is_refused_with_the_nearest(self, home: Path, name: str, sentence: str) -> None:
        with pytest.raises(DefinitionError, match=sentence) as caught:
            load(name)
        _one_line(caught.value)

    def test_a_name_of_the_catalog_needs_no_file(self, home: Path) -> None:
        assert load("digits") == catalog()["digits"]

    def test_a_data_file_is_found_beside_the_definition(
        self, home: Path, write_npz: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        images = write_npz("mine.npz")
        (home / "mine.toml").write_text(_text(head=HEAD.replace("digits", "mine.npz")), encoding="utf-8")
        assert load("mine.toml").dataset == str(images)
        elsewhere = home / "elsewhere"
        elsewhere.mkdir()
        monkeypatch.chdir(elsewhere)
        assert load("../mine.toml").dataset in (str(images), str(elsewhere / ".." / "mine.npz"))
        assert Path(load(str(home / "mine.toml")).dataset) == images

    def test_a_data_file_that_is_not_beside_it_keeps_its_name(self, home: Path) -> None:
        (home / "mine.toml").write_text(_text(head=HEAD.replace("digits", "mine.npz")), encoding="utf-8")
        assert load("mine.toml").dataset == "mine.npz"


class TestOverrides:
    """The command line's options replace what the file says."""

    def test_each_replaces_its_key_and_nothing_else(self) -> None:
        text = _text(tail="[data]\nlimit = 100")
        raw = parse(text).to_json()
        changed = parse(text, name="other", trials=7, epochs=3, limit=50).to_json()
        assert changed == raw | {
            "name": "other",
            "budget": raw["budget"] | {"trials": 7, "epochs": 3},
            "data": raw["data"] | {"limit": 50},
        }

    def test_a_table_that_is_not_written_is_added(self) -> None:
        assert load("digits", limit=300).data.limit == 300
        assert load("notebook-dropout-3", trials=2).trials == 2

    def test_none_counts_as_not_given(self) -> None:
        assert load("digits", name=None, trials=None, epochs=None, limit=None) == load("digits")

    @pytest.mark.parametrize(
        ("override", "sentence"),
        [
            ({"trials": 0}, "budget.trials = 0 must be"),
            ({"epochs": -1}, "budget.epochs = -1 must be"),
            ({"limit": 0}, "data.limit = 0 must be"),
            ({"name": "a/b"}, 'name = "a/b" must be'),
        ],
    )
    def test_an_override_is_checked_like_the_file(self, override: dict[str, Any], sentence: str) -> None:
        with pytest.raises(DefinitionError, match=sentence):
            load("digits", **override)

    def test_an_override_does_not_hide_that_a_table_is_none(self) -> None:
        with pytest.raises(DefinitionError, match=r"data = \[1\] must be a table"):
            parse(_text(top="data = [1]"), limit=5)


class TestQueue:
    """The points that are tried first, and how many trials they make."""

    def test_a_grid_is_tried_whole(self) -> None:
        definition = load("notebook-dropout-3")
        assert len(definition.queue()) == definition.trials == 8

    def test_a_budget_may_be_less_than_the_grid_but_not_more(self) -> None:
        assert load("notebook-dropout-3", trials=3).trials == 3
        assert load("notebook-dropout-3", trials=30).trials == 8

    def test_listed_points_come_first_and_are_not_repeated_by_the_grid(self) -> None:
        text = _text(
            budget="",
            space="depth = { choices = [3, 5] }\ndropout = { low = 0.0, high = 0.2, step = 0.1 }",
            tail=f"{GRID}\n[[points]]\ndepth = 5\ndropout = 0.1\n[[points]]\ndepth = 3\ndropout = 0",
        )
        queue = [(point["depth"], point["dropout"]) for point in parse(text).queue()]
        assert queue == [(5, 0.1), (3, 0.0), (3, 0.1), (3, 0.2), (5, 0.0), (5, 0.2)]

    def test_a_whole_number_in_a_point_is_real_where_the_parameter_is(self) -> None:
        (point,) = parse(_text(tail="[[points]]\ndepth = 3\ndropout = 0")).queue()
        assert [type(value) for value in point.values()] == [int, float]

    def test_points_are_all_that_is_tried_with_their_own_sampler(self) -> None:
        text = _text(
            budget="", tail=f"{POINTS}[[points]]\ndepth = 3\ndropout = 0.1\n[[points]]\ndepth = 5\ndropout = 0.0"
        )
        definition = parse(text)
        assert definition.trials == len(definition.queue()) == 2

    def test_a_points_study_with_a_condition_needs_only_what_applies(self) -> None:
        tail = f"{POINTS}[[points]]\ndepth = 3\ndropout = 0.1\n[[points]]\ndepth = 5"
        assert parse(_text(budget="", space=CONDITIONAL, tail=tail)).queue() == [
            {"depth": 3, "dropout": 0.1},
            {"depth": 5},
        ]

    def test_other_samplers_try_the_points_first_and_then_their_budget(self) -> None:
        definition = parse(_text(tail="[[points]]\ndepth = 3"))
        assert definition.queue() == [{"depth": 3}]
        assert definition.trials == 5


class TestDifferences:
    """The differences that make trials of two definitions not comparable."""

    def test_a_definition_does_not_differ_from_itself(self) -> None:
        for definition in catalog().values():
            assert differences(definition, definition) == []

    def test_only_the_budget_and_the_description_may_differ(self) -> None:
        more = "trials = 50\nhours = 2\ntrial_minutes = 3"
        assert differences(parse(_text()), parse(_text(budget=more, top="description = 'x'"))) == []

    def test_the_folder_of_a_data_file_may_differ(self, tmp_path: Path) -> None:
        definitions = []
        for folder in (tmp_path / "before", tmp_path / "after"):
            folder.mkdir()
            (folder / "digits.npz").touch()
            (folder / "study.toml").write_text(_text(head=HEAD.replace("digits", "digits.npz")), encoding="utf-8")
            definitions.append(load(str(folder / "study.toml")))
        assert differences(*definitions) == []
        assert differences(definitions[0], parse(_text(head=HEAD.replace("digits", "other.npz")))) == [
            'dataset = "digits.npz" in the database and "other.npz" in this definition'
        ]

    @pytest.mark.parametrize(
        ("other", "difference"),
        [
            (_text(budget="trials = 5\nepochs = 3"), "budget.epochs = 20 in the database and 3 in this definition"),
            (
                _text(head=HEAD.replace("digits", "mnist")),
                'dataset = "digits" in the database and "mnist" in this definition',
            ),
            (
                _text(tail="[data]\nvalidation = 'test'"),
                'data.validation = 0.1 in the database and "test" in this definition',
            ),
            (_text(tail="[sampler]\nseed = 1"), "sampler.seed = 0 in the database and 1 in this definition"),
            (_text(fixed="batch_size = 64"), "fixed.batch_size = null in the database and 64 in this definition"),
            (_dropout("low = 0.0, high = 0.6"), "space.dropout.high = 0.5 in the database and 0.6 in this definition"),
            (_dropout("choices = [0.0]"), "space.dropout.choices = null in the database and [0.0] in this definition"),
            (
                _text(space="depth = { choices = [3, 5] }"),
                "space.dropout.low = 0.0 in the database and null in this definition",
            ),
            (_text(space=CONDITIONAL), "space.dropout.when.depth = null in the database and [3] in this definition"),
            (_text(tail="[[points]]\ndepth = 3"), 'points = [] in the database and [{"depth": 3}] in this definition'),
            (_text(tail="[pruner]\nmin_epochs = 2"), "pruner.min_epochs = 1 in the database and 2 in this definition"),
        ],
    )
    def test_each_other_key_is_named_with_both_values(self, other: str, difference: str) -> None:
        assert difference in differences(parse(_text()), parse(other))

    def test_true_is_not_one(self) -> None:
        head = HEAD.replace("convnet", "my.models:build")
        one, other = (parse(_text(head=head, fixed=f"switch = {value}")) for value in ("1", "true"))
        assert differences(one, other) == ["fixed.switch = 1 in the database and true in this definition"]


# --- what is written is read back -------------------------------------------------------------------------


def _there_and_back(definition: Definition) -> Definition:
    return from_json(json.loads(json.dumps(definition.to_json(), allow_nan=False)))


def _text_of(name: str) -> str:
    return (resources.files("studies") / "catalog" / f"{name}.toml").read_text(encoding="utf-8")


CATALOG = sorted(catalog())


@pytest.mark.parametrize("name", CATALOG)
def test_a_definition_of_the_catalog_comes_back_from_the_database(name: str) -> None:
    definition = load(name)
    back = _there_and_back(definition)
    assert back == definition
    assert back.to_json() == definition.to_json()
    assert back.queue() == definition.queue()


def test_a_stored_definition_that_this_version_cannot_read_is_named() -> None:
    raw = load("digits").to_json() | {"from_the_future": 1}
    with pytest.raises(DefinitionError, match=r"the stored definition of 'digits': unknown key 'from_the_future'"):
        from_json(raw)


_names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
_wholes = st.integers(-(2**53), 2**53)
_reals = st.floats(-1e100, 1e100)
_words = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
_scalars = st.one_of(st.booleans(), _wholes, _reals, _words)


@st.composite
def _parameters(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["float", "log", "step", "int", "intstep", "choices"]))
    if kind == "choices":
        values: list[Any] = []
        for value in draw(st.lists(_scalars, min_size=1, max_size=4)):
            if value not in values:
                values.append(value)
        return {"choices": values}
    if kind in ("int", "intstep"):
        low = draw(st.integers(-1000, 1000))
        step = draw(st.integers(1, 9)) if kind == "intstep" else 1
        return {"low": low, "high": low + step * draw(st.integers(1, 20))} | ({"step": step} if step != 1 else {})
    if kind == "step":
        digits, step, steps = draw(st.integers(-100, 100)), draw(st.integers(1, 9)), draw(st.integers(1, 20))
        return {
            name: float(f"{n}e-3") for name, n in (("low", digits), ("high", digits + step * steps), ("step", step))
        }
    low, high = sorted(draw(st.tuples(_reals, _reals).filter(lambda ends: ends[0] != ends[1])))
    if kind == "log":
        low, high = sorted((abs(low) + 1e-9, abs(high) + 2e-9))
        return (
            {"low": low, "high": high, "log": True} if low < high <= 1e100 else {"low": 1e-5, "high": 1.0, "log": True}
        )
    return {"low": low, "high": high}


@st.composite
def _definitions(draw: st.DrawFn) -> dict[str, Any]:
    """A valid definition, as TOML or JSON would hold it, for a model of one's own."""
    space: dict[str, Any] = {}
    names = _names.filter(lambda name: name not in TRAINED_WITH)
    for name in draw(st.lists(names, min_size=1, max_size=4, unique=True)):
        space[name] = draw(_parameters())
        on = [other for other in space if other != name and "choices" in space[other]]
        if on and draw(st.booleans()):
            other = draw(st.sampled_from(on))
            space[name]["when"] = {other: [draw(st.sampled_from(space[other]["choices"]))]}
    raw: dict[str, Any] = {
        "name": draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)),
        "description": draw(_words),
        "dataset": draw(st.sampled_from(["mnist", "digits", "some/where.npz", "my.data:load"])),
        "model": "my.models:build",
        "budget": {"trials": draw(st.integers(1, 1_000_000)), "epochs": draw(st.integers(1, 100_000))},
        "space": space,
        "fixed": draw(st.dictionaries(names.filter(lambda name: name not in space), _scalars, max_size=3)),
        "sampler": {"kind": draw(st.sampled_from(["tpe", "random", "qmc"])), "seed": draw(st.integers(0, 2**32 - 1))},
        "data": draw(st.sampled_from([{}, {"validation": 0.25}, {"validation": "test", "limit": 10}])),
    }
    return raw


TRAINED_WITH = {"batch_size", "optimizer", "learning_rate", "momentum", "weight_decay", "label_smoothing"}


@given(_definitions())
@settings(max_examples=150, deadline=None)
def test_a_definition_comes_back_from_toml_and_from_the_database(raw: dict[str, Any]) -> None:
    definition = parse(_toml(raw))
    assert definition == from_json(raw)
    back = _there_and_back(definition)
    assert back == definition
    assert json.dumps(back.to_json()) == json.dumps(definition.to_json())  # true is not 1, nor 1 is 1.0
    assert differences(definition, back) == []


# --- nothing else ever comes out --------------------------------------------------------------------------


def _toml(table: dict[str, Any]) -> str:
    """`table` as TOML: every value inline, which TOML allows."""
    return "".join(f"{_quoted(key)} = {_inline(value)}\n" for key, value in table.items())


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quoted(key)} = {_inline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return "nan" if math.isnan(value) else repr(value)
    return str(value)


def _quoted(text: str) -> str:
    return '"' + "".join(c if c.isalnum() and c.isascii() else f"\\U{ord(c):08x}" for c in text) + '"'


def _read(text: str) -> None:
    """A Definition, or a DefinitionError of one line: pytest sees any other exception."""
    try:
        definition = parse(text)
    except DefinitionError as error:
        _one_line(error)
    else:
        assert _there_and_back(definition) == definition


_any_text = st.text(st.characters(exclude_categories=("Cs",)))
_any_value = st.recursive(
    st.one_of(
        st.booleans(),
        st.integers(),
        st.integers(-(10**400), 10**400),
        st.floats(),
        _any_text,
        st.sampled_from(["test", "tpe", "grid", "points", "3", "", "\0", "..", 3, 5, 7, 0, -1, 1.0, 0.5, 1e308, 2**63]),
        st.dates(),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(
                _any_text,
                st.sampled_from(["low", "high", "step", "log", "when", "type", "choices", "depth", "dropout", "kind"]),
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=8,
)


def test_the_small_dumper_writes_what_tomllib_reads() -> None:
    table = {"a b": [1, -2.5, True, "x\n\"'\\ü\0", {"": []}], "c": {"d": {"e": 1e-300}}, "f": float("inf")}
    assert tomllib.loads(_toml(table)) == table
    for name in CATALOG:
        raw = tomllib.loads(_text_of(name))
        assert parse(_toml(raw)) == load(name)


@given(_any_text | st.text("[]{}=.,\"'#\n\\ \tabn0123456789_-+:eTxuU"))
@settings(max_examples=150, deadline=None)
def test_any_text_is_a_definition_or_a_sentence(text: str) -> None:
    _read(text)


@given(st.binary())
@settings(max_examples=150, deadline=None)
def test_any_file_is_a_definition_or_a_sentence(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(content)
    with pytest.raises(DefinitionError) as caught:  # no definition is so short
        load(str(path))
    _one_line(caught.value)


def _places(table: Any) -> list[tuple[Any, ...]]:
    """The way to every value in `table`."""
    items = table.items() if isinstance(table, dict) else enumerate(table) if isinstance(table, list) else ()
    return [(key, *rest) for key, value in items for rest in [(), *_places(value)]]


def _changed(table: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    copy = dict(table) if isinstance(table, dict) else list(table)
    copy[place[0]] = _changed(copy[place[0]], place[1:], value) if place[1:] else value
    return copy


RAW = [tomllib.loads(_text_of(name)) for name in CATALOG]


@st.composite
def _spoilt(draw: st.DrawFn) -> dict[str, Any]:
    """A definition of the catalog with any value at one or two of its keys, or at a new one."""
    raw = draw(st.sampled_from(RAW))
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.sampled_from(_places(raw)))
        if isinstance(place[-1], str) and draw(st.booleans()):
            known = ["when", "type", "step", "log", "low", "high", "seed", "limit", "points", "momentum", "width"]
            place = (*place[:-1], draw(st.sampled_from(known) | _any_text))
        raw = _changed(raw, place, draw(_any_value))
    return dict(raw)


@given(_spoilt())
@settings(max_examples=150, deadline=None)
def test_any_value_anywhere_is_a_definition_or_a_sentence(raw: dict[str, Any]) -> None:
    _read(_toml(raw))


@st.composite
def _mutated(draw: st.DrawFn) -> str:
    """A text of the catalog with a few characters or lines deleted, doubled, swapped or replaced."""
    text = _text_of(draw(st.sampled_from(CATALOG)))
    for _ in range(draw(st.integers(1, 4))):
        by_line = draw(st.booleans())
        parts = text.splitlines(keepends=True) if by_line else list(text)
        if not parts:
            break
        at = draw(st.integers(0, len(parts) - 1))
        until = min(len(parts), at + draw(st.integers(1, 3)))
        other = draw(st.integers(0, len(parts) - 1))
        new = {
            "delete": [],
            "double": parts[at:until] * 2,
            "replace": [
                draw(st.sampled_from(["9", "-", ".", '"', "true", "nan", "[", "}", "\n", "\x00", "ü", "e400"]))
            ],
            "copy": [parts[other]],
        }
        text = "".join([*parts[:at], *new[draw(st.sampled_from(sorted(new)))], *parts[until:]])
    return text


@given(_mutated())
@settings(max_examples=150, deadline=None)
def test_a_typing_error_is_a_definition_or_a_sentence(text: str) -> None:
    _read(text)


def test_a_missing_line_is_a_definition_or_a_sentence() -> None:
    for name, count in itertools.product(CATALOG, (1, 2)):
        lines = _text_of(name).splitlines(keepends=True)
        for at in range(len(lines)):
            _read("".join(lines[:at] + lines[at + count :]))


def test_the_parameters_of_the_catalog_have_the_intended_kinds() -> None:
    space = load("dropout-depth").space
    assert space["depth"] == Choice(choices=(3, 5, 7))
    assert space["learning_rate"] == Float(low=1e-4, high=1e-2, log=True)
    assert parse(_text(space="depth = { low = 3, high = 7, step = 2 }")).space["depth"] == Int(low=3, high=7, step=2)
