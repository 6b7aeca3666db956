"""Where exits sit, and what a network that is cut there consists of."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from eejax.backbone import cut
from eejax.exits import blocks_of
from eejax.models.resnet import resnet
from eejax.models.vgg import vgg
from eejax.network import ExitOutput


def not_asked():
    raise AssertionError("only shares need to know what the blocks cost")


@pytest.mark.parametrize(
    ("exits", "blocks", "ends"),
    [
        ((2, 5), 8, (2, 5, 8)),
        ([2, 5, 8], 8, (2, 5, 8)),
        (np.array([2, 5]), 8, (2, 5, 8)),
        ((e for e in (2, 5)), 8, (2, 5, 8)),
        ((np.int32(2), 5), 8, (2, 5, 8)),
        (np.array([2, 8], np.uint8), 8, (2, 8)),
        (jnp.array([2, 5]), 8, (2, 5, 8)),
        ((), 8, (8,)),
        ([], 8, (8,)),
        (np.array([]), 8, (8,)),
        (iter(()), 8, (8,)),
        ((1,), 1, (1,)),
        (0, 8, (8,)),
        (1, 8, (4, 8)),
        (3, 12, (3, 6, 9, 12)),
        (2, 4, (1, 3, 4)),
        (np.int64(3), 12, (3, 6, 9, 12)),
        (np.array(3), 12, (3, 6, 9, 12)),
        (7, 8, (1, 2, 3, 4, 5, 6, 7, 8)),
        ("all", 4, (1, 2, 3, 4)),
        ("all", 1, (1,)),
        (None, 12, (3, 6, 9, 12)),
        (None, 3, (1, 2, 3)),
        (None, 1, (1,)),
    ],
)
def test_exits_by_number_are_where_they_are_asked_for(exits, blocks, ends):
    found = blocks_of(exits, blocks, not_asked)
    assert found == ends
    assert all(type(end) is int for end in found)


def test_so_many_exits_are_spread_evenly():
    for blocks in range(1, 40):
        for exits in range(blocks):
            ends = blocks_of(exits, blocks, not_asked)
            gaps = np.diff([0, *ends])
            assert len(ends) == exits + 1
            assert ends[-1] == blocks
            assert gaps.min() >= 1
            assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(
    ("exits", "said"),
    [
        ((0,), "from 1 to 8"),
        ((-1, 8), "from 1 to 8"),
        ((9,), "from 1 to 8"),
        ((2, 9), "from 1 to 8"),
        ((5, 2), "from 1 to 8"),
        ((2, 2), "from 1 to 8"),
        ((8, 8), "from 1 to 8"),
        ((8, 3), "from 1 to 8"),
        (8, "8 early exits for 8 blocks; give 0 to 7"),
        (-1, "-1 early exits"),
        (np.int64(8), "8 early exits"),
        ("every", "'every'"),
        ("", '"all"'),
        (True, 'exits True; give "all"'),
        (np.True_, 'give "all"'),
        ((True, False), 'give "all"'),
        ((True, 5), r'exits \[True, 5\]; give "all"'),
        ((2, "5"), 'give "all"'),
        (("all",), 'give "all"'),
        ((2, None), 'give "all"'),
        (({2}, 5), 'give "all"'),
        (((2, 5), (3,)), 'give "all"'),
        (((2, 5), (3, 6)), 'give "all"'),
        (1j, 'give "all"'),
        (object(), 'give "all"'),
    ],
)
def test_exits_that_do_not_exist_are_refused(exits, said):
    with pytest.raises(ValueError, match=said):
        blocks_of(exits, 8, not_asked)


FRACTIONS = (0.1, 0.3, 0.5, 0.9, 0.95)


@pytest.mark.parametrize(
    ("shares", "ends"),
    [
        ((0.3,), (2, 5)),
        (0.3, (2, 5)),
        ((0.01, 0.42, 0.75), (1, 3, 4, 5)),
        ((0.15, 0.71), (1, 4, 5)),
        (np.array([0.1, 0.5]), (1, 3, 5)),
        (np.array([0.1, 0.5], np.float32), (1, 3, 5)),
        ((np.float32(0.1), np.float64(0.5)), (1, 3, 5)),
        (np.float32(0.3), (2, 5)),
        (np.array(0.3), (2, 5)),
        ((share / 10 for share in (1, 5)), (1, 3, 5)),
    ],
)
def test_shares_are_met_by_the_nearest_block(shares, ends):
    assert blocks_of(shares, 5, lambda: FRACTIONS) == ends


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ((0.3, 0.31), r"0\.3 at block 2, 0\.31 at block 2"),
        ((0.5, 0.3), "increasing"),
        ((0.99,), "before the last"),
        ((0.0, 0.5), "between 0 and 1"),
        ((0.5, 1.0), "between 0 and 1"),
        ((-0.1,), "between 0 and 1"),
        ((15.0, 30.0), "between 0 and 1"),
        ((2.0, 5.0), r"exits \(2\.0, 5\.0\); shares lie between 0 and 1; block numbers are whole"),
        (np.array([2.0, 5.0], np.float32), "block numbers are whole numbers"),
        (2.0, "block numbers are whole numbers"),
        ((True, 0.5), 'give "all"'),
        ((float("nan"),), "between 0 and 1"),
        ((0.3, 3), "between 0 and 1"),
        ((0.3, 0.31), r"end at 0\.100, 0\.300, 0\.500, 0\.900, 0\.950"),
    ],
)
def test_shares_that_cannot_be_met_are_refused(shares, said):
    with pytest.raises(ValueError, match=said):
        blocks_of(shares, 5, lambda: FRACTIONS)


def by_loop(shares, costs, classifier):
    """The nearest block to each share in plain Python, or None where two fall together."""
    whole = sum(costs) + classifier
    ends = []
    for share in shares:
        spent, nearest, distance = 0, None, None
        for block, cost in enumerate(costs, 1):
            spent += cost
            if distance is None or abs(spent / whole - share) < distance:
                nearest, distance = block, abs(spent / whole - share)
        if nearest == len(costs) or (ends and nearest <= ends[-1]):
            return None
        ends.append(nearest)
    return (*ends, len(costs))


@seed(0)
@settings(max_examples=200)
@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=12),
    st.integers(0, 500),
    st.lists(st.integers(1, 99), min_size=1, max_size=5, unique=True).map(sorted),
)
def test_shares_fall_where_a_plain_loop_puts_them(costs, classifier, percent):
    shares = tuple(p / 100 for p in percent)
    fractions = np.cumsum(costs) / (sum(costs) + classifier)
    expected = by_loop(shares, costs, classifier)
    if expected is None:
        with pytest.raises(ValueError, match="fall to different blocks"):
            blocks_of(shares, len(costs), lambda: fractions)
    else:
        assert blocks_of(shares, len(costs), lambda: fractions) == expected


# Multiply-accumulates of the convolutions, products with zero padding counted. Where the exits are
# says `network_architectures.py` of github.com/yigitcankaya/Shallow-Deep-Networks, a556446.
VGG16 = [
    side**2 * 9 * before * after
    for side, before, after in (
        *((32, 3, 64), (32, 64, 64), (16, 64, 128), (16, 128, 128)),
        *((8, 128, 256), (8, 256, 256), (8, 256, 256)),
        *((4, 256, 512), (4, 512, 512), (4, 512, 512), *[(2, 512, 512)] * 3),
    )
]
# As multiples of a block: the first has the stem with it, the first of a group reads half as many
# channels.
RESNET56 = [1 + 3 / 32, *[1] * 8, 0.75, *[1] * 8, 0.75, *[1] * 8]


@pytest.mark.parametrize(
    ("costs", "published"),
    [(VGG16, (2, 4, 6, 7, 9, 10, 13)), (RESNET56, (4, 8, 12, 16, 20, 24, 27))],
)
def test_the_shares_of_kaya_fall_where_their_exits_are(costs, published):
    shares = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)
    fractions = np.cumsum(costs) / np.sum(costs)
    assert blocks_of(shares, len(costs), lambda: fractions) == published


@pytest.mark.parametrize(
    ("network", "published"),
    [
        (functools.partial(vgg, 10, depth=16), (2, 4, 6, 7, 9, 10)),
        (functools.partial(resnet, 10, depth=56), (4, 8, 12, 16, 20, 24)),
    ],
)
def test_so_they_do_in_the_families_themselves(network, published):
    """Whose multiply-accumulates are counted, without products with zero padding."""
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)

    def paths(exits):
        shapes = jax.eval_shape(network(exits=exits).init, jax.random.key(0), image)
        leaves = jax.tree_util.tree_leaves_with_path(shapes["params"]["stages"])
        return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}

    assert paths((0.15, 0.3, 0.45, 0.6, 0.75, 0.9)) == paths(published)


class Layer(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, *, train):
        del train
        return nn.Dense(self.width, use_bias=False, name="layer")(x)


class Linear(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, features, memory, *, train):
        del memory, train
        logits = nn.Dense(self.classes, use_bias=False, name="layer")(features)
        return ExitOutput(logits, jnp.zeros(len(logits)), ())


# Vectors stand for images: 8 numbers, then 4, 16, 2, 8 and 8.
IMAGE = (8,)
WIDTHS = (4, 16, 2, 8, 8)
BLOCKS = [Layer(width) for width in WIDTHS]
COSTS = [a * b for a, b in itertools.pairwise([8, *WIDTHS])]


def kernels(network, kind):
    """Shapes of the kernels of each stage or head, in order."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((2, 8)))
    return [[leaf.shape for leaf in jax.tree.leaves(part)] for part in shapes["params"][kind]]


@pytest.mark.parametrize("exits", [(), (1,), (2, 4), (2, 4, 5), 2, "all", None])
def test_a_cut_network_has_all_blocks_in_order_whatever_the_exits(exits):
    network = cut(BLOCKS, exits, lambda e: Linear(3))
    ends = blocks_of(exits, 5, not_asked)
    assert network.num_exits == len(ends)
    stages = kernels(network, "stages")
    assert [len(stage) for stage in stages] == np.diff([0, *ends]).tolist()
    assert list(itertools.chain.from_iterable(stages)) == list(itertools.pairwise([8, *WIDTHS]))
    assert kernels(network, "heads") == [[(WIDTHS[end - 1], 3)] for end in ends]


def test_a_cut_network_computes_what_the_blocks_do():
    network = cut(BLOCKS, (1, 3), lambda e: Linear(3))
    rng = np.random.default_rng(0)
    images = rng.standard_normal((2, 8), np.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), images)
    variables = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
    outputs, plain = jax.jit(lambda v, x: (network.apply_all(v, x)[0], network.apply_plain(v, x)))(
        variables, images
    )
    matrices, heads = (jax.tree.leaves(variables["params"][kind]) for kind in ("stages", "heads"))
    x, expected = images, []
    for block, matrix in enumerate(matrices, 1):
        x = x @ matrix
        if block in (1, 3, 5):
            expected.append(x @ heads[len(expected)])
    np.testing.assert_allclose(outputs.logits, np.stack(expected), rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(plain, outputs.logits[-1])


def test_heads_are_made_by_number_and_the_last_is_the_classifier():
    def head(e):
        return Linear(e + 1)

    assert [k[0][1] for k in kernels(cut(BLOCKS, (2, 4), head), "heads")] == [1, 2, 3]
    own = cut(BLOCKS, (2, 4), head, classifier=Linear(7))
    assert [k[0][1] for k in kernels(own, "heads")] == [1, 2, 7]
    plain = cut(BLOCKS, (), head, classifier=Linear(7))
    assert [k[0][1] for k in kernels(plain, "heads")] == [7]


def test_equal_blocks_make_equal_stages_of_their_own():
    """By which an executor runs them with one program."""
    network = cut([Layer(8)] * 3, "all", lambda e: Linear(3))
    assert network.stages[0] == network.stages[1] == network.stages[2]
    assert network.heads[0] == network.heads[1]
    other = cut([Layer(8), Layer(4)], "all", lambda e: Linear(3))
    assert other.stages[0] != other.stages[1]


@pytest.mark.parametrize("shares", [(0.2,), (0.15, 0.3), (0.12, 0.32)])
@pytest.mark.parametrize("classes", [3, 30])
def test_shares_are_of_the_plain_network_with_its_classifier(shares, classes):
    """The early heads, each dearer than the whole backbone, do not count; the classifier does."""
    network = cut(BLOCKS, shares, lambda e: Linear(1000), classifier=Linear(classes), image=IMAGE)
    expected = by_loop(shares, COSTS, 8 * classes)
    ends = np.cumsum([len(stage) for stage in kernels(network, "stages")])
    assert tuple(ends.tolist()) == expected


def test_shares_need_the_shape_of_an_image():
    with pytest.raises(ValueError, match="image="):
        cut(BLOCKS, (0.2, 0.5), lambda e: Linear(3))


def test_positions_that_do_not_exist_are_refused_when_the_network_is_made():
    with pytest.raises(ValueError, match="from 1 to 5"):
        cut(BLOCKS, (6,), lambda e: Linear(3))
    with pytest.raises(ValueError, match="between 0 and 1"):
        cut(BLOCKS, (0.5, 1.5), lambda e: Linear(3), image=IMAGE)
