"""A row of numbers as a small picture of text."""

import math
from collections.abc import Sequence
from statistics import mean

BLOCKS = "▁▂▃▄▅▆▇█"
PLAIN = "_.:-=+*#"  # for a terminal that knows ASCII alone
COLUMNS = 60


def sparkline(values: Sequence[float], encoding: str = "utf-8") -> str:
    """One character a number, higher for a larger one; of more than COLUMNS numbers the means of neighbours.

    What is not a finite number is a blank.

    >>> sparkline([1, 2, 3, 8])
    '▁▂▃█'
    >>> sparkline([1, 2, 3, 8], "ascii")
    '_.:#'
    """
    levels = BLOCKS if encoding.lower().startswith("utf") else PLAIN
    count = min(len(values), COLUMNS)
    groups = [values[len(values) * at // count : len(values) * (at + 1) // count] for at in range(count)]
    heights = [mean(finite) if (finite := list(filter(math.isfinite, group))) else math.nan for group in groups]
    finite = [height for height in heights if math.isfinite(height)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    steps = (len(levels) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if math.isnan(height) else levels[round((height - low) * steps)] for height in heights)
