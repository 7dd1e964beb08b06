"""What one trial trains: all that its numbers follow from, besides the software and the images."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from studies import sampling
from studies.definition import Data, Definition


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training."""

    hyperparameters: dict[str, Any]  # fixed and searched
    epochs: int
    schedule_epochs: int  # that the learning rate's schedule is for: a confirmation may train for fewer
    seed: int  # of the initial weights, the order of the images and the dropout
    data: Data  # how the images are limited and split
    more_seeds: tuple[int, ...] = ()  # of the repeats after the first
    confirms: bool = False  # whether the model of the last epoch is judged by the test images

    @property
    def repeats(self) -> int:
        """How often the model is trained, each time for `epochs`."""
        return 1 + len(self.more_seeds)


def of_trial(definition: Definition, number: int, point: Mapping[str, Any]) -> Recipe:
    """The recipe of trial `number`, which has the hyperparameters `point`."""
    if definition.confirm is None:
        first, *more = _seeds(definition, number)
        return Recipe(
            hyperparameters={**definition.fixed, **point},
            epochs=definition.budget.epochs,
            schedule_epochs=definition.budget.epochs,
            seed=first,
            more_seeds=tuple(more),
            data=definition.data,
        )
    # Trials with the same seed are pairs: every candidate has the same order of images and the same split.
    chosen = next(each for each in definition.confirm.candidates if each.trial == point["candidate"])
    return Recipe(
        hyperparameters={**definition.fixed, **chosen.hyperparameters},
        epochs=chosen.epochs,
        schedule_epochs=chosen.schedule_epochs or chosen.epochs,
        seed=sampling.seed_of(definition, int(point["seed"]), purpose=2),
        data=definition.data.model_copy(
            update={"seed": sampling.seed_of(definition, int(point["seed"]), purpose=3)},
        ),
        confirms=True,
    )


def _seeds(definition: Definition, number: int) -> list[int]:
    """One for each repeat of trial `number`."""
    repeats = definition.budget.repeats
    if repeats == 1:
        return [sampling.seed_of(definition, number, purpose=1)]
    # The same for all trials: repeat r of two configurations has the same order of images, so they can be compared.
    return [sampling.seed_of(definition, repeat, purpose=4) for repeat in range(1, repeats + 1)]
