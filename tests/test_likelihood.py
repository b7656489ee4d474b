"""Exact likelihoods and each of their errors, against closed forms."""

import itertools
import subprocess
import sys

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import GMM5, SCHEDULES, GaussianData

import jaxdiff as jd
from jaxdiff import likelihood, networks, trace
from jaxdiff.parallel import data_mesh, per_shard
from jaxdiff.schedules import learned_gamma
from jaxdiff.solve import adaptive

every_schedule = pytest.mark.parametrize("name", SCHEDULES)
KEY = jax.random.key(0)
VP = jd.Gaussian(SCHEDULES["linear_beta"])
# Of ends so wide that its prior is that of the mixture's x_1.
LEARNED = jd.Gaussian(learned_gamma(-13.0, 9.0, hidden=8))


@every_schedule
def test_likelihood_of_gaussian_data_is_exact(name):
    """B16, with prior and diffusion of every schedule: the truth to 2e-3 nats in the mean.

    A process that ends at α(1) > 0 is given the exact end: data whose x_1 the prior is.
    """
    process = jd.Gaussian(SCHEDULES[name])
    std = 0.3 if name not in ("linear_beta", "from_betas", "subvp", "user") else 0.6
    denoise = GaussianData(process, 0.0, std)
    x = std * jax.random.normal(jax.random.key(1), (500, 2))
    found = jd.log_likelihood(process, denoise, x)
    # Data are placed at t0: compare with the density there.
    alpha, sigma = process.schedule(jnp.float32(1e-5))
    total = jnp.sqrt(alpha**2 * std**2 + sigma**2)
    truth = jax.scipy.stats.norm.logpdf(x, 0.0, total).sum(-1)
    assert abs(float(jnp.mean(found.value - truth))) < 2e-3
    assert float(jnp.sqrt(jnp.mean((found.value - truth) ** 2))) < 5e-3
    np.testing.assert_array_equal(found.stderr, 0.0)


@pytest.mark.parametrize(
    "name", ["linear_beta", "subvp", "exploding", "edm", "straight", "learned"]
)
def test_likelihood_of_the_mixture_is_exact(name):
    """B16: mean error ≤ 1e-3 nats and rms ≤ 5e-3 on the five modes."""
    process = LEARNED if name == "learned" else jd.Gaussian(SCHEDULES[name])
    x = GMM5.sample(jax.random.key(7), 2000)
    found = jd.log_likelihood(process, GMM5.denoiser(process), x)
    alpha, sigma = process.schedule(jnp.float32(1e-5))
    truth = jax.vmap(GMM5.diffused(alpha, sigma).log_prob)(x)
    error = np.asarray(found.value - truth, np.float64)
    assert abs(error.mean()) <= 1e-3
    assert np.sqrt((error**2).mean()) <= 5e-3


@pytest.mark.parametrize(
    ("name", "probe"),
    [
        ("linear_beta", trace.rademacher),
        ("linear_beta", trace.gaussian),
        ("exploding", trace.rademacher),
        ("straight", trace.rademacher),
    ],
)
def test_hutchinson_is_unbiased_and_narrows(name, probe):
    """B16: unbiased within 3 s.e., error ∝ K^−½, and the stated standard error is the true one."""
    process = jd.Gaussian(SCHEDULES[name])
    x, denoise = GMM5.sample(jax.random.key(7), 500), GMM5.denoiser(process)
    options = {"controller": adaptive(1e-4)}
    exact = jd.log_likelihood(process, denoise, x, **options).value
    rms = {}
    for probes in (1, 4, 16):
        found = jd.log_likelihood(
            process, denoise, x, key=jax.random.key(8), probes=probes, probe=probe, **options
        )
        error = np.asarray(found.value - exact)
        rms[probes] = np.sqrt((error**2).mean())
        assert abs(error.mean()) < 3 * error.std() / 500**0.5
        if probes == 1:
            assert np.all(np.isnan(found.stderr))
        else:
            stated = np.sqrt(np.mean(np.asarray(found.stderr) ** 2))
            np.testing.assert_allclose(stated, rms[probes], rtol=0.15)
    np.testing.assert_allclose(rms[1] / rms[4], 2.0, rtol=0.2)
    np.testing.assert_allclose(rms[4] / rms[16], 2.0, rtol=0.2)


def test_wrong_prior_scale_shows_in_the_likelihood():
    """The mutant that no sample reveals: a prior of half its width is off by nats."""

    class HalfPrior(jd.Gaussian):
        def prior(self, shape):
            normal = super().prior(shape)
            return jd.Normal(normal.mean, 0.5 * normal.std)

    x = GMM5.sample(jax.random.key(7), 200)
    right = jd.log_likelihood(VP, GMM5.denoiser(VP), x)
    wrong = jd.log_likelihood(HalfPrior(VP.schedule), GMM5.denoiser(VP), x)
    assert float(jnp.mean(right.value - wrong.value)) > 0.5


def test_likelihood_is_the_same_in_double_precision():
    """On the straight path, whose prior is exact, only the solver's error is left."""
    with jax.enable_x64(True):
        process = jd.Gaussian(jd.straight())
        x = jnp.asarray(np.random.default_rng(0).normal(size=(20, 2)))
        found = jd.log_likelihood(
            process, GaussianData(process, 0.0, 1.0), x, t0=1e-8, controller=adaptive(1e-7)
        )
        assert found.value.dtype == jnp.float64
        truth = jax.scipy.stats.norm.logpdf(x).sum(-1)
        np.testing.assert_allclose(found.value, truth, atol=1e-6)


def test_likelihood_of_images_flattens_nothing():
    """[b, h, w, c] data: the trace runs over every coordinate, and each example has its own."""
    denoise = GaussianData(VP, 0.0, 0.6)
    x = jax.random.normal(KEY, (3, 4, 4, 1)) * jnp.array([0.3, 0.6, 1.2])[:, None, None, None]
    found = jd.log_likelihood(VP, denoise, x)
    truth = jax.scipy.stats.norm.logpdf(x, 0.0, 0.6).sum((1, 2, 3))
    np.testing.assert_allclose(found.value, truth, rtol=1e-3)
    estimate = jd.log_likelihood(VP, denoise, x, key=KEY, probes=2)
    np.testing.assert_allclose(estimate.value, truth, rtol=1e-3)
    assert found.latent.shape == x.shape


# Probes


def quadratic_forms(matrix, key, count):
    """eᵀ A e of K orthogonal probes."""
    probes, share = trace.orthogonal(key, count, (len(matrix),), jnp.float32)
    return jnp.einsum("ki,ij,kj->k", probes, matrix, probes), share


@pytest.mark.parametrize("size", [5, 8])
def test_a_whole_set_of_orthogonal_probes_has_the_exact_trace(size):
    matrix = jax.random.normal(KEY, (size, size))
    for seed in range(3):
        forms, share = quadratic_forms(matrix, jax.random.key(seed), 8)
        np.testing.assert_allclose(jnp.mean(forms), jnp.trace(matrix), rtol=1e-4, atol=1e-4)
        assert share == 1.0


@pytest.mark.parametrize("count", [1, 3, 6])
def test_orthogonal_probes_vary_as_draws_without_replacement(count):
    """Var = (P − K)/(P − 1) Var_1/K with Var_1 = Σ_{i≠j} (A_ij + A_ji)²/2, and the stated one."""
    matrix = jax.random.normal(jax.random.key(1), (8, 8))
    keys = jax.random.split(jax.random.key(2), 20000)
    forms = jax.vmap(lambda key: quadratic_forms(matrix, key, count)[0])(keys)
    means = np.asarray(jnp.mean(forms, axis=1), np.float64)
    twice = matrix + matrix.T - 2.0 * jnp.diag(jnp.diag(matrix))
    one = 0.5 * float(jnp.sum(twice**2))
    expected = one / count * (8 - count) / 7
    assert abs(means.mean() - float(jnp.trace(matrix))) < 3 * (expected / 20000) ** 0.5
    np.testing.assert_allclose(means.var(), expected, rtol=0.04)
    if count > 1:
        stated = np.asarray(forms, np.float64).var(axis=1, ddof=1) / count * (1 - count / 8)
        np.testing.assert_allclose(stated.mean(), expected, rtol=0.04)


def correlated(process):
    """N(0, S) in eight dimensions with a known denoiser, whose Jacobian is no multiple of I."""
    factor = 0.3 * jax.random.normal(jax.random.key(3), (8, 8)) + 0.5 * jnp.eye(8)
    cov = factor @ factor.T

    def denoise(x, t):
        alpha, sigma = process.schedule(t)
        gain = alpha * cov @ jnp.linalg.inv(alpha**2 * cov + sigma**2 * jnp.eye(8))
        return jd.Denoised(x @ gain.T)

    return factor, cov, jax.tree_util.Partial(denoise)


def test_error_bars_of_the_probes_cover_at_their_rate():
    """Of six probes the spread is uncertain itself: Student's t with five degrees of freedom."""
    from scipy import stats

    factor, _, denoise = correlated(VP)
    x = jax.random.normal(jax.random.key(4), (400, 8)) @ factor.T
    options = {"controller": adaptive(1e-4)}
    exact = jd.log_likelihood(VP, denoise, x, **options).value
    for probe in (trace.rademacher, trace.orthogonal):
        found = jd.log_likelihood(VP, denoise, x, key=KEY, probes=6, probe=probe, **options)
        error = np.abs(np.asarray(found.value - exact) / np.asarray(found.stderr))
        assert abs(np.mean(error < 1.0) - (2 * stats.t.cdf(1.0, 5) - 1)) < 0.08
        assert np.mean(error < 2.571) > 0.92  # 95 % of Student's t


def test_orthogonal_probes_are_nearer_at_equal_cost():
    """Six of eight: the error is √(2/7) = 0.53 of that of independent signs."""
    factor, _, denoise = correlated(VP)
    x = jax.random.normal(jax.random.key(4), (400, 8)) @ factor.T
    options = {"controller": adaptive(1e-4), "key": KEY, "probes": 6}
    exact = jd.log_likelihood(VP, denoise, x, controller=adaptive(1e-4)).value
    rms = [
        float(jnp.sqrt(jnp.mean((found.value - exact) ** 2)))
        for probe in (trace.orthogonal, trace.rademacher)
        for found in [jd.log_likelihood(VP, denoise, x, probe=probe, **options)]
    ]
    np.testing.assert_allclose(rms[0] / rms[1], (2 / 7) ** 0.5, rtol=0.2)


# The trace


def test_trace_of_correlated_data_forwards_and_backwards():
    """Of N(0, S), the truth; in 16 dimensions the derivatives go backwards, in 8 forwards."""
    factor, cov, denoise = correlated(VP)
    x = jax.random.normal(jax.random.key(4), (50, 8)) @ factor.T
    law = lambda x: jax.scipy.stats.multivariate_normal.logpdf(x, jnp.zeros(8), cov)
    truth = jax.vmap(law)(x)
    found = jd.log_likelihood(VP, denoise, x, t0=1e-4)
    # The data are broad: neither cut-off nor prior is seen.
    np.testing.assert_allclose(found.value, truth, atol=0.05)

    def pair(z, t):
        halves = [denoise(half, t).mean for half in jnp.split(z, 2, axis=-1)]
        return jd.Denoised(jnp.concatenate(halves, axis=-1))

    twice = jd.log_likelihood(
        VP, jax.tree_util.Partial(pair), jnp.concatenate([x, x[::-1]], axis=-1), t0=1e-4
    )
    np.testing.assert_allclose(twice.value, found.value + found.value[::-1], atol=2e-3)


@pytest.mark.parametrize("kind", ["mlp", "unet"])
def test_divergence_is_the_trace_of_the_jacobian(kind):
    """Of networks, against jacrev of one example at a time: 16 dimensions, and 64 in an image."""
    if kind == "mlp":
        net, shape = networks.MLP(width=16, depth=2), (16,)
    else:
        net, shape = networks.UNet(width=8, multipliers=(1,), blocks=1, attention=()), (8, 8, 1)
    x = jax.random.normal(KEY, (2, *shape))
    params = jax.jit(net.init)(jax.random.key(1), x, jnp.zeros(2))
    params = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(KEY, a.shape), params)
    denoise = jd.NetDenoiser(params, VP, net.apply, jd.epsilon())
    t = jnp.float32(0.3)

    def field(x):
        return jax.vmap(lambda x, x0: VP.velocity(x, x0, t))(x, denoise(x, t).mean), None

    # Of convolutions, the transposes are slower on a CPU.
    assert trace._backwards(field, x) == (kind == "mlp" or jax.default_backend() != "cpu")
    assert not trace._backwards(lambda x: (jnp.tanh(x), None), jnp.zeros((2, 8)))

    size, one = x[0].size, lambda row: field(row[None])[0][0]
    jacobian = jax.jit(lambda row: jax.jacrev(one)(row).reshape(size, size))
    truth = [jnp.trace(jacobian(row)) for row in x]
    _, found, _ = jax.jit(lambda x: trace.quadratic_forms(field, x, None))(x)
    np.testing.assert_allclose(found[:, 0], truth, rtol=1e-4)


# The solver


@pytest.mark.parametrize("name", ["linear_beta", "exploding", "straight"])
def test_solver_error_is_an_estimate_from_above(name):
    """Against a solve at 1e-9 in float64: it holds for 97 %, and is no hundred times the error.

    Most of it is the volume's under VP, and the state's under VE, whose scales go far apart. It is
    of leading order, which begins to show at 1e-4.
    """
    process = jd.Gaussian(SCHEDULES[name])
    with jax.enable_x64(True):
        x = jnp.asarray(GMM5.sample(jax.random.key(7), 200), jnp.float64)
        denoise = GMM5.denoiser(process)
        truth = jd.log_likelihood(process, denoise, x, controller=adaptive(1e-9)).value
        means = []
        for tolerance in (1e-4, 1e-5, 1e-7):
            found = jd.log_likelihood(process, denoise, x, controller=adaptive(tolerance))
            error = np.abs(np.asarray(found.value - truth))
            least = 0.95 if name == "straight" and tolerance > 1e-5 else 0.97
            assert np.mean(error <= found.solver_error) >= least
            means.append(float(jnp.mean(found.solver_error)))
            assert means[-1] < 100 * error.mean()
        assert means[2] < 0.1 * means[1] < means[0]


def test_solver_error_has_a_floor_in_float32():
    """No tolerance undercuts rounding."""
    x = GMM5.sample(jax.random.key(7), 100)
    found = jd.log_likelihood(VP, GMM5.denoiser(VP), x, controller=adaptive(1e-6))
    assert float(jnp.min(found.solver_error)) > 1e-6
    fixed = jd.log_likelihood(
        VP, GMM5.denoiser(VP), x, controller=diffrax.StepTo(jnp.linspace(1e-5, 1.0, 101))
    )
    assert bool(jnp.all(jnp.isnan(fixed.solver_error)))
    assert bool(jnp.all(fixed.converged))


def test_calls_are_those_of_the_solver():
    calls = []

    def denoise(x, t):
        jax.debug.callback(lambda _: calls.append(None), t)
        return GaussianData(VP, 0.0, 0.5)(x, t)

    model = jax.tree_util.Partial(denoise)
    found = jd.log_likelihood(VP, model, jnp.ones((3, 2)), controller=adaptive(1e-3))
    jax.block_until_ready(found)
    jax.effects_barrier()
    np.testing.assert_array_equal(found.num_evaluations, len(calls))


def test_the_tolerance_is_one_of_nats_per_dimension():
    """Independent coordinates have the same error each: as many calls at any size."""
    denoise, calls = GaussianData(VP, 0.0, 0.5), np.zeros(2)
    for tolerance, value in itertools.product((1e-4, 1e-5, 1e-6), (0.6, -0.2)):
        few, many = (
            jd.log_likelihood(VP, denoise, jnp.full((1, d), value), controller=adaptive(tolerance))
            for d in (2, 64)
        )
        np.testing.assert_allclose(many.value / 64, few.value / 2, atol=min(tolerance, 1e-5))
        # Of several solves, since rounding may add a step to one of them.
        calls += few.num_evaluations[0], many.num_evaluations[0]
    assert abs(calls[1] / calls[0] - 1) < 0.05, calls


def test_steps_of_its_own_make_an_example_independent():
    x, denoise = GMM5.sample(jax.random.key(7), 12), GMM5.denoiser(VP)
    options = {"per_example": True, "controller": adaptive(1e-4), "probes": 2}
    keys = jax.random.split(KEY, 12)
    whole = jd.log_likelihood(VP, denoise, x, key=keys, **options)
    # The same program, since two programs round differently, and a step's fate may hang on that.
    others = GMM5.sample(jax.random.key(9), 12).at[3:6].set(x[3:6])
    among = jd.log_likelihood(VP, denoise, others, key=keys, **options)
    np.testing.assert_array_equal(whole.value[3:6], among.value[3:6])
    np.testing.assert_array_equal(whole.num_evaluations[3:6], among.num_evaluations[3:6])
    assert not np.any(whole.value[6:] == among.value[6:])
    assert len(np.unique(whole.num_evaluations)) > 2
    shared = jd.log_likelihood(VP, denoise, x, key=keys, controller=adaptive(1e-4), probes=2)
    np.testing.assert_allclose(whole.value, shared.value, atol=0.02)


@pytest.mark.parametrize("per_example", [True, False])
def test_what_is_not_finite_is_flagged_and_spoils_no_other(per_example):
    x = GMM5.sample(jax.random.key(7), 6).at[2, 0].set(jnp.nan)
    found = jd.log_likelihood(VP, GMM5.denoiser(VP), x, per_example=per_example)
    np.testing.assert_array_equal(found.converged, np.arange(6) != 2)
    np.testing.assert_array_equal(np.isnan(found.value), np.arange(6) == 2)


def test_what_does_not_converge_is_flagged():
    """A denoiser that is rough for one example alone."""

    def denoise(x, t):
        rough = jnp.where(x[:, :1] > 50.0, jnp.sin(1e5 * t), 0.0)
        return jd.Denoised(0.5 * x + 100.0 * rough)

    x = jnp.array([[0.1, 0.2], [100.0, 0.0], [0.3, -0.2]])
    model = jax.tree_util.Partial(denoise)
    own = jd.log_likelihood(VP, model, x, per_example=True, max_steps=60)
    np.testing.assert_array_equal(own.converged, [True, False, True])
    assert np.isfinite(own.value[0])
    assert np.isnan(own.value[1])
    shared = jd.log_likelihood(VP, model, x, max_steps=60)
    assert not shared.converged.any()


def test_prior_mean_mends_an_exploding_process():
    """N(3, 0.5²) under σ_max = 10: without its mean the prior is off by 9/(2·100) a dimension."""
    schedule = jd.exploding(0.01, 10.0)
    x = 3.0 + 0.5 * jax.random.normal(KEY, (500, 2))
    truth = jax.scipy.stats.norm.logpdf(x, 3.0, 0.5).sum(-1)

    def error(process):
        found = jd.log_likelihood(process, GaussianData(process, 3.0, 0.5), x)
        return float(jnp.mean(found.value - truth)) / 2

    # A prior N(0, σ²) for N(3, σ² + 0.25) costs 9/(2σ²), and the variance σ⁻⁴/64 beside.
    assert abs(error(jd.Gaussian(schedule)) + 0.045) < 2e-3
    assert abs(error(jd.Gaussian(schedule, prior_mean=3.0))) < 2e-3
    drawn = jd.Gaussian(schedule, prior_mean=jnp.array([3.0, -1.0])).prior((4, 2))
    np.testing.assert_allclose(drawn.mean, [[3.0, -1.0]] * 4)


def test_one_probe_of_one_dimension_is_the_trace():
    """A whole set of one: exact, so with no standard error, where otherwise one probe has none."""
    denoise = GaussianData(VP, 0.7, 0.3)
    x = 0.7 + 0.3 * jax.random.normal(KEY, (5, 1))
    found = jd.log_likelihood(VP, denoise, x, key=KEY, probes=1)
    np.testing.assert_array_equal(found.stderr, 0.0)
    np.testing.assert_allclose(found.value, jd.log_likelihood(VP, denoise, x).value, rtol=1e-5)


def test_an_example_takes_its_own_condition_along():
    x, label = GMM5.sample(jax.random.key(7), 4), jnp.array([0.0, 1.0, 2.0, 3.0])

    def apply(params, x, level, label):
        return label[:, None] * x / (1.0 + jnp.exp(level))[:, None]

    def solve(part, **options):
        denoise = jd.NetDenoiser({}, VP, apply, jd.x0(), {"label": label[part]})
        return jd.log_likelihood(VP, denoise, x[part], t0=1e-2, **options)

    whole = solve(slice(None), per_example=True).value
    for i in range(4):
        alone = solve(slice(i, i + 1)).value
        np.testing.assert_allclose(whole[i : i + 1], alone, rtol=1e-4, atol=1e-4)


# Over a mesh


@pytest.mark.devices(4)
def test_shards_solve_for_themselves():
    """Nothing is communicated, and with steps of its own an example is what it is alone."""
    mesh, denoise = data_mesh(), GMM5.denoiser(VP)
    x, keys = GMM5.sample(jax.random.key(7), 8), jax.random.split(KEY, 8)

    def found(denoise, keys, x):
        options = {"probes": 2, "controller": adaptive(1e-4), "per_example": True}
        return jd.log_likelihood(VP, denoise, x, key=keys, **options)

    sharded = per_shard(found, mesh)(denoise, keys, x)
    # To the tolerance: programs round differently, and a step's fate may hang on that.
    np.testing.assert_allclose(sharded.value, found(denoise, keys, x).value, atol=0.02)
    among = per_shard(found, mesh)(denoise, keys, x.at[2:].set(0.5))
    np.testing.assert_array_equal(sharded.value[:2], among.value[:2])
    np.testing.assert_array_equal(sharded.num_evaluations[:2], among.num_evaluations[:2])
    assert len(sharded.value.sharding.device_set) == 4

    def shared(denoise, keys, x):
        return jd.log_likelihood(VP, denoise, x, key=keys, probes=2)

    program = jax.jit(per_shard(shared, mesh)).lower(denoise, keys, x).compile().as_text()
    names = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
    assert "while" in program
    assert not [name for name in names if name in program]
    with pytest.raises(ValueError, match="multiple of 4"):
        per_shard(found, mesh)(denoise, keys[:6], x[:6])


# Bounds


def test_importance_weights_tighten_the_bound():
    """x = u + N(0, 1), u ~ N(0, 1), q = N(0, 1): log p(x) = log N(x; 0, 2)."""
    x = jnp.array([0.0, 1.0, -2.0])
    truth = jax.scipy.stats.norm.logpdf(x, 0.0, 2.0**0.5)
    u = jax.random.normal(KEY, (4000, 64, 3))
    log_weights = jax.scipy.stats.norm.logpdf(x[None, None] - u)
    gaps = []
    for count in (1, 8, 64):
        bound = jax.vmap(likelihood.importance_weighted)(log_weights[:, :count]).mean(0)
        gaps.append(truth - bound)
    assert np.all(gaps[0] > gaps[1])
    assert np.all(gaps[1] > gaps[2])
    np.testing.assert_allclose(gaps[0], truth - log_weights[:, 0].mean(0), rtol=1e-5)
    np.testing.assert_allclose(gaps[2], 0.0, atol=0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, d: jd.log_likelihood(VP, d, x, t0=1.0), "t0"),
        (lambda x, d: jd.log_likelihood(VP, d, x, t0=0.0), "t0"),
        (lambda x, d: jd.log_likelihood(VP, d, x[:0]), "x must hold one example"),
        (lambda x, d: jd.log_likelihood(VP, d, x, max_steps=0), "max_steps"),
        (lambda x, d: likelihood.importance_weighted(x[:0]), "log_weights"),
        (lambda x, d: jd.log_likelihood(VP, d, x, probes=0, key=KEY), "probes"),
        (lambda x, d: jd.log_likelihood(VP, d, x, probes=3, key=KEY), "probes must be at most 2"),
        (lambda x, d: jd.log_likelihood(VP, d, x, probes=1), "key"),
        (lambda x, d: jd.log_likelihood(VP, d, x, solver=diffrax.Kvaerno5()), "solver"),
    ],
)
def test_bad_arguments_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((2, 2)), GMM5.denoiser(VP))


def test_wrong_types_are_refused_by_name():
    """By the library itself, in an interpreter without the suite's type checks."""
    code = """
import jax, jaxdiff as jd

vp, cld = jd.Gaussian(jd.linear_beta()), jd.cld()
x, key = jax.numpy.zeros((2, 2)), jax.random.key(0)
for call in (
    lambda: jd.log_likelihood(vp, None, x, probes=2.0, key=key),
    lambda: jd.joint_bound(vp, None, key, x),
    lambda: jd.weightings.likelihood(cld, jax.numpy.ones(())),
    lambda: jd.latents.slerp(x, x, [0.0, 2.0]),
):
    try:
        call()
    except ValueError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    messages = run.stdout.splitlines()
    assert len(messages) == 4
    starts = ("probes must be", "process must augment", "the likelihood's weight", "weights must")
    for message, start in zip(messages, starts, strict=True):
        assert message.startswith(start), message
