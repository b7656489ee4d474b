"""Latents: exact for Gaussian data, white for all data, and the same for every exact model."""

import math
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import GMM5, SCHEDULES, GaussianData
from scipy import stats

import jaxdiff as jd
from jaxdiff import latents
from jaxdiff.processes.base import Denoised
from jaxdiff.schedules import learned_gamma
from jaxdiff.solve import adaptive

KEY = jax.random.key(0)
VP = jd.Gaussian(jd.linear_beta())
PROCESSES = {
    "VP": VP,
    "sub-VP": jd.Gaussian(SCHEDULES["subvp"]),
    "VE": jd.Gaussian(SCHEDULES["exploding"]),
    "EDM": jd.Gaussian(SCHEDULES["edm"]),
    "flow": jd.Gaussian(SCHEDULES["straight"]),
    "learned": jd.Gaussian(learned_gamma(-13.0, 9.0, hidden=8)),
}
every_process = pytest.mark.parametrize("name", PROCESSES)


def normals(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), float)


# Encoding and decoding


def of_prior(z, process):
    """Whether mean and covariance of latents are those of the prior, within 3 s.e. or so."""
    noise = np.asarray(z / process.schedule(jnp.ones(()))[1], np.float64)
    mean, cov = noise.mean(0), np.cov(noise.T)
    stderr = np.sqrt((1.0 + np.eye(2)) / len(noise))
    return (
        np.abs(mean).max() < 3 / math.sqrt(len(noise))
        and (np.abs(cov - np.eye(2)) < 3 * stderr).all()
    )


@every_process
def test_latents_are_the_priors_and_return(name):
    """B15: back within 5e-3 at tolerance 1e-5, and mean and covariance within 3 s.e."""
    process = PROCESSES[name]
    denoise, x = GMM5.denoiser(process), GMM5.sample(jax.random.key(7), 2000)
    z = latents.encode(process, denoise, x)
    assert of_prior(z, process)
    assert jnp.abs(latents.decode(process, denoise, z) - x).max() <= 5e-3


def test_what_the_moments_of_latents_catch():
    """Data placed too late, a wrong prior, and a flow that runs the wrong way."""
    denoise, x = GMM5.denoiser(VP), GMM5.sample(jax.random.key(7), 2000)
    assert not of_prior(latents.encode(VP, denoise, x, t0=0.05), VP)
    assert not of_prior(0.9 * latents.encode(VP, denoise, x), VP)
    assert not of_prior(latents.decode(VP, denoise, x), VP)


@every_process
def test_gaussian_data_are_carried_linearly(name):
    """z − α₁m = s₁/s₀ (x − α₀m) with s² = α² std² + σ², in both directions."""
    process, x = PROCESSES[name], 0.7 + 0.3 * normals((50, 3))
    denoise = GaussianData(process, 0.7, 0.3)

    def place(t):
        alpha, sigma = process.schedule(jnp.float32(t))
        return 0.7 * alpha, jnp.sqrt((0.3 * alpha) ** 2 + sigma**2)

    (mean0, std0), (mean1, std1) = place(1e-5), place(1.0)
    expected = mean1 + std1 / std0 * (x - mean0)
    z = latents.encode(process, denoise, x)
    np.testing.assert_allclose(z / std1, expected / std1, atol=1e-3)
    np.testing.assert_allclose(latents.decode(process, denoise, expected), x, atol=1e-3)
    # At other times, too.
    (mean0, std0), (mean1, std1) = place(0.1), place(0.6)
    z = latents.encode(process, denoise, x, t0=0.1, t1=0.6)
    expected = mean1 + std1 / std0 * (x - mean0)
    np.testing.assert_allclose(z / std1, expected / std1, atol=1e-3)
    back = latents.decode(process, denoise, expected, t0=0.1, t1=0.6)
    np.testing.assert_allclose(back, x, atol=1e-3)


def test_round_trip_is_the_solvers_error_alone():
    """Each example's own, worst and rms, also of a wrong model; a coarse solver loses more."""
    x, denoise = GMM5.sample(jax.random.key(7), 2000), GMM5.denoiser(VP)
    error = latents.round_trip(VP, denoise, x)
    back = latents.decode(VP, denoise, latents.encode(VP, denoise, x))
    np.testing.assert_allclose(error.max, jnp.abs(back - x).max(axis=1), atol=1e-6)
    expected = jnp.sqrt(((back - x) ** 2).mean(axis=1))
    np.testing.assert_allclose(error.rms, expected, atol=1e-6)
    wrong = GaussianData(VP, 0.7, 0.3)
    fine, coarse = (
        latents.round_trip(VP, wrong, x[:50], controller=adaptive(tolerance))
        for tolerance in (1e-5, 1e-2)
    )
    assert fine.max.max() <= 5e-3
    assert coarse.rms.mean() > 10 * fine.rms.mean()


def test_round_trip_in_double_precision():
    """The error is the tolerance's, not the arithmetic's."""
    with jax.enable_x64(True):
        x = normals((20, 2))
        process = jd.Gaussian(jd.linear_beta())
        denoise = GaussianData(process, 0.7, 0.3)
        error = latents.round_trip(process, denoise, x, controller=adaptive(1e-9))
        assert error.max.dtype == jnp.float64
        assert error.max.max() < 1e-6


def test_options_are_those_of_the_flow():
    x, denoise = 0.7 + 0.3 * normals((6, 3)), GaussianData(VP, 0.7, 0.3)
    flow = latents.encode(
        VP, denoise, x, evaluations=True, per_example=True, solver=diffrax.Bosh3()
    )
    assert flow.num_evaluations.shape == (6,)
    np.testing.assert_allclose(flow.x, latents.encode(VP, denoise, x), atol=2e-3)


# Arcs


def shoemake(a, b, w):
    """The usual formula, in double precision, for vectors of one length."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    angle = np.arccos((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
    return (np.sin((1 - w) * angle) * a + np.sin(w * angle) * b) / np.sin(angle)


WEIGHTS = jnp.array([0.0, 0.2, 0.5, 0.9, 1.0])


def test_arcs_are_shoemakes_for_equal_lengths():
    a, b = normals((2, 6, 4, 3))
    b = b * (jnp.linalg.norm(a, axis=(1, 2)) / jnp.linalg.norm(b, axis=(1, 2)))[:, None, None]
    found = latents.slerp(a, b, WEIGHTS)
    assert found.shape == (5, 6, 4, 3)
    for w, states in zip(np.asarray(WEIGHTS, np.float64), found, strict=True):
        for u, v, state in zip(a, b, states, strict=True):
            np.testing.assert_allclose(state, shoemake(u, v, w), atol=3e-6)


def test_lengths_and_angles_change_evenly():
    a, b = normals((2, 6, 8)) * jnp.array([1.0, 3.0])[:, None, None]
    norm = lambda x: jnp.linalg.norm(x, axis=-1)
    found = latents.slerp(a, b, WEIGHTS)
    w = WEIGHTS[:, None]
    np.testing.assert_allclose(norm(found), (1 - w) * norm(a)[None] + w * norm(b)[None], rtol=1e-5)
    cosine = lambda x, y: jnp.sum(x * y, axis=-1) / norm(x) / norm(y)
    whole = jnp.arccos(cosine(a, b))
    np.testing.assert_allclose(cosine(found, a[None]), jnp.cos(w * whole[None]), atol=1e-5)
    np.testing.assert_allclose(found[0], a, atol=1e-5)
    np.testing.assert_allclose(found[-1], b, atol=1e-5)
    # Half and half of the two halves is all of it; and the unit of the vectors does not matter.
    half = latents.slerp(a, found[2], jnp.array([0.4]))[0]
    np.testing.assert_allclose(half, found[1], atol=1e-5)
    np.testing.assert_allclose(latents.slerp(50.0 * a, 50.0 * b, WEIGHTS), 50.0 * found, rtol=1e-4)


@pytest.mark.parametrize("tilt", [0.0, 1e-8, 1e-6, 1e-3])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_arcs_between_parallel_vectors(sign, tilt):
    """Along the vector, or by a half turn: finite, of the right length, evenly paced."""
    a = normals((5, 7))
    b = 2.0 * sign * (a + tilt * normals((5, 7), seed=1))
    found = np.asarray(latents.slerp(a, b, WEIGHTS), np.float64)
    lengths = np.linalg.norm(found, axis=-1)
    w, first = np.asarray(WEIGHTS)[:, None], np.asarray(a, np.float64)
    start = np.linalg.norm(first, axis=-1)[None]
    np.testing.assert_allclose(lengths, (1 + w) * start, rtol=1e-3 if tilt else 1e-5)
    cosine = (found * first).sum(-1) / lengths / start
    expected = np.cos(w * np.pi) if sign < 0 else np.ones_like(w)
    np.testing.assert_allclose(cosine, np.broadcast_to(expected, cosine.shape), atol=5e-3)
    np.testing.assert_allclose(found[-1], b, atol=1e-5)
    assert np.isfinite(found).all()


def test_a_half_turn_along_an_axis_keeps_its_length():
    """Here nothing at all is left of b beside a, not even a rounding error."""
    a = jnp.eye(3)[:2]
    found = latents.slerp(a, -2.0 * a, jnp.array([0.5]))[0]
    np.testing.assert_allclose(jnp.linalg.norm(found, axis=-1), 1.5, rtol=1e-6)
    np.testing.assert_allclose(jnp.sum(found * a, axis=-1), 0.0, atol=1e-6)


def inside_shell(x, dim):
    """The share of vectors whose length lies between the 1st and the 99th percentile."""
    low, high = stats.chi2.ppf([0.01, 0.99], dim)
    square = (np.asarray(x, np.float64).reshape(*x.shape[:2], -1) ** 2).sum(-1)
    return float(((low <= square) & (square <= high)).mean(1).min())


def test_arcs_keep_to_the_shell_and_chords_do_not():
    """B17, for 64-dimensional latents of data."""
    denoise = GaussianData(VP, 0.2, 0.5)
    x = 0.2 + 0.5 * normals((2, 300, 64))
    a, b = (latents.encode(VP, denoise, x, controller=adaptive(1e-4)) for x in x)
    weights = jnp.linspace(0.0, 1.0, 9)
    arcs = latents.slerp(a, b, weights)
    assert inside_shell(arcs, 64) > 0.95
    chords = a[None] + weights[:, None, None] * (b - a)[None]
    assert inside_shell(chords, 64) < 0.2
    assert inside_shell(1.3 * arcs, 64) < 0.2


def test_interpolants_are_data():
    """B17: from the one to the other, by jumps from mode to mode."""
    x_a = GMM5.sample(jax.random.key(7), 2000)
    x_b, weights = x_a[::-1], jnp.linspace(0.0, 1.0, 5)
    path = latents.interpolate(VP, GMM5.denoiser(VP), x_a, x_b, weights)
    assert path.shape == (5, 2000, 2)
    np.testing.assert_allclose(path[0], x_a, atol=5e-3)
    np.testing.assert_allclose(path[-1], x_b, atol=5e-3)
    far = lambda y: (
        jnp.min(jnp.linalg.norm(y.reshape(-1, 1, 2) - GMM5.means[None], axis=-1), axis=1)
        > 3.03 * 0.2
    )
    # 1 % of the data themselves are as far from their mode.
    assert jnp.mean(far(path)) < 0.04
    assert jnp.mean(far(0.5 * x_a + 0.5 * x_b)) > 0.3


def test_arcs_go_round_the_priors_mean():
    """A prior N(3, 2²): its centre and scale are undone first. The flow of N(0, I) stands still."""

    class Elsewhere(jd.Gaussian):
        def prior(self, shape):
            return jd.Normal(jnp.full(shape, 3.0), jnp.float32(2.0))

    a, b = normals((2, 50, 3))
    denoise = GaussianData(VP, 0.0, 1.0)
    path = latents.interpolate(Elsewhere(VP.schedule), denoise, a, b, WEIGHTS)
    expected = 3.0 + 2.0 * latents.slerp((a - 3.0) / 2.0, (b - 3.0) / 2.0, WEIGHTS)
    np.testing.assert_allclose(path, expected, atol=1e-3)


def test_a_condition_goes_with_its_pair():
    def apply(params, x, level, label):
        return params * x + label[:, None]

    denoise = jd.NetDenoiser(jnp.float32(0.3), VP, apply, jd.x0(), {"label": jnp.arange(4.0)})
    a, b = normals((2, 4, 2))
    options = {"controller": adaptive(1e-4), "t0": 0.01}
    path = latents.interpolate(VP, denoise, a, b, WEIGHTS, **options)
    np.testing.assert_allclose(path[-1], b, atol=1e-2)


# Typicality


@pytest.mark.parametrize("shape", [(8, 8, 1), (5, 7, 3), (2,), (33,)], ids=str)
@pytest.mark.parametrize("name", ["VP", "EDM"])
def test_p_values_of_draws_are_uniform(name, shape):
    process = PROCESSES[name]
    z = process.prior((3000, *shape)).sample(jax.random.key(1))
    found = latents.typicality(process, z)
    assert found.correlation.shape == (3000, sum(side > 1 for side in shape))
    for p in (found.radius_p_value, *found.correlation_p_value.T):
        assert stats.kstest(p, "uniform").pvalue > 0.01
    np.testing.assert_allclose(found.radius.mean(), 1.0, atol=0.15)


def test_p_values_of_batches_are_uniform():
    z = normals((4000, 5, 3, 2))
    found = [latents.typicality(VP, batch, pooled=True) for batch in z.reshape(400, 10, 5, 3, 2)]
    assert found[0].radius.shape == (1,)
    assert found[0].correlation.shape == (1, 3)
    for p in (
        [batch.radius_p_value[0] for batch in found],
        *np.concatenate([batch.correlation_p_value for batch in found]).T,
    ):
        assert stats.kstest(p, "uniform").pvalue > 0.01


def test_typicality_is_what_it_says():
    """Radius, log-density and the correlation of neighbours, by their definitions."""
    process = PROCESSES["VE"]
    z = process.prior((6, 4, 5, 2)).sample(jax.random.key(3))
    found = latents.typicality(process, z)
    noise = np.asarray(z, np.float64) / 50.0
    np.testing.assert_allclose(found.radius, np.sqrt((noise**2).mean((1, 2, 3))), rtol=1e-5)
    log_prob = np.asarray(jax.vmap(process.prior((4, 5, 2)).log_prob)(z))
    offset = found.log_density - log_prob
    np.testing.assert_allclose(offset, offset[0], atol=2e-3)
    entropy = 20 * math.log(2 * math.pi * math.e * 50.0**2)
    np.testing.assert_allclose(offset, entropy, atol=2e-2)
    pairs = {  # of the second axis, 0–1 and 2–3, its last left over
        0: (noise[:, ::2], noise[:, 1::2]),
        1: (noise[:, :, [0, 2]], noise[:, :, [1, 3]]),
        2: (noise[..., 0], noise[..., 1]),
    }
    for axis, (u, v) in pairs.items():
        u, v = u.reshape(6, -1), v.reshape(6, -1)
        expected = 2 * (u * v).sum(1) / (u**2 + v**2).sum(1)
        np.testing.assert_allclose(found.correlation[:, axis], expected, atol=1e-5)


def test_latents_slightly_too_long_show_in_a_batch():
    """5 % in 64 dimensions: nothing in one latent, beyond doubt in 256."""
    z = 1.05 * VP.prior((256, 8, 8, 1)).sample(jax.random.key(5))
    each, batch = latents.typicality(VP, z), latents.typicality(VP, z, pooled=True)
    assert np.median(each.radius_p_value) > 0.1
    assert batch.radius_p_value[0] < 1e-9
    assert batch.radius[0] == pytest.approx(1.05, abs=0.02)
    assert batch.correlation_p_value.min() > 0.01


def test_a_smooth_or_checkered_latent_is_no_noise_whatever_its_radius():
    noise = np.asarray(normals((50, 9, 9, 1)))
    smooth = noise[:, :8, :8] + noise[:, 1:, :8] + noise[:, :8, 1:] + noise[:, 1:, 1:]
    smooth *= np.sqrt((noise[:, :8, :8] ** 2).sum((1, 2, 3)) / (smooth**2).sum((1, 2, 3)))[
        :, None, None, None
    ]
    rows = smooth * (1.0 - 2.0 * (np.arange(8) % 2))[None, :, None, None]
    for images, signs in ((smooth, (1, 1)), (rows, (-1, 1))):
        found = latents.typicality(VP, jnp.asarray(images))
        assert stats.kstest(found.radius_p_value, "uniform").pvalue > 0.01
        assert np.median(found.correlation_p_value) < 0.02
        np.testing.assert_array_equal(np.sign(found.correlation.mean(0)), signs)
        np.testing.assert_allclose(np.abs(found.correlation.mean(0)), 0.5, atol=0.06)
    assert latents.typicality(VP, jnp.zeros((1, 8, 8, 1))).radius_p_value[0] < 1e-9


# Identifiability


class Turning(NamedTuple):
    """Another flow of N(0, I) data with the same marginals, that turns the plane on its way.

    The exact flow stands still. dx/dt is linear in x̂_0 with the factor α' − α σ'/σ, so
    x̂_0 = α x + (angle / factor) J x turns by the angle; it is nobody's score.
    """

    angle: Any

    def __call__(self, x, t):
        one = jnp.ones_like(t)
        (alpha, sigma), (d_alpha, d_sigma) = jax.jvp(VP.schedule, (t,), (one,))
        rate = self.angle / (d_alpha - alpha * d_sigma / sigma)
        return Denoised(alpha * x + rate * jnp.stack([-x[:, 1], x[:, 0]], axis=1))


@pytest.mark.parametrize("angle", [0.0, math.pi / 3, math.pi / 2])
def test_identifiability_of_flows_in_closed_form(angle):
    """Latents turned against each other by an angle have its cosine as correlation."""
    x = normals((2000, 2))
    found = latents.identifiability(
        VP, GaussianData(VP, 0.0, 1.0), Turning(jnp.float32(angle)), x, key=KEY, t0=1e-3
    )
    assert float(found.correlation) == pytest.approx(math.cos(angle), abs=0.03)
    assert found.per_coordinate.shape == (2,)
    assert abs(float(found.shuffled)) < 0.06


def test_one_model_in_two_guises_is_one():
    """A mixture's denoiser, and a network of its velocity: also for data in order."""
    denoise = GMM5.denoiser(VP)

    def apply(params, x, time):
        alpha, sigma = VP.schedule(time[0])
        y = x * jnp.sqrt(alpha**2 + sigma**2)
        noise = (y - alpha * denoise(y, time[0]).mean) / sigma
        return alpha * noise - sigma * denoise(y, time[0]).mean

    guise = jd.NetDenoiser({}, VP, apply, jd.v(noise_level=lambda _, t: t))
    x = GMM5.sample(jax.random.key(7), 2000)
    x = x[jnp.argsort(x[:, 0])]
    found = latents.identifiability(VP, denoise, guise, x, key=KEY)
    assert float(found.correlation) > 0.9999
    assert abs(float(found.shuffled)) < 0.1
    assert float(found.per_coordinate.min()) > 0.9999


EXACT = GaussianData(VP, 0.0, 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: latents.encode(VP, EXACT, x, t0=0.5, t1=0.5), "t0 < t1, got t0=0.5, t1=0.5"),
        (lambda x: latents.encode(VP, EXACT, x, t0=-0.1), "must lie in .0, 1., got -0.1"),
        (lambda x: latents.slerp(x, x[:, :1], WEIGHTS), r"one shape.*\(4, 2\) and \(4, 1\)"),
        (lambda x: latents.slerp(x[:, :1], x[:, :1], WEIGHTS), r"2 coordinates or more.*\(4, 1\)"),
        (lambda x: latents.slerp(x, x, 2.0 * WEIGHTS), r"weights must lie in \[0, 1\]"),
        (
            lambda x: latents.interpolate(VP, EXACT, x, x[:, :1], jnp.array([0.5])),
            "x_a and x_b must have one shape",
        ),
        (lambda x: latents.interpolate(VP, EXACT, x, x, jnp.array([0.0, 2.0])), "weights must lie"),
        (lambda x: latents.typicality(VP, x[:0]), r"z must hold latents, got shape \(0, 2\)"),
        (
            lambda x: latents.identifiability(VP, EXACT, EXACT, x[:2], key=KEY),
            "x must hold 3 examples or more, got 2",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((4, 2)))
