"""Section 4 of the paper: expansion factors 1, 3, 6 and 9, of the same bottlenecks on the same budget.

The first block has the factor 1 in each network, as in the paper. Larger factors cost more, which the table shows.
"""

import matplotlib.figure
import numpy as np

from ..benchmark.charts import save
from .options import Expansion
from .results import Results, picture
from .variants import Variant, compare, draw_curves, final, overview

VARIANTS = tuple(Variant(f"t = {factor}", expansion=factor) for factor in (1, 3, 6, 9))
PAPER = "t = 6"


def run(options: Expansion) -> None:
    """Trains the networks, prints the table and draws the picture."""
    results = Results("expansion", options)
    found = compare(results, VARIANTS, options)
    results.write_tables(overview(found, PAPER))
    figure = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_curves(left, found, "Expansion factors")
    for name, rows in found.items():
        values = 100 * np.array(final(rows))
        cost = rows[0]["multiply_adds"] / 1e6
        low, high = values.mean() - values.min(), values.max() - values.mean()
        right.errorbar(cost, values.mean(), [[low], [high]], marker="o", capsize=4, label=name)
    right.set(title="The same, by their cost", xlabel="million multiply-adds", ylabel="test accuracy, %")
    right.grid(alpha=0.3)
    right.legend()
    save(figure, picture(options.out, "expansion"))
