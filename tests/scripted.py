"""A trainer without a process, which says what a test gives it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from search.devices import Slot, cpu
from search.messages import Epoch, Failed, Repeated, Resumed, Trained
from search.trainer import Trainer, TrainerDied

Message = Epoch | Repeated | Resumed | Trained | Failed | TrainerDied


class Scripted(Trainer):
    """A trainer without a process: it says what it is given, and remembers what it was asked to do."""

    def __init__(
        self,
        folder: Path,
        messages: list[Message | Callable[[], Message]],
        *,
        used: bool = False,
        slot: Slot | None = None,
    ) -> None:
        super().__init__(slot or Slot(device=cpu()), folder / "log")
        self.messages, self.requests = messages, list[str]()
        self._used = used

    @property
    def is_used(self) -> bool:
        """Whether it is said to have run a job before."""
        return self._used

    def kill(self) -> None:
        """Remembers it. What follows is a new process."""
        self.requests.append("kill")
        self._used = False

    def submit(self, job: Any) -> None:
        """Nothing is trained."""

    def stop(self, how: Any) -> None:
        """Remembers it."""
        self.requests.append(how)

    def receive(self, seconds: float) -> Any:
        """The next message; one that is an error is raised."""
        message = self.messages.pop(0)
        message = message if not callable(message) else message()
        if isinstance(message, TrainerDied):
            raise message
        return message


def epoch(number: int, accuracy: float) -> Epoch:
    """The message of one epoch."""
    return Epoch(
        epoch=number,
        loss=1.0,
        accuracy=accuracy,
        val_loss=1.0,
        val_accuracy=accuracy,
        seconds=1.0,
        images_per_second=1.0,
    )


def trained(*, stopped: bool) -> Trained:
    """The message of a training's end, or of one that was `stopped`."""
    return Trained(
        value=0.9,
        repeats=(0.9,),
        best_epoch=3,
        val_loss=0.2,
        train_accuracy=0.95,
        epochs=3,
        stopped=stopped,
        parameters=1,
        seconds=3.0,
        images_per_second=1.0,
        precision="float32",
        precision_reason="a test",
        data_fingerprint="",
        versions={},
        hits=None,
    )
