"""Plans where to cut a network among device, edge and cloud, before it runs there.

    times = planning.measure(runtime)  # on each machine; `eejax times`
    plans = planning.search.search_plans(trace, [times, times], [link], [phone, cloud])
    planning.predict(plans.best.plan, trace, [times, times], [link], [phone, cloud])

Measuring and predicting need NumPy and ONNX Runtime alone; `eejax.planning.search` needs JAX. On
the command line `eejax times` and `eejax plan`; docs/planning.md is the guide.
"""

from eejax.planning.machines import Crossing, Device, Link, Times
from eejax.planning.measuring import load, measure, save
from eejax.planning.model import Forecast, Plan, predict
from eejax.planning.reading import Tiers, read

__all__ = [
    "Crossing",
    "Device",
    "Forecast",
    "Link",
    "Plan",
    "Tiers",
    "Times",
    "load",
    "measure",
    "predict",
    "read",
    "save",
]
