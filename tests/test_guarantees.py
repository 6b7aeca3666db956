"""Promises are kept over a thousand draws, and known ways to break them are detected.

Certification samples are drawn from a finite population, with replacement, so that the true risk
and cost of every candidate are means over it.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
from scipy import stats

from eejax import trace as eejax_trace
from eejax.evaluation.routing import Scored, first_exit
from eejax.selection.guarantees import (
    Candidates,
    certified,
    certify,
    control_risk,
    disagreement,
    errors,
    per_exit_path,
    shared_path,
)
from eejax.trace import Trace

COST = np.array([0.2, 0.45, 0.7, 1.0])
PEOPLE = 20_000
DRAWS = 1000
DELTA = 0.1


@functools.cache
def population(seed: int, count: int) -> tuple[Scored, Trace]:
    """Three classes, four exits; some samples are easy, and some the later exits get wrong."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count)
    logits = random.normal(size=(count, 4, 3))
    ease = 0.5 + random.gamma(2.0, 1.0, (count, 1)) * np.array([1.0, 1.6, 2.2, 2.8])
    logits[np.arange(count), :, labels] += ease
    trace = eejax_trace.recorded(logits, labels)
    ordered = np.sort(trace.logits, axis=-1)
    return Scored(trace.logits, ordered[..., -1] - ordered[..., -2]), trace


@functools.cache
def path(name: str) -> Candidates:
    scored, trace = population(1, 250)
    if name == "shared":
        return shared_path(scored, trace, steps=15)
    if name == "per exit, agreeing":
        trace = trace._replace(labels=scored.predictions[:, -1])
    return per_exit_path(scored, trace, COST, steps=12)


CASES = [
    *(("shared", kind) for kind in ("errors", "disagreement", "both")),
    *(("per exit", kind) for kind in ("errors", "both")),
    ("per exit, agreeing", "disagreement"),
]


def losses_of(name: str, scored: Scored, trace: Trace) -> np.ndarray:
    wrong, other = errors(scored, trace.labels), disagreement(scored)
    return {"errors": wrong, "disagreement": other, "both": 0.3 * wrong + 0.7 * other}[name]


def leaving(candidates: Candidates, scored: Scored, values: np.ndarray) -> np.ndarray:
    """`[K, N]`: each sample's value where it leaves."""
    values = np.broadcast_to(values, scored.scores.shape)
    exits = np.stack([first_exit(scored.scores, t) for t in candidates.thresholds])
    return np.take_along_axis(values.T, exits, axis=0)


def drawn(values: np.ndarray, n: int, seed: int = 0, draws: int = DRAWS) -> np.ndarray:
    """`[draws, K, n]` from `[K, people]`."""
    who = np.random.default_rng(seed).integers(0, values.shape[1], (draws, n))
    return values[:, who].swapaxes(0, 1)


def true_risk(counts: np.ndarray, risks: np.ndarray) -> np.ndarray:
    """The true risk of what was certified in each draw; nothing certified costs nothing."""
    return np.where(counts > 0, risks[np.maximum(counts - 1, 0)], 0.0)


def assert_rarely(broken: np.ndarray, delta: float) -> None:
    """Broken promises stay within delta and what chance adds to it, but for 1 time in 1000."""
    assert broken.mean() <= stats.binom.ppf(0.999, len(broken), delta) / len(broken)


@pytest.mark.parametrize("method", ["auto", "betting", "hoeffding_bentkus"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_risk_is_kept_with_its_probability(name, kind, method):
    scored, trace = population(0, PEOPLE)
    losses = leaving(path(name), scored, losses_of(kind, scored, trace))
    risks = losses.mean(1)
    # Just below the risk of one of the bolder candidates, which is what tempts a test to be wrong.
    risk = 0.999 * risks[risks > 0.09].min()
    counts = certified(drawn(losses, 300), risk, DELTA, method)
    assert_rarely(true_risk(counts, risks) > risk, DELTA)
    assert (counts > 1).mean() > 0.8, "more than the safest candidate is certified"
    first_not_rejected = true_risk(np.minimum(counts + 1, len(risks)), risks)
    with pytest.raises(AssertionError):
        assert_rarely(first_not_rejected > risk, DELTA)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_conformal_risk_is_kept_on_average(name, kind):
    scored, trace = population(0, PEOPLE)
    losses = leaving(path(name), scored, losses_of(kind, scored, trace))
    risks = losses.mean(1)
    risk = 0.999 * risks[risks > 0.09].min()
    counts = certified(drawn(losses, 200), risk, DELTA, "crc")
    kept = true_risk(counts, risks)
    assert kept.mean() <= risk + 3.1 * kept.std() / np.sqrt(DRAWS)
    assert (counts > 1).mean() > 0.7
    assert (kept > risk).any(), "and that is not a promise for every draw"


@pytest.mark.parametrize("method", ["betting", "hoeffding_bentkus"])
def test_certifying_on_the_samples_that_chose_the_candidates_breaks_the_promise(method):
    """Of many candidates in each of ten bands of risk the best, certified on old and new data."""
    random = np.random.default_rng(9)
    risks, draws, many, n = np.linspace(0.02, 0.3, 10), 300, 20, 80
    chosen_on = random.random((draws, 10, many, n)) < risks[:, None, None]
    best = chosen_on.sum(-1).argmin(-1)[..., None, None]
    seen = np.take_along_axis(chosen_on, best, axis=2)[:, :, 0]
    held_out = random.random((draws, 10, n)) < risks[:, None]
    risk = 0.999 * risks[5]
    dishonest, honest = (
        true_risk(certified(x.astype(float), risk, DELTA, method), risks) > risk
        for x in (seen, held_out)
    )
    assert_rarely(honest, DELTA)
    with pytest.raises(AssertionError):
        assert_rarely(dishonest, DELTA)


def some(seed: int, n: int) -> tuple[Scored, Trace]:
    """n people drawn from the population, as a split."""
    scored, trace = population(0, PEOPLE)
    who = np.random.default_rng(seed).integers(0, PEOPLE, n)
    return Scored(*(a[who] for a in scored)), Trace(*(a[who] for a in trace))


def certificates(candidates, risk, budget, n, draws=DRAWS):
    """The position of what `certify` certifies in each draw, -1 where nothing."""
    positions = []
    for seed in range(draws):
        scored, trace = some(seed, n)
        losses = errors(scored, trace.labels)
        try:
            arguments = (candidates, scored, losses, trace, COST, risk, budget)
            certificate = certify(*arguments, used={}, delta_risk=0.1, delta_cost=0.05)
            positions.append(certificate.position)
        except ValueError as refusal:
            if "certif" not in str(refusal):
                raise
            positions.append(-1)
    return np.array(positions)


@pytest.fixture(scope="module")
def bold():
    """A shorter path, and its true risks and costs; the risk rises from candidate to candidate."""
    scored, trace = population(0, PEOPLE)
    candidates = Candidates(path("shared").thresholds[[0, 10, 11, 12, 13, 14]], path("shared").ids)
    risks = leaving(candidates, scored, errors(scored, trace.labels)).mean(1)
    costs = leaving(candidates, scored, COST).mean(1)
    assert (np.diff(risks[1:]) > 0).all()
    assert (np.diff(costs) < 0).all()
    return candidates, risks, costs


def test_the_cost_is_kept_with_its_probability(bold):
    """Candidate 2 is just above the budget and 3 is the safest within it."""
    candidates, risks, costs = bold
    risk, budget = 0.999 * risks[5], 0.999 * costs[2]
    at = certificates(candidates, risk, budget, 500)
    issued = at >= 0
    assert_rarely(issued & (costs[at] > budget), 0.05)
    assert_rarely(issued & (risks[at] > risk), 0.1)
    assert (at == 3).mean() > 0.7
    with pytest.raises(AssertionError):  # one candidate before the first that was certified
        assert_rarely(issued & (costs[at - 1] > budget), 0.05)


def test_the_risk_is_kept_where_only_too_bold_candidates_are_within_the_budget(bold):
    candidates, risks, costs = bold
    risk, budget = 0.999 * risks[4], (costs[3] + costs[4]) / 2
    at = certificates(candidates, risk, budget, 300, draws=500)
    assert_rarely((at >= 0) & (risks[at] > risk), 0.1)
    assert_rarely((at >= 0) & (costs[at] > budget), 0.05)
    assert (at >= 0).any()


@pytest.mark.parametrize("method", ["crc", "betting", "hoeffding_bentkus"])
def test_a_certificate_says_what_was_certified(method):
    scored, trace = some(3, 600)
    losses, candidates = errors(scored, trace.labels), path("per exit")
    along = leaving(candidates, scored, losses)
    arguments = (candidates, scored, losses, trace, COST, 0.08)
    certificate = control_risk(
        *arguments, used={"training": np.arange(9)}, method=method, delta=0.05
    )
    if method != "betting":  # which alone depends on the order of the samples
        assert certificate.position == certified(along, 0.08, 0.05, method) - 1
    k = certificate.position
    assert 0 < k < len(candidates.thresholds) - 1
    np.testing.assert_array_equal(certificate.thresholds, candidates.thresholds[k])
    assert certificate.empirical_risk == pytest.approx(along[k].mean())
    assert certificate.mean_cost == pytest.approx(leaving(candidates, scored, COST)[k].mean())
    assert (certificate.samples, certificate.risk, certificate.budget) == (600, 0.08, None)
    if method == "crc":
        assert certificate.delta is None
        assert "Averaged over the draw of the 600" in certificate.words
        assert "expected loss is at most 0.08" in certificate.words
        assert "exchangeable" in certificate.words
    else:
        assert certificate.delta == 0.05
        assert "a mean loss above 0.08 on new samples is at most 5 %" in certificate.words


@pytest.mark.parametrize(("kind", "method"), [("errors", "binomial"), ("both", "betting")])
def test_auto_is_the_exact_test_for_outcomes_and_betting_for_other_losses(kind, method):
    scored, trace = some(3, 600)
    losses = losses_of(kind, scored, trace)
    arguments = (path("shared"), scored, losses, trace, COST, 0.1)
    for test, more in ((control_risk, ()), (certify, (0.6,))):
        default = test(*arguments, *more, used={})
        assert default.method == method
        for name in ("auto", method):
            again = test(*arguments, *more, used={}, method=name)
            assert (again.method, again.words) == (default.method, default.words)
            np.testing.assert_array_equal(again.thresholds, default.thresholds)


@pytest.mark.parametrize("deltas", [(0.3, 0.001), (0.001, 0.3)])
def test_a_joint_certificate_is_the_safest_within_both(deltas):
    """By a test that does not depend on the order, each side at its own delta."""
    rules = {"used": {}, "delta_risk": deltas[0], "delta_cost": deltas[1]}
    candidates, method, windows = path("shared"), "hoeffding_bentkus", []
    for seed in range(12):
        scored, trace = some(seed, 700)
        losses = errors(scored, trace.labels)
        along, spent = leaving(candidates, scored, losses), leaving(candidates, scored, COST)
        safe = int(certified(along, 0.08, deltas[0], method))
        cheap = int(certified((spent[::-1] - 0.2) / 0.8, 0.2 / 0.8, deltas[1], method))
        both = np.arange(len(spent) - cheap, safe)
        windows.append(len(both))
        for unit in (1, 1000):
            arguments = (candidates, scored, losses, trace, unit * COST, 0.08, unit * 0.4)
            if len(both):
                certificate = certify(*arguments, **rules, method=method)
                assert certificate.position == both[along[both].mean(1).argmin()]
                assert certificate.mean_cost <= unit * 0.4
            else:
                with pytest.raises(ValueError, match="certif"):
                    certify(*arguments, **rules, method=method)
    assert max(windows) > 0


def test_a_joint_certificate_says_both():
    scored, trace = some(4, 1000)
    arguments = (path("shared"), scored, errors(scored, trace.labels), trace, COST, 0.08)
    certificate = certify(*arguments, 0.5, used={}, delta_risk=0.1, delta_cost=0.05)
    assert (certificate.budget, certificate.delta, certificate.delta_cost) == (0.5, 0.1, 0.05)
    assert "a mean loss above 0.08 on new samples is at most 10 %" in certificate.words
    assert "a mean cost above 0.5 at most 5 %, and of either at most 15 %" in certificate.words
    # A budget of the whole network asks nothing.
    assert certify(*arguments, 1.0, used={}).empirical_risk <= certificate.empirical_risk


def test_samples_sorted_by_their_losses_do_not_fool_betting():
    scored, trace = some(5, 1000)
    losses = errors(scored, trace.labels)
    order = np.argsort(losses.max(1), kind="stable")
    scored, trace = Scored(*(a[order] for a in scored)), Trace(*(a[order] for a in trace))
    losses = losses[order]
    first = Candidates(np.full((1, 3), -np.inf, np.float32), trace.ids[:0])
    assert certified(losses[None, :, 0], 0.1, DELTA, "betting") == 1, "0.15 of them are wrong"
    with pytest.raises(ValueError, match=r"does not certify a risk of 0\.1 at delta 0\.1; give"):
        control_risk(first, scored, losses, trace, COST, 0.1, used={})


def test_shared_paths_go_from_nothing_to_everything():
    scored, trace = population(1, 250)
    candidates = shared_path(scored, trace, steps=15)
    t = candidates.thresholds
    assert (t.dtype, t.shape) == (np.float32, (16, 3))
    assert (t[0, 0], t[-1, 0]) == (np.inf, -np.inf)
    assert (t == t[:, :1]).all()
    assert (np.diff(t[:, 0]) < 0).all()
    assert not np.isin(t, scored.scores).any()
    shares = (scored.scores[:, :-1] >= t[:, None, :1]).mean((1, 2))
    np.testing.assert_allclose(np.diff(shares[1:]), 1 / 14, atol=0.003)
    np.testing.assert_array_equal(candidates.ids, trace.ids)
    # Four values of a score, four candidates after the first.
    rounded = Scored(scored.logits, np.clip(np.round(scored.scores), 0, 3))
    np.testing.assert_array_equal(
        shared_path(rounded, trace).thresholds[:, 0], [np.inf, 2.5, 1.5, 0.5, -np.inf]
    )


def test_per_exit_paths_have_the_accuracy_that_each_budget_buys():
    scored, trace = population(1, 250)
    candidates = path("per exit")
    t = candidates.thresholds
    assert (t[0] == np.inf).all()
    assert len(np.unique(t, axis=0)) == len(t) >= 5
    spent = leaving(candidates, scored, COST).mean(1)
    assert spent[-1] == pytest.approx(COST[0])
    assert (np.diff(spent) <= 1e-9).all()
    np.testing.assert_array_equal(candidates.ids, trace.ids)
    # At each one's cost no shared threshold makes fewer errors.
    wrong = errors(scored, trace.labels)
    per_exit = leaving(candidates, scored, wrong).mean(1)
    shared = leaving(path("shared"), scored, wrong).mean(1)
    shared_spent = leaving(path("shared"), scored, COST).mean(1)
    for budget in np.linspace(1.0, 0.2, 12):
        assert per_exit[spent <= budget + 1e-9].min() <= shared[shared_spent <= budget + 1e-9].min()


def test_losses_are_of_each_exit():
    logits = np.array([[[2, 1], [1, 2], [1, 2]], [[2, 1], [2, 1], [1, 2]]], np.float32)
    scored = Scored(logits, np.zeros((2, 3), np.float32))
    np.testing.assert_array_equal(errors(scored, np.array([1, 0])), [[1, 0, 0], [0, 0, 1]])
    np.testing.assert_array_equal(disagreement(scored), [[1, 0, 0], [1, 1, 0]])


def ask(joint=False, **changed):
    """`control_risk`, or `certify`, of 200 samples with some of the arguments changed."""
    scored, trace = some(6, 200)
    arguments = {
        **{"candidates": path("shared"), "scored": scored, "trace": trace, "cost": COST},
        **{"losses": errors(scored, trace.labels), "risk": 0.1, "used": {}},
        **({"budget": 0.6} if joint else {}),
    }
    return (certify if joint else control_risk)(**(arguments | changed))


def test_samples_that_something_was_fitted_on_are_refused():
    ids = some(6, 200)[1].ids
    reason = "a bound holds only for samples that nothing was fitted on: hold out a split"
    for joint in (False, True):
        with pytest.raises(ValueError, match=f"^200 of the 200 .* used for training; {reason}"):
            ask(joint=joint, used={"calibrating": [], "training": ids})
    overlapping = Candidates(path("shared").thresholds, ids[:3])
    with pytest.raises(ValueError, match=r"^3 of the 200 .* for choosing the candidates; "):
        ask(candidates=overlapping, used={"choosing the candidates": []})


def test_samples_that_nothing_was_fitted_on_pass():
    ids = some(6, 200)[1].ids
    assert ask(used={"training": population(2, 50)[1].ids}).samples == 200
    assert ask(used={"training": ids[:1]}).samples == 200, "a duplicate in a hundred is no reuse"
    # These would be equal to some of the ids if they were compared as float64.
    beside = np.array(ids, copy=True) ^ np.uint64(1)
    assert ask(used={"training": beside.view(np.int64)}).samples == 200
    with pytest.raises(ValueError, match="200 of the 200"):
        ask(used={"training": ids.view(np.int64)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"risk": 0.02},
            r"^the safest candidate's empirical risk of 0\.\d+ on 200 samples does not certify a "
            r"risk of 0.02 at delta 0.1; give a larger risk, more samples or a larger delta\.$",
        ),
        (
            {"risk": 0.004, "method": "crc"},
            r"risk of 0.004 \(200 samples are too few even without any loss\); give a larger risk,",
        ),
        ({"joint": True, "risk": 0.01}, "does not certify a risk of 0.01 at delta 0.05"),
        (
            {"joint": True, "budget": 0.2001},
            "^the boldest candidate's mean cost of 0.2 on 200 samples does not certify a budget of "
            "0.2001 at delta_cost 0.05; give a larger budget",
        ),
        (
            {"joint": True, "budget": 0.22},
            r"^no candidate has both: the risk of 0.1 is certified down to a mean cost of 0\.\d+, "
            r"and the budget of 0.22 only from an empirical risk of 0\.\d+ on; give a larger risk",
        ),
        ({"joint": True, "budget": 0.2}, "^a budget of 0.2; leaving at the first exit costs 0.2"),
        ({"joint": True, "method": "crc"}, "^method 'crc'; give one of .*'binomial', 'betting'"),
        ({"method": "magic"}, "^method 'magic'; give"),
        ({"risk": 1.5}, "^a risk of 1.5; give"),
        ({"delta": 10}, "^a delta of 10; give"),
        ({"losses": np.full((200, 4), 2.0)}, "^losses from 2 to 2; give"),
        ({"losses": np.zeros((200, 3))}, r"^losses \(200, 3\), cost \(4,\) and 200 ids for"),
        ({"cost": COST[::-1]}, "cumulative costs, positive and increasing"),
        ({"candidates": Candidates(np.zeros((2, 4)), np.zeros(0, int))}, "^4 thresholds for 4 ex"),
        ({"candidates": Candidates(np.zeros((0, 3)), np.zeros(0, int))}, "^no candidates; give"),
        ({"used": {"training": np.zeros((3, 2))}}, r"^ids of training of shape \(3, 2\) and type"),
        ({"used": {"training": [0.5]}}, r"^ids of training of shape \(1,\) and type float64; give"),
    ],
)
def test_what_cannot_be_certified_is_refused_with_the_reason(arguments, message):
    with pytest.raises(ValueError, match=message):
        ask(**arguments)


def test_paths_from_what_has_none_are_refused():
    scored, trace = population(1, 250)
    with pytest.raises(ValueError, match=r"scores \(250, 1\) and 250 ids; give .* two exits"):
        shared_path(Scored(scored.logits[:, :1], scored.scores[:, :1]), trace)
    with pytest.raises(ValueError, match="0 steps; give at least one"):
        per_exit_path(scored, trace, COST, steps=0)
    with pytest.raises(ValueError, match="scores hold NaN or infinity"):
        shared_path(Scored(scored.logits, np.full_like(scored.scores, np.nan)), trace)
