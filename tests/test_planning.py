"""Plans: predictions equal a simulation, searches equal brute force, files are checked."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eejax import planning
from eejax.planning import Crossing, Device, Link, Plan, Times, predict
from eejax.planning.model import ANSWER_BYTES, REQUEST_BYTES
from eejax.planning.options import OBJECTIVES, Problem, options, value
from eejax.planning.search import search_plans
from eejax.runtime import HeldOut
from eejax.selection import bounds

CODECS = ("float32", "int8")
FAST = Link(1e9, 1e9, 0.0002, overhead_seconds=0.0001)
POOR = Link(1e5, 1e6, 0.2)


def some_trace(random, samples, exits):
    """Later exits are better, and scores tell which samples are hard."""
    ease = random.normal(size=(samples, 1)) + np.linspace(0, 1.5, exits)
    scores = (ease + 0.5 * random.normal(size=(samples, exits))).astype(np.float32)
    correct = random.random((samples, exits)) < 1 / (1 + np.exp(-3 * ease - 1))
    return HeldOut(scores, correct)


def some_times(random, exits, passes=3, changed=0.0, seconds=0.001):
    stages = seconds * random.uniform(0.5, 2, (passes, exits, exits))
    stages *= np.arange(exits) >= np.arange(exits)[:, None]
    crossings, sizes = {}, random.integers(100, 5000, exits)
    for cut, codec in [(0, "float32"), *itertools.product(range(1, exits), CODECS)]:
        size = sizes[cut] / (1 + 3 * (codec == "int8"))
        share = changed * (codec == "int8") * (np.arange(exits) >= cut)
        encode, decode = 1e-4 * random.uniform(0.5, 2, (2, 2))
        crossings[cut, codec] = Crossing(size, encode, decode, share)
    return Times("artifact", stages, crossings, {})


def some_link(random):
    up, down = 10 ** random.uniform(4.5, 9, 2)
    rest = random.uniform(0, [0.1, 0.002, 1, 1e-5]).tolist()
    return Link(float(up), float(down), rest[0], 0.0, *rest[1:])


def some_device(random):
    scale, numbers = float(random.choice([1, 10])), random.uniform(0, [5, 5, 0.01]).tolist()
    return Device(scale, *numbers)


def drawn(seed, tiers, exits, samples, **more) -> Any:
    random = np.random.default_rng(seed)
    one = some_times(random, exits, **more)
    # The same bytes on every machine, as for one artifact.
    times = [one._replace(stages=s * one.stages) for s in random.uniform(0.5, 2, tiers)]
    links = [some_link(random) for _ in range(tiers - 1)]
    return (
        *(random, some_trace(random, samples, exits), times, links),
        [some_device(random) for _ in range(tiers)],
    )


def every_plan(tiers, exits):
    """All cuts, with all codecs that agree around a tier without stages."""
    for cuts in itertools.product(range(exits + 1), repeat=tiers - 1):
        if list(cuts) == sorted(cuts):
            for codecs in itertools.product(CODECS, repeat=tiers - 1):
                if len(set(zip(cuts, codecs, strict=True))) == len(set(cuts)):
                    yield cuts, codecs


def simulated(plan, trace, times, links, devices):
    """The forecast, by following every sample from tier to tier."""
    exits, tiers = trace.scores.shape[1], len(devices)
    edges = [0, *plan.cuts, exits]
    totals = {"bytes": np.zeros(tiers - 1), "tiers": np.zeros(tiers)}
    joules = server = price = right = 0.0
    latencies, means = [], []
    for scores, correct in zip(*trace, strict=True):
        leaves = exits - 1
        for e in reversed(range(exits - 1)):
            if scores[e] >= plan.thresholds[e]:
                leaves = e
        fixed, passes, lost = 0.0, [], 0.0
        for k in range(tiers):
            own, device, first, end = times[k], devices[k], edges[k], edges[k + 1]
            codec_seconds = 0.0
            fixed += device.overhead_seconds * (first < end)
            if k and first < end:
                codec = plan.codecs[k - 1] if first else "float32"
                codec_seconds += own.crossings[first, codec].decode.mean()
            goes_on = leaves >= end
            if goes_on and (k == 0 or first < end):
                crossing = own.crossings[end, plan.codecs[k] if end else "float32"]
                codec_seconds += crossing.encode.mean()
                lost += crossing.changed[leaves]
            runs = [
                device.scale * (codec_seconds + sum(row[first][first : min(end, leaves + 1)]))
                for row in own.stages
            ]
            passes.append(runs)
            busy = sum(runs) / len(runs)
            price += 1e6 * busy * device.price_per_hour / 3600
            if k:
                server += busy
            else:
                joules += busy * device.watts
            if not goes_on:
                totals["tiers"][k] += 1
                break
            link = links[k]
            up = own.crossings[end, plan.codecs[k] if end else "float32"].size + REQUEST_BYTES
            fixed += link.overhead_seconds + link.round_trip_seconds
            fixed += 8 * up / link.up_bits_per_second + 8 * ANSWER_BYTES / link.down_bits_per_second
            totals["bytes"][k] += up + ANSWER_BYTES
            price += 1e6 * (up + ANSWER_BYTES) * link.price_per_gb / 1e9
            if k == 0:
                joules += up * link.joules_per_byte
        all_runs = [fixed + sum(runs) for runs in itertools.product(*passes)]
        # Each sample counts once, however many passes its tiers had.
        latencies += [(seconds, 1 / len(all_runs)) for seconds in all_runs]
        means.append(sum(all_runs) / len(all_runs))
        right += correct[leaves] - min(lost, 1)
    n = len(trace.scores)
    quantiles = []
    for q in (0.5, 0.99):
        total = 0.0
        for seconds, weight in sorted(latencies):
            total += weight
            if total >= q * n - 1e-9:
                quantiles.append(seconds)
                break
    return (
        *(sum(means) / n, *quantiles, totals["bytes"] / n, totals["tiers"] / n),
        *(joules / n, server / n, price / n, right / n),
    )


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 4), st.data())
def test_a_forecast_is_what_a_simulation_gives(seed, tiers, exits, data):
    random, trace, *rest = drawn(seed, tiers, exits, 12, changed=0.1)
    cuts, codecs = data.draw(st.sampled_from(list(every_plan(tiers, exits))))
    limits = np.quantile(trace.scores, random.uniform(0, 1, exits - 1)).astype(np.float32)
    plan = Plan(cuts, codecs, limits)
    forecast, expected = predict(plan, trace, *rest), simulated(plan, trace, *rest)
    for name, a, b in zip(forecast._fields, forecast, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-15, err_msg=name)


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.sampled_from(OBJECTIVES))
def test_no_other_cut_and_no_other_codec_is_better(seed, tiers, objective):
    """With the thresholds that were chosen, by brute force over everything else."""
    _, trace, *rest = drawn(seed, tiers, 3, 40)
    best = search_plans(trace, *rest, objective=objective, drop=0.05).best
    at = {"mean": 0, "p99": 2, "energy": 5, "price": 7}[objective]
    others = [
        simulated(Plan(cuts, codecs, best.plan.thresholds), trace, *rest)[at]
        for cuts, codecs in every_plan(tiers, 3)
    ]
    assert value(best.forecast, objective) == pytest.approx(min(others), rel=1e-9, abs=1e-15)


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), st.integers(2, 3), st.sampled_from(["mean", "energy", "price"]))
def test_with_two_exits_no_plan_is_better(seed, tiers, objective):
    """By brute force over all cuts, codecs and thresholds, where scores tell who is wrong."""
    random, _, *rest = drawn(seed, tiers, 2, 2)
    early = np.sort(random.permutation(1000)[:25]).astype(np.float32) / 100
    correct = np.stack([np.arange(25) >= random.integers(3, 20), np.ones(25, bool)], 1)
    trace = HeldOut(np.stack([early, early], 1), correct)
    best = search_plans(trace, *rest, objective=objective, accuracy=0.9).best
    at = {"mean": 0, "energy": 5, "price": 7}[objective]
    least = math.inf
    for limit in [-np.inf, *(early[1:] + early[:-1]) / 2, np.inf]:
        for cuts, codecs in every_plan(tiers, 2):
            plan = Plan(cuts, codecs, np.array([limit], np.float32))
            result = simulated(plan, trace, *rest)
            if result[-1] >= 0.9 - 1e-9:
                least = min(least, result[at])
    assert value(best.forecast, objective) == pytest.approx(least, rel=1e-9, abs=1e-15)


def two_tiers(link, device=20.0, **more) -> Any:
    random = np.random.default_rng(1)
    trace, times = some_trace(random, 200, 3), some_times(random, 3, **more)
    return trace, [times, times], [link], [Device(device, watts=2), Device(price_per_hour=1)]


def test_all_on_the_device_sends_nothing_and_all_in_the_cloud_sends_images():
    trace, times, *rest = two_tiers(FAST)
    plans = search_plans(trace, times, *rest)
    assert plans.device.plan.cuts == (3,)
    assert plans.device.forecast.link_bytes == (0,)
    assert plans.device.forecast.tier_shares == pytest.approx((1, 0))
    assert plans.device.forecast.price_per_million == 0
    assert plans.cloud.plan.cuts == (0,)
    assert plans.cloud.forecast.tier_shares == pytest.approx((0, 1))
    size = times[0].crossings[0, "float32"].size + REQUEST_BYTES + ANSWER_BYTES
    assert plans.cloud.forecast.link_bytes == pytest.approx((size,))


def test_a_fast_link_moves_the_cut_to_the_cloud_and_a_poor_one_to_the_device():
    fast, poor = (search_plans(*two_tiers(link)).best for link in (FAST, POOR))
    assert fast.plan.cuts == (0,)
    assert poor.plan.cuts == (3,)
    # A device as quick as the cloud has no reason to send.
    assert search_plans(*two_tiers(FAST, device=1.0)).best.plan.cuts == (3,)


def test_a_link_between_sends_the_hard_samples_only():
    _, *rest = two_tiers(Link(1e7, 1e7, 0.04))
    easy = np.arange(200)[:, None] < 140
    scores = easy + np.random.default_rng(0).random((200, 3)).astype(np.float32)
    plans = search_plans(HeldOut(scores, easy | (np.arange(3) == 2)), *rest)
    assert plans.best.plan.cuts == (1,)
    assert plans.best.forecast.tier_shares == pytest.approx((0.7, 0.3), abs=0.02)
    assert plans.best.forecast.mean_seconds < plans.device.forecast.mean_seconds
    assert plans.best.forecast.mean_seconds < plans.cloud.forecast.mean_seconds


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_constraints_are_kept_and_the_front_has_no_row_that_another_beats(objective):
    trace, *rest = two_tiers(Link(1e7, 1e7, 0.02))
    last = trace.correct[:, -1].mean()
    for asked, least in (
        ({"accuracy": last - 0.03}, last - 0.03),
        ({"drop": 0.02, "confidence": 0.5}, last - 0.02),
    ):
        plans = search_plans(trace, *rest, objective=objective, **asked)
        for row in (plans.best, plans.device, plans.cloud):
            assert row.forecast.accuracy >= least - 1e-9
            assert row.forecast == predict(row.plan, trace, *rest)
        least_value = value(plans.best.forecast, objective)
        assert least_value <= value(plans.device.forecast, objective)
        assert least_value <= value(plans.cloud.forecast, objective)
        points = [(value(r.forecast, objective), -r.forecast.accuracy) for r in plans.front]
        assert len(points) >= 1
        for a, b in itertools.permutations(points, 2):
            assert not (a[0] <= b[0] and a[1] <= b[1]), (a, b)


def test_a_certified_risk_is_kept_in_nine_of_ten_draws():
    _, times, links, devices = two_tiers(Link(1e7, 1e7, 0.02))
    new = some_trace(np.random.default_rng(7), 50_000, 3)
    failed = 0
    for seed in range(30):
        trace = some_trace(np.random.default_rng(1000 + seed), 400, 3)
        row = search_plans(trace, times, links, devices, risk=0.2, codecs=["float32"]).best
        failed += predict(row.plan, new, times, links, devices).accuracy < 0.8
        errors = round((1 - row.forecast.accuracy) * 200)
        assert bounds.binomial(np.arange(200) < errors, 0.2) <= 0.1
        assert set(row.plan.codecs) == {"float32"}
    assert failed <= 6, failed  # 3 are expected at most
    with pytest.raises(ValueError, match=r"does not certify a risk of 0\.02"):
        search_plans(HeldOut(*(a[:60] for a in new_perfect())), times, links, devices, risk=0.02)


def new_perfect():
    trace = some_trace(np.random.default_rng(3), 60, 3)
    return HeldOut(trace.scores, np.ones_like(trace.correct))


def test_labels_that_a_codec_changes_are_taken_from_the_accuracy():
    link = Link(1e5, 1e7, 0.001)
    trace, times, *rest = two_tiers(link, changed=0.2)
    never = np.full(2, np.inf, np.float32)
    plain, changed = (predict(Plan((1,), (c,), never), trace, times, *rest) for c in CODECS)
    assert changed.accuracy == pytest.approx(plain.accuracy - 0.2)
    assert changed.mean_seconds < plain.mean_seconds

    def tried(changed):
        """The codecs of the features of the one cut."""
        _, times, links, devices = two_tiers(link, changed=changed)
        found = options(Problem(times, links, devices, "mean"), CODECS)
        return {option.codecs[0] for option in found if 0 < option.cuts[0] < 3}

    assert tried(0.0) == {"int8"}
    assert tried(0.2) == {"float32", "int8"}


def test_jitter_widens_the_latency_and_keeps_its_mean():
    never = np.full(2, np.inf, np.float32)
    plan = Plan((1,), ("float32",), never)
    still = predict(plan, *two_tiers(Link(1e7, 1e7, 0.1), 0.1))
    shaken = predict(plan, *two_tiers(Link(1e7, 1e7, 0.1, 0.04), 0.1))
    assert shaken.mean_seconds == pytest.approx(still.mean_seconds)
    # Two uniform ways: above 0.08 (1 - sqrt(2 * 0.01)) in one of a hundred.
    assert shaken.p99_seconds - still.p99_seconds == pytest.approx(0.0687, abs=0.003)


def test_an_exit_that_is_never_right_is_off():
    trace, times, links, devices = two_tiers(Link(1e7, 1e7, 0.02))
    wrong = trace.correct.copy()
    wrong[:, 0] = False
    best = search_plans(HeldOut(trace.scores, wrong), times, links, devices).best
    assert best.plan.thresholds[0] == np.inf


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cuts": (2, 1)}, "give numbers from 0 to 3, not decreasing"),
        ({"cuts": (1, 4)}, "give numbers from 0 to 3"),
        ({"cuts": (1,)}, "give 2, 2, 2 and 3"),
        ({"codecs": ("float32", "float16")}, "'float16' was not measured at cut 2"),
        ({"cuts": (1, 1), "codecs": ("float32", "int8")}, "passes on what it receives"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(change, words):
    _, trace, *rest = drawn(0, 3, 3, 10)
    plan = Plan((1, 2), ("float32", "int8"), np.zeros(2, np.float32))._replace(**change)
    with pytest.raises(ValueError, match=words):
        predict(plan, trace, *rest)


def test_arguments_of_a_search_are_checked():
    trace, *rest = two_tiers(FAST)
    for asked, words in (
        ({"objective": "median"}, "give one of mean, p99, energy, price"),
        ({"accuracy": 0.5, "risk": 0.1}, "give one of them"),
        ({"accuracy": 1.01}, "give at most that"),
        ({"drop": -0.1}, "an accuracy drop of -0.1"),
        ({"codecs": ["zip"]}, "measured on every machine: float32, int8"),
        ({"codecs": ["int8"], "risk": 0.1}, "allow one of them"),
    ):
        with pytest.raises(ValueError, match=words):
            search_plans(trace, *rest, **asked)
    # The image, and nothing, are sent in any codec.
    best = search_plans(*two_tiers(FAST, changed=0.2), codecs=["int8"]).best
    assert best.plan.cuts[0] in (0, 3)


def test_times_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "times.json"
    times = some_times(np.random.default_rng(0), 3, changed=0.25)
    planning.save(times, path)
    again = planning.load(path)
    np.testing.assert_allclose(again.stages, times.stages, rtol=1e-3)
    assert again.crossings.keys() == times.crossings.keys()
    for key, crossing in times.crossings.items():
        for a, b in zip(again.crossings[key], crossing, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3)
    path.write_bytes(path.read_bytes().replace(b'"cut": 1', b'"cut": 2'))
    with pytest.raises(ValueError, match="is damaged"):
        planning.load(path)
    with pytest.raises(ValueError, match=r"No such file.*write it with `eejax times`"):
        planning.load(tmp_path / "none.json")


LINKS = (
    "5g:\n  up_bits_per_second: 20e6\n  down_bits_per_second: 1.0e+8\n  round_trip_seconds: 0.03\n"
)
DEVICES = "phone:\n  times: t.json\n  scale: 8\n  link: 5g\ncloud:\n  times: t.json\n"


def files(place, links=LINKS, devices=DEVICES):
    planning.save(some_times(np.random.default_rng(0), 2), place / "t.json")
    (place / "links.yaml").write_text(links)
    (place / "devices.yaml").write_text(devices)
    return planning.read(place / "links.yaml", place / "devices.yaml")


def test_links_and_devices_are_read(tmp_path):
    tiers = files(tmp_path)
    assert tiers.names == ("phone", "cloud")
    assert tiers.link_names == ("5g",)
    assert tiers.links == (Link(2e7, 1e8, 0.03),)
    assert tiers.devices == (Device(8), Device())
    assert [t.stages.shape for t in tiers.times] == [(3, 2, 2)] * 2


@pytest.mark.parametrize(
    ("links", "devices", "words"),
    [
        ("", DEVICES, r"links.yaml: the file: missing; expected names"),
        ("- 5g", DEVICES, r"links.yaml: the file: .*; expected names"),
        ("5g: {a: [}", DEVICES, r"links.yaml is no YAML"),
        ("5g: fast", DEVICES, r"links.yaml: 5g: 'fast'; expected fields"),
        ("5: {}", DEVICES, r"links.yaml: a name: '5'; expected a word"),
        (LINKS + "  loss: 0.1", DEVICES, r"5g.loss: unknown field '0.1'; expected one of up_bits"),
        (LINKS.replace("  round", "  roundd"), DEVICES, r"5g.roundd_trip_seconds: unknown field"),
        (
            LINKS.replace("  round_trip_seconds: 0.03", ""),
            DEVICES,
            r"round_trip_seconds: missing",
        ),
        (
            LINKS.replace("20e6", "0"),
            DEVICES,
            r"up_bits_per_second: 0; expected a number above",
        ),
        (LINKS.replace("20e6", "fast"), DEVICES, r"up_bits_per_second: 'fast'; expected a number"),
        (LINKS.replace("0.03", ".nan"), DEVICES, r"5g.round_trip_seconds: nan; expected a number"),
        (LINKS.replace("0.03", "yes"), DEVICES, r"5g.round_trip_seconds: True; expected a number"),
        (LINKS + "  jitter_seconds: 0.02", DEVICES, r"5g.jitter_seconds: 0.02; expected half of"),
        (
            LINKS,
            DEVICES.replace("8", "-1"),
            r"phone.scale: -1; expected a number above",
        ),
        (
            LINKS,
            DEVICES.replace("  scale", "  speed"),
            r"phone.speed: unknown field '8'",
        ),
        (
            LINKS,
            DEVICES.replace("link: 5g", "link: 6g"),
            r"phone.link: '6g'; expected .* of 5g",
        ),
        (LINKS, DEVICES.replace("  link: 5g\n", ""), r"phone.link: missing; expected the link"),
        (LINKS, DEVICES + "  link: 5g\n", r"cloud.link: '5g'; expected none"),
        (
            LINKS,
            DEVICES.replace("  times: t.json\n", "", 1),
            r"phone.times: missing",
        ),
        (LINKS, DEVICES.replace("t.json", "u.json"), r"u.json cannot be read .*No such file"),
        (LINKS, DEVICES.replace("t.json", "links.yaml"), r"links.yaml is damaged"),
    ],
)
def test_a_mistake_in_a_file_is_refused_on_one_line(links, devices, words, tmp_path):
    with pytest.raises(ValueError, match=words) as caught:
        files(tmp_path, links, devices)
    assert "\n" not in str(caught.value)
