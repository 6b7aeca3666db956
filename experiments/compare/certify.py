"""Thresholds with a guarantee: risks certified on the split `certify`, or risks and mean costs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from eejax.selection import guarantees
from eejax.selection.guarantees import Certificate, Test
from experiments.compare.config import GuaranteeConfig, Loss
from experiments.evaluate.decide import Decision, Traces, View

# A mean cost can only be bounded by betting or by Hoeffding and Bentkus; betting is tighter.
JOINT: Test = "betting"


def certified(
    view: View, traces: Traces, config: GuaranteeConfig, training_ids: np.ndarray
) -> Iterator[Decision]:
    """A decision for each loss, path, risk and method, and for each certified mean cost.

    Args:
      view: of a network with early exits.
      traces: of the same network.
      config: what to certify.
      training_ids: fingerprints of the images that the network was trained on, so that no image
        serves twice.
    """
    used = {"training": training_ids, "calibrating temperatures": traces.calibrate.ids}
    for loss in config.losses:
        yield from _for_loss(view, loss, traces, config, used)


def _for_loss(
    view: View, loss: Loss, traces: Traces, config: GuaranteeConfig, used: dict[str, np.ndarray]
) -> Iterator[Decision]:
    assert view.certify is not None
    assert traces.certify is not None
    judged, losses = traces.choose, guarantees.errors(view.certify, traces.certify.labels)
    if loss == "disagreement":
        # The last exit's prediction then counts as the label.
        judged = judged._replace(labels=view.choose.predictions[:, -1])
        losses = guarantees.disagreement(view.certify)
    half = config.delta / 2
    for path in config.paths:
        if path == "shared":
            candidates = guarantees.shared_path(view.choose, traces.choose)
        else:
            candidates = guarantees.per_exit_path(view.choose, judged, view.cost)
        data = (candidates, view.certify, losses, traces.certify, view.cost)
        common = {"loss": loss, "delta": config.delta, "path": path}
        for risk in config.risks:
            for method in config.methods:
                control = functools.partial(
                    guarantees.control_risk, used=used, delta=config.delta, method=method
                )
                target = {"kind": "risk", "value": risk, "method": method, **common}
                yield _decision(target, view, control, *data, risk)
            for budget in config.budgets:
                certify = functools.partial(
                    guarantees.certify,
                    used=used,
                    delta_risk=half,
                    delta_cost=half,
                    method=JOINT,
                )
                target = {"kind": "certificate", "value": risk, "method": JOINT, **common}
                target["budget"] = budget
                yield _decision(target, view, certify, *data, risk, budget)


def _decision(
    target: dict[str, Any], view: View, certify: Callable[..., Certificate], *data: Any
) -> Decision:
    try:
        certificate = certify(*data)
    except ValueError as error:
        return Decision(target, "path", view, None, words=str(error))
    return Decision(target, "path", view, certificate.thresholds, words=certificate.words)
