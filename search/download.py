"""Downloads a dataset through Keras: ``python -P -m search.download mnist FILE``.

It is a separate program, because importing Keras takes seconds and no command of ours does that.
"""

import sys
from pathlib import Path

import numpy as np

from storage.artifacts import written_atomically


def main(name: str, file: str) -> None:
    """Writes ``keras.datasets.<name>`` to `file` as x_train, y_train, x_test, y_test."""
    import keras

    (x_train, y_train), (x_test, y_test) = getattr(keras.datasets, name).load_data()
    with written_atomically(Path(file)) as path:
        np.savez_compressed(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
