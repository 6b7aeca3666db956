"""Bundles: what is saved comes back bit for bit, and what is damaged is refused with a reason."""

import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from toys import CLASSES, POLICIES

import eejax
from eejax.bundle import Bundle, save
from eejax.cost import Costs
from eejax.policies import POLICIES as RULES
from eejax.policies import to_arrays
from eejax.runtime import manifest

IMAGE = (8, 8, 1)
# The rules of the toys' table that are not of eejax cannot be looked up, so they cannot be saved.
STORED = {name: policy for name, policy in POLICIES.items() if "running sum" not in name}


IMAGES = np.random.default_rng(0).integers(0, 256, (9, *IMAGE), dtype=np.uint8)


@pytest.fixture(scope="module")
def example():
    """A small network that is not trained, with thresholds that some images reach."""
    bundle = Bundle(
        family="fast",
        arguments={"width": 2, "exits": (1, 3), "gate": "features", "dtype": "float32"},
        classes=tuple("abc"),
        image=IMAGE,
        mean=(100.0,),
        std=(50.0,),
        variables={},
        policy=eejax.max_prob,
        thresholds=np.array([0, np.inf]),
        costs=Costs(np.array([1.0, 2, 3]), np.array([0.1, 0.2, 1 / 3])),
        metadata={"seed": 3, "dataset": "noise", "note": None},
    )
    assert len(bundle.classes) == CLASSES
    variables = jax.jit(bundle.network.init)(jax.random.key(1), jnp.asarray(IMAGES[:1]))
    # All elements differ, so a test sees it if two arrays are mixed up.
    variables = jax.tree.map(lambda x: x + jnp.linspace(0, 0.1, x.size).reshape(x.shape), variables)
    scores = eejax.score(bundle.policy, recorded(bundle.network, variables)).scores
    thresholds = np.array([np.median(scores[:, 0]), np.inf])
    return dataclasses.replace(bundle, variables=variables, thresholds=thresholds)


def recorded(network, variables):
    return eejax.collect(network, variables, IMAGES, np.zeros(len(IMAGES), int))


@pytest.fixture(scope="module")
def trace(example):
    return recorded(example.network, example.variables)


@pytest.fixture
def saved(example, tmp_path):
    """The directory of the saved example."""
    save(example, tmp_path / "bundle")
    return tmp_path / "bundle"


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


def test_every_field_comes_back(example, saved):
    loaded = eejax.load(saved)
    for field in dataclasses.fields(Bundle):
        if field.name not in ("variables", "policy", "thresholds", "costs"):
            assert getattr(loaded, field.name) == getattr(example, field.name), field.name
    assert loaded.arguments["exits"] == [1, 3]
    assert_same_bits(loaded.variables, example.variables)
    assert_same_bits((loaded.thresholds, *loaded.costs), (example.thresholds, *example.costs))
    assert loaded.policy is not example.policy
    assert loaded.policy.rule is example.policy.rule
    assert {path.name for path in saved.iterdir()} == {"bundle.json", "bundle.safetensors"}


@pytest.mark.parametrize("name", STORED)
def test_every_policy_comes_back(name, example, trace, tmp_path):
    live = dataclasses.replace(example, policy=STORED[name])
    save(live, tmp_path / "bundle")
    loaded = eejax.load(tmp_path / "bundle")
    described, arrays = to_arrays(loaded.policy)
    described_before, arrays_before = to_arrays(live.policy)
    assert described == described_before
    assert_same_bits(arrays, arrays_before)
    before, after = (eejax.score(policy, trace) for policy in (live.policy, loaded.policy))
    assert_same_bits(before, after)


def test_every_rule_of_the_table_is_tried():
    described = json.dumps([to_arrays(policy)[0] for policy in STORED.values()])
    for name in (*RULES, "temperature"):
        assert f'"rule": "{name}"' in described


@pytest.mark.parametrize("name", ["ztw", "product, temperatures"])
def test_a_loaded_network_predicts_as_before(name, example, tmp_path):
    live = dataclasses.replace(example, policy=STORED[name])
    save(live, tmp_path / "bundle")
    loaded = eejax.load(tmp_path / "bundle")
    for images in (IMAGES, IMAGES[:1]) if name == "ztw" else (IMAGES,):
        assert_same_bits(live.predict(images), loaded.predict(images))


def test_predictions_are_those_of_the_executors(example):
    prediction = example.predict(IMAGES)
    network, thresholds = example.network, example.thresholds
    run = eejax.predictor(network, example.policy, example.variables, eejax.full)
    expected = run(thresholds, IMAGES)
    np.testing.assert_array_equal(prediction.labels, expected.labels)
    np.testing.assert_array_equal(prediction.exits, expected.exits)
    np.testing.assert_allclose(prediction.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert len(set(prediction.exits.tolist())) > 1
    alone = example.predict(IMAGES[:1])
    assert (alone.labels[0], alone.exits[0]) == (prediction.labels[0], prediction.exits[0])


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 8, 8, 1), np.float32),
        np.zeros((2, 8, 9, 1), np.uint8),
        np.zeros((8, 8, 1), np.uint8),
        np.zeros((0, 8, 8, 1), np.uint8),
        [[1, 2]],
    ],
    ids=("dtype", "side", "no batch axis", "none", "list"),
)
def test_images_that_do_not_fit_are_refused(example, images):
    with pytest.raises(ValueError, match=r"give uint8 \[B, 8, 8, 1\] in 0..255"):
        example.predict(images)


def test_a_runs_directory_serves_as_well(saved):
    assert eejax.load(saved.parent).metadata["seed"] == 3
    with pytest.raises(ValueError, match=r"holds no bundle: no bundle\.json there or in bundle/"):
        eejax.load(saved.parent.parent / "elsewhere")


def test_saving_again_replaces_the_bundle_and_leaves_nothing_behind(example, saved):
    save(dataclasses.replace(example, metadata={"seed": 4}), saved)
    assert eejax.load(saved).metadata == {"seed": 4}
    assert [path.name for path in saved.parent.iterdir()] == ["bundle"]
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt"):
        save(example, saved)


def test_a_failed_save_leaves_the_old_bundle(example, saved, monkeypatch):
    def broken(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        save(dataclasses.replace(example, metadata={}), saved)
    assert eejax.load(saved).metadata["seed"] == 3
    assert [path.name for path in saved.parent.iterdir()] == ["bundle"]


def rewrite(saved, change, *, rehash=True):
    """Edits the description as an attacker would, with or without mending its hash."""
    path = saved / "bundle.json"
    description = json.loads(path.read_text())
    change(description)
    if rehash:
        description["content_sha256"] = manifest.content_hash(description["content"])
    path.write_text(json.dumps(description))


def rewrite_arrays(saved, change):
    path = saved / "bundle.safetensors"
    arrays = safetensors.numpy.load(path.read_bytes())
    change(arrays)
    path.write_bytes(safetensors.numpy.save(arrays))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    rewrite(saved, lambda d: d["content"].update(weights_sha256=digest))


def cut_short(saved, name):
    path = saved / name
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(saved, name):
    data = bytearray((saved / name).read_bytes())
    data[-3] ^= 1
    (saved / name).write_bytes(data)


def replace_by_a_link(saved, name):
    outside = saved.parent / "elsewhere"
    (saved / name).rename(outside)
    (saved / name).symlink_to(outside)


def hashed_garbage(saved):
    (saved / "bundle.safetensors").write_bytes(b"garbage")
    digest = hashlib.sha256(b"garbage").hexdigest()
    rewrite(saved, lambda d: d["content"].update(weights_sha256=digest))


def content(**values):
    return lambda saved: rewrite(saved, lambda d: d["content"].update(values))


def array(name, value):
    return lambda saved: rewrite_arrays(saved, lambda a: a.update({name: value}))


DAMAGE = {
    "weights cut short": (
        lambda s: cut_short(s, "bundle.safetensors"),
        r"bundle\.safetensors is damaged: its SHA-256",
    ),
    "weights flipped": (lambda s: flip_a_bit(s, "bundle.safetensors"), "is damaged: its SHA-256"),
    "weights gone": (
        lambda s: (s / "bundle.safetensors").unlink(),
        r"bundle\.safetensors is missing",
    ),
    "weights linked": (lambda s: replace_by_a_link(s, "bundle.safetensors"), "is a link"),
    "weights of another kind": (hashed_garbage, "is no safetensors file"),
    "description cut short": (
        lambda s: cut_short(s, "bundle.json"),
        r"bundle\.json is damaged: .*line",
    ),
    "description linked": (lambda s: replace_by_a_link(s, "bundle.json"), "is a link"),
    "description of another kind": (
        lambda s: (s / "bundle.json").write_text("[]"),
        "does not describe an eejax bundle",
    ),
    "description not text": (
        lambda s: (s / "bundle.json").write_bytes(b"\xff\xfe\x00"),
        r"bundle\.json is damaged",
    ),
    "description too deep": (
        lambda s: (s / "bundle.json").write_text("[" * 100_000),
        "cannot be read: ",
    ),
    "not a number": (
        lambda s: (s / "bundle.json").write_text('{"format": NaN}'),
        "holds NaN, which JSON does not have",
    ),
    "newer": (
        lambda s: rewrite(s, lambda d: d.update(version=2)),
        "version 2 is newer than 1.*update eejax",
    ),
    "no version": (
        lambda s: rewrite(s, lambda d: d.update(version="1")),
        "version '1'; expected a whole number",
    ),
    "edited": (
        lambda s: rewrite(s, lambda d: d["content"].update(mean=[0.0]), rehash=False),
        "damaged: its content does not have its SHA-256",
    ),
    "field gone": (
        lambda s: rewrite(s, lambda d: d["content"].pop("policy")),
        r"has the fields \['arguments', .*policy a dict",
    ),
    "unknown field": (content(pickle="x"), "has the fields .*'pickle'"),
    "no such family": (content(family="fastest"), "'fastest' is no family"),
    "no such argument": (content(arguments={"depth": 3}), "fast takes no depth"),
    "other network": (
        content(arguments={"width": 3, "exits": [1, 3], "gate": "features"}),
        r"variables/.* is float32 .*; expected float32",
    ),
    "more exits": (
        content(arguments={"width": 2, "exits": [1, 2, 3]}),
        "2 thresholds for 4 exits",
    ),
    "no gate": (
        content(arguments={"width": 2, "exits": [1, 3]}),
        "variables are not the network's: variables/params/heads",
    ),
    "image not of sides": (
        content(image={"shape": [8, -8, 1], "dtype": "uint8"}),
        "images are .*; expected height, width and channels",
    ),
    "image without a shape": (content(image={"dtype": "uint8"}), "no 'shape'"),
    "float images": (
        content(image={"shape": [8, 8, 1], "dtype": "float32"}),
        "images are float32; expected uint8",
    ),
    "means": (content(mean=[1.0, 2.0]), "2 means and 1 standard deviations"),
    "mean of words": (content(mean=["x"]), "could not convert"),
    "no such policy": (content(policy={"rule": "oracle"}), "no policy rule 'oracle'"),
    "thresholds": (array("thresholds", np.zeros(3, np.float32)), "3 thresholds for 3 exits"),
    "costs": (array("costs/heads", np.zeros(2)), r"costs of .* for 3 exits"),
    "another array": (
        array("variables/params/more", np.zeros(3)),
        "variables are not the network's: variables/params/more",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_bundle_is_refused_with_a_reason_on_one_line(name, saved):
    damage, message = DAMAGE[name]
    damage(saved)
    with pytest.raises(ValueError, match=message) as caught:
        eejax.load(saved)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"the bundle in {saved} cannot be read: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"thresholds": np.zeros(5)}, "5 thresholds for 3 exits"),
        ({"costs": Costs(np.ones(2), np.ones(2))}, "for 3 exits; give the costs of 3 stages"),
        ({"std": (0.0,)}, "std positive"),
        ({"family": "fastest"}, "no family"),
        ({"metadata": {"seed": np.int32(1)}}, "metadata .*; give what JSON holds"),
        ({"metadata": {"loss": float("nan")}}, "metadata .*; give what JSON holds"),
        ({"arguments": {"dtype": jnp.bfloat16}}, "arguments .*; give what JSON holds"),
    ],
    ids=str,
)
def test_a_bundle_of_parts_that_do_not_fit_is_refused(example, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(example, **change)


def test_what_could_not_be_read_again_is_not_saved(example, tmp_path):
    place = tmp_path / "bundle"
    with pytest.raises(ValueError, match="'of a test' is not in"):
        save(dataclasses.replace(example, policy=POLICIES["running sum"]), place)
    with pytest.raises(ValueError, match="variables of the network are missing"):
        save(dataclasses.replace(example, variables={}), place)
    assert not list(tmp_path.iterdir())
