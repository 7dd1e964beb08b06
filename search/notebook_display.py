"""A live display in the output of a Jupyter cell.

Not rich's own: it needs ipywidgets, and with ipykernel 7 its drawings from a thread are lost.
"""

import threading
from collections.abc import Callable

from rich.console import RenderableType
from rich.jupyter import JupyterMixin

SECONDS = 1.0  # between two drawings


class NotebookLive:
    """Draws what `get_renderable` gives over itself, each second, from `start` to `stop`."""

    def __init__(self, get_renderable: Callable[[], RenderableType]) -> None:
        self._get_renderable = get_renderable
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="notebook display", daemon=True)

    def start(self) -> None:
        """Draws for the first time, in the cell that runs."""
        from IPython.display import display

        self._handle = display(_Picture(self._get_renderable()), display_id=True)  # type: ignore[no-untyped-call]
        self._thread.start()

    def stop(self) -> None:
        """Draws for the last time."""
        self._done.set()
        self._thread.join()
        self._draw()

    def _run(self) -> None:
        while not self._done.wait(SECONDS):
            self._draw()

    def _draw(self) -> None:
        self._handle.update(_Picture(self._get_renderable()))


class _Picture(JupyterMixin):
    def __init__(self, content: RenderableType) -> None:
        self._content = content

    def __rich__(self) -> RenderableType:
        return self._content
