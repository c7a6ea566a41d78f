"""Figure 6 of the paper: (a) a ReLU6 after the projection of each block, (b) shortcuts elsewhere, or none.

The shortcut between expansions connects the two wide layers before and after the depthwise convolution. All networks
have the same parameters and, but for additions and activations, the same cost.
"""

import matplotlib.figure

from ..benchmark.charts import save
from .options import Ablation
from .results import Results, picture
from .variants import Variant, compare, draw_curves, overview

PAPER = Variant("linear, between bottlenecks")
RELU = Variant("ReLU6 in the bottleneck", linear_bottleneck=False)
EXPANSIONS = Variant("shortcut between expansions", shortcut="expansion")
NONE = Variant("no shortcut", shortcut=None)
VARIANTS = (PAPER, RELU, EXPANSIONS, NONE)


def run(options: Ablation) -> None:
    """Trains the networks, prints the table and draws the picture."""
    results = Results("ablation", options)
    found = compare(results, VARIANTS, options)
    results.write_tables(overview(found, PAPER.name))
    figure = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    draw_curves(left, {one.name: found[one.name] for one in (PAPER, RELU)}, "(a) Non-linearity in the bottleneck")
    others = (PAPER, EXPANSIONS, NONE)
    draw_curves(right, {one.name: found[one.name] for one in others}, "(b) Shortcuts")
    save(figure, picture(options.out, "ablation"))
