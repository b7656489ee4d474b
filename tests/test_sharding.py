"""A shard of a batch has the noise that its examples have in the whole of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from oracles import GMM5
from test_presets import seen
from test_public import KEY, VP, apply, first_half, learned, logits, no_noise, twice

import jaxdiff as jd
from jaxdiff import parameterizations, time_samplers
from jaxdiff.objectives.base import named
from jaxdiff.objectives.d3pm import categorical_bound, masked_cross_entropy
from jaxdiff.objectives.dequantization import dequantized
from jaxdiff.objectives.elbo import discrete_decoder
from jaxdiff.processes import d3pm
from jaxdiff.processes.base import example_indices, example_keys, of_whole_batch
from jaxdiff.recipes import samplers

pytestmark = pytest.mark.devices(4)
X = jax.random.normal(KEY, (8, 2))
TOKENS = jnp.arange(16).reshape(8, 2) % 2  # never the mask, class 2
W = {"w": jnp.float32(0.7)}


def filled(params, centres, noise):
    return jax.nn.sigmoid(noise), noise.reshape(len(noise), -1).sum(1)


def of_point(params, key, batch):
    return (batch["x"] ** 2).sum(1), {}


def denoising(time_sampler):
    return jd.denoising(apply, VP, jd.epsilon(), time_sampler=time_sampler)


# Name ↦ objective, parameters, data.
OBJECTIVES = {
    **{
        name: (denoising(getattr(time_samplers, name)()), W, X)
        for name in ("uniform", "steps", "low_discrepancy", "importance", "log_uniform")
    },
    "log_normal": (denoising(time_samplers.log_normal()), W, X),
    "improved_ddpm": (
        jd.improved_ddpm(twice, VP, parameterizations.learned_variance(jd.epsilon(), steps=10)),
        W,
        X,
    ),
    "maximum_likelihood": (
        jd.maximum_likelihood(apply, VP, jd.x0(), jnp.array([1.0, 0.5, 0.1]), probes=1),
        W,
        X,
    ),
    "sliced_score_matching": (jd.sliced_score_matching(no_noise), W, X),
    "vdm": (
        jd.vdm(apply, jd.epsilon(), decoder=discrete_decoder(17)),
        learned(1.0),
        X,
    ),
    "hybrid_score_matching": (
        jd.hybrid_score_matching(first_half, jd.cld(), jd.mixed_score()),
        W,
        X,
    ),
    "dequantized": (
        dequantized(of_point, filled, levels=4),
        {"model": {}, "dequantizer": {}},
        X,
    ),
    "categorical_bound": (
        categorical_bound(
            logits, jd.D3PM(d3pm.uniform(3)), d3pm.Logits(), jnp.array([1.0, 0.5, 0.0])
        ),
        W,
        TOKENS,
    ),
    "masked_cross_entropy": (
        masked_cross_entropy(logits, jd.D3PM(d3pm.absorbing(3)), d3pm.Logits()),
        W,
        TOKENS,
    ),
}


def by_shards(objective, *args, batch):
    """The losses and metrics [b] of every shard, put together."""
    mesh = jd.parallel.data_mesh()
    return jax.jit(
        jax.shard_map(
            objective,
            mesh=mesh,
            in_specs=(*[P()] * len(args), P("data")),
            out_specs=P("data"),
            check_vma=False,
        )
    )(*args, batch)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_are_those_of_the_whole_batch(name):
    objective, params, x = OBJECTIVES[name]
    expected = jax.jit(objective)(params, KEY, {"x": x})
    found = by_shards(objective, params, KEY, batch={"x": x})
    assert np.ptp(np.asarray(expected[0])) > 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected
    )


def test_indices_count_on_over_the_shards():
    def told(x):
        index, total = example_indices(len(x))
        assert total == 8
        keys = example_keys(KEY, len(x))
        return index, jax.random.key_data(keys), of_whole_batch(jnp.arange, len(x))

    index, keys, drawn = by_shards(told, batch=X)
    np.testing.assert_array_equal(index, np.arange(8))
    np.testing.assert_array_equal(drawn, np.arange(8))
    np.testing.assert_array_equal(keys, jax.random.key_data(example_keys(KEY, 8)))
    np.testing.assert_array_equal(told(X)[0], np.arange(8))


@pytest.mark.parametrize("name", ["samples", "likelihood"])
def test_one_key_for_all_devices_is_that_of_the_whole_batch(name):
    denoise = GMM5.denoiser(VP)

    def samples(given, x):
        return jd.sample(jd.Ancestral(VP), given[0], jd.grids.uniform(5), given[1], x)

    def likelihood(given, x):
        # Steps of its own for each example, as shards cannot agree on them.
        found = jd.log_likelihood(VP, given[0], x, key=given[1], probes=1, per_example=True)
        return found.value

    function = {"samples": samples, "likelihood": likelihood}[name]
    expected = jax.jit(function)((denoise, KEY), X)
    found = jd.parallel.per_shard(function, jd.parallel.data_mesh())((denoise, KEY), X)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_samples_are_the_same_on_devices_that_do_not_divide_their_number():
    def run(scale, keys, **options):
        return scale * jax.vmap(lambda key: jax.random.normal(key, (2,)))(keys)

    sample, _ = samplers(run, jnp.zeros(2), size=3)  # ten are less than four threes
    alone = sample(jnp.float32(3.0), KEY, 10)
    shared = sample(jnp.float32(3.0), KEY, 10, jd.parallel.data_mesh())
    np.testing.assert_allclose(shared, alone, rtol=1e-6)


def test_each_shard_has_masks_of_dropout_of_its_own():
    def told(batch):
        return jax.random.key_data(named(batch, KEY, dropout=True)["rngs"]["dropout"])[None]

    assert len(np.unique(by_shards(told, batch={"x": X}), axis=0)) == 4
    np.testing.assert_array_equal(told({"x": X})[0], jax.random.key_data(KEY))


def test_mirrors_and_dropped_labels_are_those_of_the_whole_batch():
    run, batch, expected = seen(flip=True, label_dropout=0.25, num_classes=10)
    found = by_shards(run.objective, {}, KEY, batch=batch)[1]["batch"]
    jax.tree.map(np.testing.assert_array_equal, found, expected)
