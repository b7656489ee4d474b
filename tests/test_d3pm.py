"""Discrete diffusion against enumeration: every matrix, posterior, bound and sample in closed form.

The matrices here are written out step by step, in float64, from the papers' β_t; the library knows
only ᾱ and tables. Data are two correlated positions of four classes, whose exact denoiser is Bayes'
rule over all sixteen pairs.
"""

import itertools
import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import jaxdiff as jd
from jaxdiff.distributions import Categorical
from jaxdiff.evaluation import evaluate
from jaxdiff.experiment import load_config
from jaxdiff.networks.transformer import Transformer
from jaxdiff.objectives.d3pm import categorical_bound, masked_cross_entropy
from jaxdiff.objectives.elbo import elbo
from jaxdiff.processes import d3pm
from jaxdiff.processes.base import Denoised, Process
from jaxdiff.processes.d3pm import D3PM, Logits

KEY = jax.random.key(0)
T = 12
DATA = 4  # classes that data take


def own_matrices():
    """Somebody's own chain: neither symmetric nor commuting, with zeros."""
    random = np.random.default_rng(0)
    drift = random.dirichlet(np.full(DATA, 0.5), (T, DATA))
    drift[:, 0, 2] = 0.0
    drift /= drift.sum(-1, keepdims=True)
    return 0.6 * np.eye(DATA) + 0.4 * drift


BETAS = np.linspace(0.05, 1.2, T)
KERNELS = {
    "uniform": d3pm.uniform(DATA),
    "absorbing": d3pm.absorbing(DATA + 1),
    "gaussian": d3pm.discretized_gaussian(DATA, BETAS),
    "own": d3pm.transitions(own_matrices()),
}
every_kernel = pytest.mark.parametrize("name", KERNELS)


def one_steps(name):
    """Q_1 … Q_T by the papers' formulas."""
    identity, steps = np.eye(DATA), np.arange(T + 1) / T
    if name == "uniform":
        level = np.cos(0.5 * np.pi * (steps + 0.008) / 1.008)
        betas = (1.0 - level[1:] / level[:-1])[:, None, None]
        return (1.0 - betas) * identity + betas / DATA
    if name == "absorbing":
        betas = 1.0 / (T - np.arange(1, T + 1) + 1.0)
        mask = np.eye(DATA + 1)[-1] * np.ones((DATA + 1, 1))
        return np.stack([(1.0 - beta) * np.eye(DATA + 1) + beta * mask for beta in betas])
    if name == "own":
        return own_matrices()
    matrices = []
    for beta in BETAS:
        total = sum(np.exp(-4.0 * n**2 / ((DATA - 1) ** 2 * beta)) for n in range(1 - DATA, DATA))
        q = np.zeros((DATA, DATA))
        for i, j in itertools.permutations(range(DATA), 2):
            q[i, j] = np.exp(-4.0 * (i - j) ** 2 / ((DATA - 1) ** 2 * beta)) / total
        matrices.append(q + np.diag(1.0 - q.sum(1)))
    return np.stack(matrices)


def between(name, i, j):
    """Q_{t|s} from step i to step j."""
    size = KERNELS[name].classes
    return np.linalg.multi_dot([np.eye(size), np.eye(size), *one_steps(name)[i:j]])


PAIRS = [(i, j) for j in range(1, T + 1) for i in range(j)]
S, U = (jnp.asarray([pair[k] / T for pair in PAIRS], jnp.float32) for k in (0, 1))


@every_kernel
def test_transitions_are_products_of_the_published_steps(name):
    """F6, F7: rows sum to 1, Q̄_t = ∏ Q, and any stride, from either side."""
    kernel = KERNELS[name]
    identity = jnp.eye(kernel.classes)
    forward = jax.jit(jax.vmap(lambda s, t: kernel.forward(identity, s, t)))(S, U)
    backward = jax.jit(jax.vmap(lambda s, t: kernel.backward(identity, s, t)))(S, U)
    expected = np.stack([between(name, i, j) for i, j in PAIRS])
    np.testing.assert_allclose(forward.sum(-1), 1.0, atol=1e-6)
    np.testing.assert_allclose(forward, expected, atol=1e-6)
    np.testing.assert_allclose(backward.swapaxes(1, 2), expected, atol=1e-6)
    assert np.all(forward >= 0.0)


@every_kernel
def test_tokens_are_drawn_from_the_marginal(name):
    """The noising of class indices has the law of the one-hot marginal."""
    process, t = D3PM(KERNELS[name]), jnp.float32(5 / T)
    tokens = jnp.tile(jnp.arange(DATA), 20_000)
    drawn = jax.jit(process.draw)(KEY, tokens, t)
    assert drawn.dtype == tokens.dtype
    counts = np.zeros((DATA, KERNELS[name].classes))
    np.add.at(counts, (np.asarray(tokens), np.asarray(drawn)), 1.0 / 20_000)
    exact = jax.vmap(lambda k: process.marginal(process.one_hot(k), t).probs)(jnp.arange(DATA))
    np.testing.assert_allclose(counts, exact, atol=4 * 0.5 / 20_000**0.5)
    np.testing.assert_allclose(exact, between(name, 0, 5)[:DATA], atol=1e-6)


# The posterior


def beliefs(name, i, j):
    """Soft p(x_0 | x_t) [x_t, x_0] that x_t allows: a random prior by Bayes' rule; two one-hots."""
    size = KERNELS[name].classes
    likelihood = between(name, 0, j).T
    random = np.random.default_rng(j)
    prior = np.pad(random.dirichlet(np.ones(DATA), size), ((0, 0), (0, size - DATA)))
    laws = [prior * likelihood, *(np.eye(size)[[k] * size] * likelihood for k in range(DATA))]
    return np.stack([law / np.maximum(law.sum(-1, keepdims=True), 1e-300) for law in laws])


def predictive(name, belief, i, j):
    """Σ_{x_0} q(x_s | x_t, x_0) p(x_0 | x_t) by enumeration of x_t, x_0 and x_s."""
    to_s, to_t, step = between(name, 0, i), between(name, 0, j), between(name, i, j)
    joint = to_s[:, :, None] * step[None, :, :]  # x_0, x_s, x_t
    exact = joint / np.where(to_t > 0, to_t, 1.0)[:, None, :]
    return np.einsum("lki,isk->lks", belief, exact)


def posterior_error(process, name):
    """The largest error over all states, pairs of steps and beliefs."""

    @jax.jit
    def probs(belief, s, t):
        x = jnp.eye(process.kernel.classes)
        one = lambda belief: process.posterior(x, Denoised(belief), t, s).probs
        return jax.vmap(one)(belief)

    errors = []
    for i, j in [*PAIRS[::3], (T - 1, T), (0, T)]:
        belief = beliefs(name, i, j)
        possible = belief.sum(-1) > 0
        found = probs(jnp.asarray(belief, float), jnp.float32(i / T), jnp.float32(j / T))
        errors.append(np.abs(found - predictive(name, belief, i, j))[possible].max())
    return max(errors)


@every_kernel
def test_posterior_is_bayes_by_enumeration(name):
    """F6: every x_t, x_0 and x_s, also with a soft x_0, on every stride."""
    assert posterior_error(D3PM(KERNELS[name]), name) < 1e-6


class EquationFour(D3PM):
    """A mutant that takes p(x_0 | x_t) for the p̃ of the paper's eq. 4."""

    def posterior(self, x, x0, t, s):
        law = self.kernel.forward(x0.mean, 0.0 * s, s) * self.kernel.backward(x, s, t)
        return Categorical(law / jnp.maximum(law.sum(-1, keepdims=True), 1e-30))


class LateStep(D3PM):
    """A mutant whose step ends one too late."""

    def posterior(self, x, x0, t, s):
        return super().posterior(x, x0, t, jnp.minimum(s + 1.0 / T, t))


class WholeKeep(D3PM):
    """A mutant that steps by Q̄_t for Q_{t|s}."""

    def posterior(self, x, x0, t, s):
        likelihood = self.kernel.backward(x, 0.0 * t, t)
        weight = jnp.where(likelihood > 0, x0.mean / likelihood, 0.0)
        law = self.kernel.forward(weight, 0.0 * s, s) * likelihood
        return Categorical(law / jnp.maximum(law.sum(-1, keepdims=True), 1e-30))


@pytest.mark.parametrize("mutant", [EquationFour, LateStep, WholeKeep])
@pytest.mark.parametrize("name", ["absorbing", "own"])
def test_enumeration_catches_the_mutants(mutant, name):
    # Where a position is masked or certain, all x_0 are equally likely: there eq. 4 is no mistake.
    harmless = mutant is EquationFour and name == "absorbing"
    assert (posterior_error(mutant(KERNELS[name]), name) > 1e-2) != harmless


@every_kernel
def test_posterior_never_fails(name):
    """Beliefs that x_t rules out, ends of time, no time at all; and their gradients."""
    process = D3PM(KERNELS[name])
    size = process.kernel.classes
    x = jnp.eye(size)
    guesses = jnp.concatenate([x, jnp.maximum(x, 1e-25)])  # ruled out, or all but ruled out
    times = jnp.float32([0.0, 1e-6, 0.5, 1.0])
    s, t = (jnp.asarray(v) for v in zip(*itertools.combinations(times, 2), strict=True))

    def law(guess, x, s, t):
        return process.posterior(x, Denoised(guess), t, s).probs

    over_all = jax.vmap(jax.vmap(jax.vmap(law, (0, None, None, None)), (None, 0, None, None)))
    every = lambda guess: over_all(jnp.broadcast_to(guess, (6, *guess.shape)), x_all, s, t)
    x_all = jnp.broadcast_to(x, (6, *x.shape))
    found = jax.jit(every)(guesses)
    np.testing.assert_allclose(found.sum(-1), 1.0, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda guess: jnp.sum(every(guess) ** 2)))(guesses)
    assert jnp.all(jnp.isfinite(gradient))


# Known data


def pmf():
    """Two positions that agree more often than not; unequal classes."""
    table = np.outer([0.1, 0.2, 0.3, 0.4], [0.4, 0.1, 0.3, 0.2]) + 0.3 * np.eye(DATA)
    return table / table.sum()


class Exact(NamedTuple):
    """The denoiser of known data [position 1, position 2, …], by Bayes' rule over all of them."""

    process: D3PM
    pmf: jax.Array

    def others(self, x, t):
        """log p(x_0 of a position | x_t of the others), [b, positions, data classes]."""
        size = self.process.kernel.classes
        matrix = self.process.kernel.forward(jnp.eye(size), 0.0 * t, t)[:DATA]
        likelihood = x @ matrix.T
        count = self.pmf.ndim
        views = []
        for place in range(count):
            joint = jnp.broadcast_to(self.pmf, (x.shape[0], *self.pmf.shape))
            for other in set(range(count)) - {place}:
                shape = [x.shape[0]] + [DATA if k == other else 1 for k in range(count)]
                joint = joint * likelihood[:, other].reshape(shape)
            axes = tuple(1 + k for k in range(count) if k != place)
            views.append(joint.sum(axes))
        return jnp.stack(views, 1), likelihood

    def __call__(self, x, t):
        others, likelihood = self.others(x, t)
        law = others * likelihood
        law = law / law.sum(-1, keepdims=True)
        return Denoised(jnp.pad(law, ((0, 0), (0, 0), (0, x.shape[-1] - DATA))))


PAIR = jnp.asarray(pmf(), jnp.float32)
SINGLE = jnp.asarray([0.7, 0.2, 0.08, 0.02])


def divergence(x, law):
    """KL(sample ‖ data) of one-hot samples [n, positions, K], in nats."""
    index = np.asarray(jnp.argmax(x, -1))
    assert index.max() < DATA
    counts = np.zeros(law.shape)
    np.add.at(counts, tuple(index.T), 1.0 / len(index))
    return scipy.special.rel_entr(counts, np.asarray(law, np.float64)).sum()


def walker(process, law):
    """Ancestral sampling of known data on any number of steps, compiled once."""
    denoise, step = Exact(process, law), jd.Ancestral(process)
    shape = (law.ndim, process.kernel.classes)
    start = jax.vmap(process.prior(shape).sample)(jax.random.split(KEY, 20_000))

    @jax.jit
    def update(key, x, t, s):
        return step.update(jax.random.split(key, len(x)), x, None, t, s, denoise)[0]

    def walk(steps):
        x, grid = start, jnp.linspace(1.0, 0.0, steps + 1)
        for i, (t, s) in enumerate(itertools.pairwise(grid)):
            x = update(jax.random.fold_in(KEY, i), x, t, s)
        return x

    return walk


@every_kernel
def test_ancestral_sampling_gives_the_data(name):
    """F7: KL ≤ 0.02 nats; one position is exact on any stride, two only on fine ones."""
    process = D3PM(KERNELS[name])
    if name in ("gaussian", "own"):  # chains that have not quite forgotten their start
        at_one = np.asarray(SINGLE) @ between(name, 0, T)
        exact = d3pm.transitions(one_steps(name), at_one / at_one.sum())
        process = D3PM(exact)
    single = walker(process, SINGLE)
    for steps in (1, 2, 3, 5, T):
        assert divergence(single(steps), SINGLE) < 1e-3, steps


@pytest.mark.parametrize("name", ["uniform", "absorbing", "gaussian"])
def test_ancestral_sampling_gives_correlated_data(name):
    kernel = KERNELS[name]
    if name == "gaussian":
        kernel = d3pm.discretized_gaussian(DATA, np.linspace(0.01, 0.8, 60))
    walk = walker(D3PM(kernel), PAIR)
    fine = divergence(walk(60), PAIR)
    assert fine < 0.02, fine
    assert divergence(walk(1), PAIR) > 3 * fine  # positions drawn apart from each other
    coarse = divergence(walk(30), PAIR)
    assert coarse < 0.02, coarse


@pytest.mark.parametrize("mutant", [EquationFour, LateStep, WholeKeep])
def test_sampling_catches_the_mutants(mutant):
    walk = walker(mutant(KERNELS["uniform"]), SINGLE)
    assert divergence(walk(T), SINGLE) > 0.01  # ten times what the exact posterior is allowed


# Bounds and losses


def every_pair(count):
    """Class indices [count · 16, 2] of all pairs, and the weight of each."""
    tokens = jnp.stack(jnp.meshgrid(jnp.arange(DATA), jnp.arange(DATA), indexing="ij"), -1)
    tokens = jnp.tile(tokens.reshape(-1, 2), (count, 1))
    return tokens, jnp.tile(PAIR.reshape(-1), count) / count


@pytest.mark.parametrize("name", ["uniform", "absorbing", "gaussian"])
def test_bound_lies_below_the_likelihood_and_tends_to_it(name):
    """The gap of the bound closes as 1/T; it is never negative."""
    kernel = KERNELS[name]
    if name == "gaussian":
        kernel = d3pm.discretized_gaussian(DATA, np.linspace(0.01, 0.6, 128))
    process = D3PM(kernel)
    tokens, weight = every_pair(1000)
    x0 = process.one_hot(tokens)
    gaps = []
    for steps in (3, 64):
        found = elbo(process, Exact(process, PAIR), KEY, x0, jd.grids.uniform(steps))
        np.testing.assert_allclose(
            found.value, -(found.prior + found.diffusion + found.reconstruction), rtol=1e-5
        )
        excess = -found.value - found.prior + jnp.log(PAIR[tokens[:, 0], tokens[:, 1]])
        gap = float(jnp.sum(weight * excess))
        stderr = float(jnp.sqrt(jnp.sum((weight * (excess - gap)) ** 2)))
        assert gap > -3 * stderr
        gaps.append((gap, stderr))
    (coarse, _), (fine, stderr) = gaps
    assert fine < 0.4 * coarse + 3 * stderr, gaps
    assert coarse > 0.05, gaps


def apply(params, tokens, level):
    """The perfect network, plus whatever the parameters say."""
    process, t = params["process"], (level[0] + 5.0) / 10.0
    logits = jnp.log(Exact(process, PAIR).others(process.one_hot(tokens), t)[0])
    return logits + params["error"][None]


def perfect(params, tokens, level):
    """`apply` for a batch of times."""
    one = lambda tokens, level: apply(params, tokens[None], level[None])[0]
    return jax.vmap(one)(tokens, level)


def objective_of(kind, process, steps=T):
    grid = jd.grids.uniform(steps)
    if kind == "bound":
        return categorical_bound(perfect, process, Logits(), grid)
    if kind == "hybrid":
        return categorical_bound(perfect, process, Logits(), grid, cross_entropy=0.1)
    return masked_cross_entropy(perfect, process, Logits())


@every_kernel
def test_perfect_logits_are_the_exact_denoiser(name):
    """`Logits` puts the noisy value in by itself, through `NetDenoiser`."""
    process = D3PM(KERNELS[name])
    params = {"process": process, "error": jnp.zeros((2, DATA))}
    denoise = jd.NetDenoiser(params, process, perfect, Logits())
    tokens, _ = every_pair(20)
    for t in (1 / T, 5 / T, 1.0):
        keys = jax.random.split(KEY, len(tokens))
        noisy = jax.vmap(process.draw, (0, 0, None))(keys, tokens, jnp.float32(t))
        x = process.one_hot(noisy)
        expected = Exact(process, PAIR)(x, jnp.float32(t)).mean
        found = denoise(x, jnp.float32(t)).mean
        np.testing.assert_allclose(found, expected, atol=2e-6)
        if name == "absorbing":
            kept = np.asarray(noisy) < DATA
            np.testing.assert_array_equal(np.asarray(found)[kept], np.asarray(x)[kept])


@pytest.mark.parametrize(
    ("kind", "name"),
    [("bound", "own"), ("bound", "gaussian"), ("hybrid", "uniform"), ("masked", "absorbing")],
)
def test_exact_denoiser_minimises_every_loss(kind, name):
    """At the exact logits the mean gradient is 0 within its error, and all ways lead up."""
    process = D3PM(KERNELS[name])
    objective = objective_of(kind, process)
    tokens, weight = every_pair(600)

    @jax.jit
    def loss(error, key=KEY):
        params = {"process": process, "error": error}
        return objective(params, key, {"x": tokens})[0] * weight * len(weight)

    exact = jnp.zeros((2, DATA))
    gradient = np.asarray(jax.jit(jax.jacfwd(loss))(exact)).reshape(len(tokens), -1)
    stderr = gradient.std(0) / len(tokens) ** 0.5
    assert np.all(np.abs(gradient.mean(0)) < 4.5 * stderr + 1e-6), gradient.mean(0) / stderr
    for seed in range(3):
        away = jax.random.normal(jax.random.key(seed), exact.shape)
        rise = np.asarray(loss(away) - loss(exact))
        assert rise.mean() > 4 * rise.std() / len(tokens) ** 0.5


@pytest.mark.parametrize("name", ["uniform", "own"])
def test_loss_is_the_bound_of_one_drawn_step(name):
    """Its mean is that of `elbo`, which sums all steps."""
    process = D3PM(KERNELS[name])
    params = {"process": process, "error": jnp.asarray([[0.5, 0, -0.5, 0], [0, 1.0, 0, 0]])}
    tokens, _ = every_pair(2000)
    loss, metrics = jax.jit(objective_of("bound", process))(params, KEY, {"x": tokens})
    denoise = jd.NetDenoiser(params, process, perfect, Logits())
    exact = elbo(process, denoise, jax.random.key(1), process.one_hot(tokens), jd.grids.uniform(T))
    stderr = np.hypot(loss.std(), exact.value.std()) / len(loss) ** 0.5
    assert abs(float(loss.mean() + exact.value.mean())) < 4 * stderr
    np.testing.assert_allclose(metrics["prior"], exact.prior, rtol=1e-4, atol=1e-5)


def blind(params, tokens, level):
    """A network that sees neither tokens nor time."""
    return jnp.broadcast_to(params, (len(tokens), *params.shape))


def test_masked_losses_of_a_blind_network_are_its_cross_entropy():
    """Each token is unmasked exactly once, whatever the schedule, the steps or the limit."""
    logits = jnp.asarray([[0.0, 1.0, -1.0, 0.5, 9.0], [2.0, 0.0, 0.0, -1.0, 9.0]])
    tokens, _ = every_pair(4000)
    log_probs = jax.nn.log_softmax(logits[:, :DATA])  # the mask's logit counts for nothing
    expected = -float(jnp.mean(log_probs[0, tokens[:, 0]] + log_probs[1, tokens[:, 1]]))
    for keep in (d3pm.linear, d3pm.cosine, lambda t: (1.0 - t) ** 2):
        process = D3PM(d3pm.absorbing(DATA + 1, keep))
        for objective in (
            categorical_bound(blind, process, Logits(), jd.grids.uniform(7)),
            masked_cross_entropy(blind, process, Logits()),
        ):
            loss, _ = jax.jit(objective)(logits, KEY, {"x": tokens})
            assert abs(loss.mean() - expected) < 4 * loss.std() / len(loss) ** 0.5


def test_masked_loss_is_the_limit_of_the_bound():
    """T → ∞, for a network that is wrong and looks at what is not masked."""
    process = D3PM(KERNELS["absorbing"])
    params = {"process": process, "error": jnp.asarray([[0.5, 0, -0.5, 0], [0, 1.0, 0, 0]])}
    tokens, _ = every_pair(4000)

    def mean_and_stderr(objective):
        loss = jax.jit(objective)(params, KEY, {"x": tokens})[0]
        return float(loss.mean()), float(loss.std()) / len(loss) ** 0.5

    limit, error = mean_and_stderr(objective_of("masked", process))
    for steps, near in ((2, False), (500, True)):
        bound, stderr = mean_and_stderr(objective_of("bound", process, steps))
        assert (abs(bound - limit) < 4 * np.hypot(error, stderr)) == near


def test_long_sequences_keep_nothing_larger_than_the_logits():
    """Noising is O(batch × length); the loss a few times the logits, none of them [K, K]."""
    b, length, classes = 2, 64, 16_384
    tokens = jnp.zeros((b, length), jnp.int32)
    logits_bytes = 4 * b * length * classes
    for kernel in (d3pm.uniform(classes), d3pm.absorbing(classes)):
        noise = jax.jit(D3PM(kernel).draw).lower(KEY, tokens, jnp.float32(0.5))
        memory = noise.compile().memory_analysis()
        assert memory.temp_size_in_bytes < 64 * b * length

    def apply(params, tokens, level):
        return params["in"][tokens] @ params["out"]

    loss = masked_cross_entropy(apply, D3PM(kernel), Logits())
    params = {"in": jnp.zeros((classes, 4)), "out": jnp.zeros((4, classes))}
    mean = lambda params: loss(params, KEY, {"x": tokens})[0].mean()
    memory = jax.jit(mean).lower(params).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2.1 * logits_bytes
    memory = jax.jit(jax.grad(mean)).lower(params).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4.1 * logits_bytes


# The parts


def test_categorical_against_scipy():
    random = np.random.default_rng(0)
    p, q = random.dirichlet(np.ones(5), 3), random.dirichlet(np.ones(5), 3)
    p[0, :2] = 0.0
    p[0] /= p[0].sum()
    ours, other = Categorical(jnp.asarray(p, float)), Categorical(jnp.asarray(q, float))
    np.testing.assert_allclose(ours.kl(other), scipy.special.rel_entr(p, q).sum(), rtol=1e-5)
    assert float(ours.kl(ours)) == 0.0
    assert 40 < float(other.kl(ours)) < 80  # 87 nats where only `other` is possible
    gradient = jax.grad(lambda p: Categorical(p).kl(other))(ours.probs)
    assert jnp.all(jnp.isfinite(gradient))
    x = jax.vmap(ours.sample)(jax.random.split(KEY, 40_000))
    np.testing.assert_array_equal(x.sum(-1), 1.0)
    np.testing.assert_allclose(x.mean(0), p, atol=0.01)
    index = [4, 0, 2]
    np.testing.assert_allclose(
        other.log_prob(jnp.eye(5)[jnp.asarray(index)]),
        np.log(q[np.arange(3), index]).sum(),
        rtol=1e-5,
    )
    assert float(ours.log_prob(jnp.eye(5)[:3])) == -np.inf


def test_a_network_trains_and_samples_through_the_common_parts():
    """A Transformer, its tokens in and one-hot states out; gradients and samples are finite."""
    process = D3PM(d3pm.absorbing(DATA + 1))
    net = Transformer(DATA + 1, width=8, depth=1, heads=2)
    tokens, _ = every_pair(1)
    params = jax.jit(net.init)(KEY, tokens, jnp.zeros(16))
    objective = masked_cross_entropy(net.apply, process, Logits())
    gradient = jax.jit(jax.grad(lambda p: objective(p, KEY, {"x": tokens})[0].mean()))(params)
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    denoise = jd.NetDenoiser(params, process, net.apply, Logits())
    start = jax.vmap(process.prior((2, DATA + 1)).sample)(jax.random.split(KEY, 64))
    x = jd.sample(jd.Ancestral(process), denoise, jd.grids.uniform(3), KEY, start)
    np.testing.assert_array_equal(x.sum(-1), 1.0)
    assert not jnp.any(x[..., DATA])  # no mask is left
    assert len(np.unique(np.asarray(jnp.argmax(x, -1)))) == DATA


@every_kernel
def test_extreme_logits_are_harmless(name):
    """Loss and gradient stay finite for a network that is certain, and wrong."""
    kernel = KERNELS[name]
    if name == "gaussian":  # steps so small that most classes are out of each other's reach
        kernel = d3pm.discretized_gaussian(DATA, np.linspace(1e-4, 0.1, T))
    objective = categorical_bound(blind, D3PM(kernel), Logits(), jd.grids.uniform(T))
    logits = jnp.asarray([[1e4, -1e4, 0.0, 0.0], [-1e4, 1e4, 1e4, -50.0]])
    tokens, _ = every_pair(8)
    mean = lambda logits: objective(logits, KEY, {"x": tokens})[0].mean()
    value, gradient = jax.jit(jax.value_and_grad(mean))(logits)
    assert jnp.isfinite(value)
    assert jnp.all(jnp.isfinite(gradient))


def test_schedules_of_the_papers():
    t = np.linspace(0.0, 1.0, 101)
    level = np.cos(0.5 * np.pi * (t + 0.008) / 1.008)
    np.testing.assert_allclose(jax.vmap(d3pm.cosine)(jnp.asarray(t)), level / level[0], atol=1e-6)
    assert d3pm.cosine(jnp.ones(())) == 0.0
    assert d3pm.linear(jnp.ones(())) == 0.0
    assert not isinstance(D3PM(KERNELS["uniform"]), jd.processes.base.SDE)
    assert isinstance(D3PM(KERNELS["uniform"]), Process)


def test_bad_arguments_are_named():
    rows = np.full((3, 2, 2), 0.5)
    for make, message in (
        (lambda: d3pm.uniform(1), "classes must be at least 2, got 1"),
        (lambda: d3pm.absorbing(3, lambda t: t), "keep must fall strictly"),
        (lambda: d3pm.transitions(rows[0]), r"matrices must have the shape \[T, K, K\]"),
        (lambda: d3pm.transitions(1.1 * rows), "rows that sum to 1"),
        (lambda: d3pm.transitions(rows * [[-1.0, 3.0]]), "non-negative"),
        (lambda: d3pm.transitions(rows, [0.5, 0.6]), "prior must be 2 probabilities"),
        (lambda: d3pm.discretized_gaussian(4, [0.1, 0.0]), "betas must be"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    process, grid = D3PM(KERNELS["uniform"]), jd.grids.uniform(4)
    with pytest.raises(ValueError, match="process must have the absorbing kernel"):
        masked_cross_entropy(blind, process, Logits())
    with pytest.raises(ValueError, match="t_min must lie"):
        masked_cross_entropy(blind, D3PM(KERNELS["absorbing"]), Logits(), t_min=0.0)
    with pytest.raises(ValueError, match="grid must fall from 1 to 0"):
        categorical_bound(blind, process, Logits(), grid[:-1])
    with pytest.raises(ValueError, match="cross_entropy must be at least 0"):
        categorical_bound(blind, process, Logits(), grid, cross_entropy=-1.0)
    with pytest.raises(ValueError, match="x must be class indices, got an array of float32"):
        categorical_bound(blind, process, Logits(), grid)(
            jnp.zeros((2, 4)), KEY, {"x": jnp.zeros((2, 2))}
        )


def test_config_reports_bits_of_discrete_data():
    """An untrained network is the uniform one, log₂ 17 bits; the marks are those of the data."""
    config = load_config(Path(__file__).parents[1] / "configs" / "d3pm_digits.py")
    small = config.Config(
        width=8, multipliers=(1,), attention=(), bound_steps=8, sampler_steps=4, eval_samples=16
    )
    experiment = config.experiment(small)
    params = jax.jit(experiment.init)(KEY)
    report = evaluate(experiment, params, KEY)
    likelihood = report["likelihood"]
    assert likelihood["independent_bits_per_dim"] == pytest.approx(2.3969, abs=1e-4)
    deviation = likelihood["bits_per_dim"] - math.log2(17)
    assert abs(deviation) < 4 * likelihood["bits_per_dim_stderr"]
    assert likelihood["bits_per_dim_stderr"] < 0.03
    states, times = experiment.trajectory(params, KEY, 2)
    assert not jnp.any(states[0])  # all masked
    assert len(np.unique(states[-1])) > 10
    assert times[0] == 1.0
