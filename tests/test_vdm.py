"""The continuous bound and its learned schedule, against closed forms on Gaussian data.

For data from N(MEAN, STD²) and the exact denoiser, with e^γ = σ²/α², each coordinate costs

    prior            ½ e^{−γ_1} (STD² + MEAN²)
    reconstruction   ½ log 2π + ½ γ_0 + ½
    diffusion        ½ ∫ v dγ,    v = STD²/(STD² + e^γ) = E (ε − ε̂)²,

and ε − ε̂ is Gaussian: given γ, m = ½ (ε − ε̂)² has the second moment ¾ v².
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

import jaxdiff as jd
from jaxdiff import networks, struct
from jaxdiff.distributions import Normal
from jaxdiff.objectives import vdm as module
from jaxdiff.objectives.elbo import elbo
from jaxdiff.objectives.vdm import bound, level_decoder, vdm
from jaxdiff.schedules import LearnedGamma, learned_gamma, log_snr

KEY = jax.random.key(0)
MEAN, STD = 0.7, 0.3
DATA = MEAN + STD * jax.random.normal(KEY, (4000, 2))
ENTROPY = 0.5 * np.log(2 * np.pi * np.e * STD**2)
INTERIOR = ("centres", "rates", "shares")


def exact(params, x, level):
    """The noise that is to be expected in x, times a parameter that should be 1."""
    alpha_squared, var = jax.nn.sigmoid(4 * level)[:, None], jax.nn.sigmoid(-4 * level)[:, None]
    excess = x - jnp.sqrt(alpha_squared) * MEAN
    return params * jnp.sqrt(var) * excess / (alpha_squared * STD**2 + var)


OBJECTIVE = vdm(exact, jd.epsilon())


@jax.jit
def evaluate(params, key, x):
    return OBJECTIVE(params, key, {"x": x})


@jax.jit
def gradients(params, key, x):
    """Of the mean loss."""
    return jax.grad(lambda params: OBJECTIVE(params, key, {"x": x})[0].mean())(params)


def fresh(key, n, d=1):
    """Other data than DATA."""
    return MEAN + STD * jax.random.normal(jax.random.fold_in(key, 1), (n, d))


def parameters(schedule, network=1.0):
    return {"network": jnp.float32(network), "schedule": vars(schedule)}


def disturbed(schedule, scale, seed=1):
    """The schedule with noise on the leaves between its ends."""
    keys = dict(zip(INTERIOR, jax.random.split(jax.random.key(seed), 3), strict=True))
    noise = {
        name: leaf + scale * jax.random.normal(keys[name], leaf.shape)
        for name, leaf in vars(schedule).items()
        if name in keys
    }
    return dataclasses.replace(schedule, **noise)


def closed_form(gamma_0, gamma_1):
    """Prior, diffusion and reconstruction in nats per coordinate."""
    antiderivative = lambda gamma: gamma - jnp.log(STD**2 + jnp.exp(gamma))
    return jnp.stack(
        [
            0.5 * jnp.exp(-gamma_1) * (STD**2 + MEAN**2),
            0.5 * (antiderivative(gamma_1) - antiderivative(gamma_0)),
            0.5 * (jnp.log(2 * jnp.pi) + gamma_0 + 1.0),
        ]
    )


def near(found, expected, width=3.0):
    """Whether the mean of the first axis is an estimate of what is expected."""
    found = np.asarray(found, np.float64)
    error = found.std(0) / len(found) ** 0.5
    return np.all(np.abs(found.mean(0) - np.asarray(expected)) <= width * error + 1e-6)


# The schedule


@pytest.mark.parametrize("hidden", [0, 1, 16])
def test_gamma_rises_whatever_its_leaves(hidden):
    """C2: no violation on 10,000 times, as made and after disturbances of all leaves."""
    t = jnp.linspace(0.0, 1.0, 10_000)
    start = learned_gamma(-13.3, 5.0, hidden=hidden)
    for scale in (0.0, 0.3, 3.0, 10.0):
        for seed in range(5):
            schedule = disturbed(start, scale, seed)
            gamma = np.asarray(jax.vmap(schedule.gamma)(t))
            assert np.all(np.diff(gamma) > 0.0)
            np.testing.assert_allclose(gamma[[0, -1]], (-13.3, 5.0), rtol=1e-6)
    wild = dataclasses.replace(start, gamma_0=jnp.float32(3.0), gap=jnp.float32(-5.0))
    assert wild.gamma(jnp.float32(1.0)) > wild.gamma(jnp.float32(0.0))


@pytest.mark.parametrize("hidden", [0, 1, 4, 16, 64])
def test_gamma_starts_almost_linear(hidden):
    t = jnp.linspace(0.0, 1.0, 101)
    gamma = jax.vmap(learned_gamma(-10.0, 6.0, hidden=hidden).gamma)(t)
    np.testing.assert_allclose(gamma, -10.0 + 16.0 * t, atol=1e-5 if hidden == 0 else 0.02 * 16.0)


def test_schedule_is_its_formula_in_double_precision():
    """As the docstring has it, with the differences of sigmoids, and exact at both ends."""
    schedule = disturbed(learned_gamma(-13.3, 5.0, hidden=4), 2.0)
    leaf = {name: np.asarray(value, np.float64) for name, value in vars(schedule).items()}
    rates, shares = (np.log1p(np.exp(leaf[name])) for name in ("rates", "shares"))
    sigmoid, c = scipy.special.expit, leaf["centres"]
    for t in (0.0, 1e-3, 0.3, 0.8, 1.0):
        u = [
            at + np.mean(shares * (sigmoid(rates * (at - c)) - sigmoid(-rates * c)))
            for at in (t, 1.0)
        ]
        gamma = leaf["gamma_0"] + np.log1p(np.exp(leaf["gap"])) * u[0] / u[1]
        alpha, sigma = schedule(jnp.float32(t))
        np.testing.assert_allclose(alpha, np.sqrt(sigmoid(-gamma)), rtol=2e-6)
        np.testing.assert_allclose(sigma, np.sqrt(sigmoid(gamma)), rtol=2e-6)
        np.testing.assert_allclose(log_snr(schedule, jnp.float32(t)), -gamma, rtol=1e-6, atol=1e-5)


def test_leaves_make_the_process_again_and_carry_gradients():
    """DESIGN: `Gaussian(LearnedGamma(**params["schedule"]))` inside a differentiated program."""
    leaves = vars(learned_gamma(-8.0, 4.0, hidden=3))

    @jax.jit
    def scale(leaves, t):
        return jd.Gaussian(LearnedGamma(**leaves)).marginal(jnp.ones(2), t).std

    for name, gradient in jax.grad(scale)(leaves, jnp.float32(0.4)).items():
        assert np.all(np.asarray(gradient) != 0.0), name


# The bound


@pytest.mark.parametrize("ends", [(-3.0, 2.0), (-8.0, 4.0), (-12.0, 9.0)])
def test_terms_are_their_closed_forms_and_the_bound_is_tight_for_wide_ends(ends):
    params = parameters(learned_gamma(*ends))
    found = bound(OBJECTIVE, params, KEY, DATA, draws=4)
    terms = np.stack([found.prior, found.diffusion, found.reconstruction], axis=1) / 2
    expected = closed_form(*ends)
    assert near(terms, expected)
    np.testing.assert_allclose(found.value, -2 * terms.sum(1), rtol=1e-5, atol=1e-5)

    gap = float(expected.sum()) - ENTROPY
    written = np.log1p(np.exp(ends[0]) / STD**2) - np.log1p(STD**2 * np.exp(-ends[1]))
    written = 0.5 * (written + np.exp(-ends[1]) * (STD**2 + MEAN**2))
    np.testing.assert_allclose(gap, written, atol=2e-6)
    assert 0.0 < gap < {-3.0: 0.3, -8.0: 0.01, -12.0: 1e-4}[ends[0]]
    # On the same data most of the statistical error of entropy and bound cancels.
    log_prob = -0.5 * ((DATA - MEAN) / STD) ** 2 - np.log(STD) - 0.5 * np.log(2 * np.pi)
    assert near((log_prob.sum(1) - found.value) / 2, gap)


def test_loss_of_training_is_the_bound_per_coordinate():
    """Its value is the terms' sum, each an unbiased estimate; `bound` has the same mean."""
    params = parameters(disturbed(learned_gamma(-6.0, 3.0, hidden=4), 1.0))
    loss, terms = evaluate(params, KEY, DATA)
    assert set(terms) == {"prior", "diffusion", "reconstruction"}
    np.testing.assert_allclose(loss, sum(terms.values()), rtol=1e-5, atol=1e-5)
    parts = jnp.stack([terms["prior"], terms["diffusion"], terms["reconstruction"]], axis=1)
    assert near(parts, closed_form(-6.0, 3.0))


def test_loss_knows_the_schedule_by_its_ends_alone(monkeypatch):
    """C3: linear against two cubics, one of which stands still at half time."""
    base = vars(learned_gamma(-5.0, 3.0, hidden=0))
    curves = {
        "linear": lambda t: t,
        "early": lambda t: 1.0 - (1.0 - t) ** 3,
        "early and late": lambda t: 4.0 * (t - 0.5) ** 3 + 0.5,
    }
    losses = {}
    for name, curve in curves.items():

        @struct.dataclass
        class Curved(LearnedGamma):
            def gamma(self, t, curve=curve):
                return self.gamma_0 + jax.nn.softplus(self.gap) * curve(t)

        monkeypatch.setattr(module, "LearnedGamma", Curved)
        params = {"network": jnp.float32(0.8), "schedule": base}
        loss = jax.jit(lambda params, key, x: OBJECTIVE(params, key, {"x": x})[0])
        key = jax.random.key(len(losses))
        losses[name] = np.asarray(loss(params, key, fresh(key, 400_000)), np.float64)
    mean = {name: loss.mean() for name, loss in losses.items()}
    error = {name: loss.std() / len(loss) ** 0.5 for name, loss in losses.items()}
    for name in ("early", "early and late"):
        width = 3 * np.hypot(error[name], error["linear"])
        np.testing.assert_allclose(mean[name], mean["linear"], atol=width)
        assert width < 0.05
        assert abs(error[name] / error["linear"] - 1.0) > 0.1


def test_chain_of_many_steps_has_the_same_bound():
    """`elbo` of the process and denoiser that were learned tends to the continuous bound."""
    schedule = disturbed(learned_gamma(-7.0, 3.0, hidden=4), 1.0)
    params = parameters(schedule)
    process, denoise = OBJECTIVE.process(params), OBJECTIVE.denoiser(params)
    alpha, sigma = process.schedule(jnp.float32(0.0))

    def decoder(x0, last):
        # What log_density of z_0 becomes when z_0 is known in distribution.
        std = jnp.sqrt(last.std**2 + sigma**2) / alpha
        return Normal(last.mean / alpha, std).log_prob(x0)

    continuous = bound(OBJECTIVE, params, KEY, DATA, draws=32).value
    excess = []
    for steps in (10, 40, 160):
        grid = jd.grids.uniform(steps)
        chain = elbo(process, denoise, jax.random.key(steps), DATA, grid, decoder=decoder)
        excess.append(np.asarray(continuous - chain.value) / 2)
    means = [below.mean() for below in excess]
    assert means[0] > 3 * means[1] > 9 * means[2] > 0.0
    # It falls as 1/T: what remains when that is taken off.
    rest = (4 * excess[2] - excess[1]) / 3
    assert near(rest, 0.0)
    assert rest.std() / len(rest) ** 0.5 < 0.25 * means[2]


# What its gradient is


def test_ends_are_trained_by_the_bound():
    """C2: the gradients of γ_0 and of the gap are those of the closed form, and both move."""
    params = parameters(disturbed(learned_gamma(-3.0, 1.0, hidden=3), 1.0))

    keys = jax.random.split(KEY, 30)
    found = [gradients(params, key, fresh(key, 20_000))["schedule"] for key in keys]
    total = lambda start, gap: closed_form(start, start + jax.nn.softplus(gap)).sum()
    leaves = params["schedule"]
    expected = jax.grad(total, (0, 1))(leaves["gamma_0"], leaves["gap"])
    ends = np.array([[g["gamma_0"], g["gap"]] for g in found])
    assert near(ends, expected)
    np.testing.assert_allclose(ends.mean(0), expected, rtol=0.1)
    assert np.all(np.abs(expected) > 0.01)


def test_what_lies_between_the_ends_is_trained_by_the_variance():
    """The trick against autodiff of the second moment's logarithm, by quadrature over t."""
    schedule = disturbed(learned_gamma(-6.0, 4.0, hidden=3), 1.5)
    t = (jnp.arange(4000) + 0.5) / 4000

    def second_moment(leaves):
        gamma = LearnedGamma(**leaves).gamma
        slope = jax.vmap(lambda t: jax.jvp(gamma, (t,), (jnp.ones_like(t),)))(t)
        v = STD**2 / (STD**2 + jnp.exp(slope[0]))
        return jnp.mean(0.75 * v**2 * slope[1] ** 2)

    expected = jax.grad(lambda leaves: jnp.log(second_moment(leaves)))(vars(schedule))

    keys = jax.random.split(KEY, 30)
    params = parameters(schedule)
    found = [gradients(params, key, fresh(key, 20_000))["schedule"] for key in keys]
    for name in INTERIOR:
        leaf = np.stack([g[name] for g in found])
        assert near(leaf, expected[name], 3.5), name
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(leaf.mean(0), expected[name], atol=0.03 * scale)


def test_the_two_gradients_do_not_mix():
    """The bound's terms tell the interior nothing; the variance tells network and ends nothing."""
    params = parameters(disturbed(learned_gamma(-6.0, 4.0, hidden=3), 1.0), network=0.7)
    x = fresh(KEY, 20_000)
    terms = jax.jit(lambda params: sum(OBJECTIVE(params, KEY, {"x": x})[1].values()).mean())
    of_loss, of_terms = gradients(params, KEY, x), jax.grad(terms)(params)
    np.testing.assert_allclose(of_loss["network"], of_terms["network"], rtol=1e-5)
    for name in ("gamma_0", "gap"):
        np.testing.assert_allclose(of_loss["schedule"][name], of_terms["schedule"][name], rtol=1e-5)
        assert of_loss["schedule"][name] != 0.0
    for name in INTERIOR:
        np.testing.assert_array_equal(of_terms["schedule"][name], 0.0)
        assert np.all(of_loss["schedule"][name] != 0.0)


def test_trained_schedule_has_a_loss_of_lower_variance():
    """C3: from a linear γ most of the way to the least second moment that there is."""
    start = parameters(learned_gamma(-8.0, 5.0, hidden=16))
    optimizer = optax.adam(0.05)

    @jax.jit
    def step(params, state, key):
        grads = gradients(params, key, fresh(key, 256))
        held = {"gamma_0": 0.0, "gap": 0.0}
        updates, state = optimizer.update(grads["schedule"] | held, state)
        return params | {"schedule": optax.apply_updates(params["schedule"], updates)}, state

    params, state = start, optimizer.init(start["schedule"])
    for i in range(300):
        params, state = step(params, state, jax.random.key(i))

    def moments(params):
        loss, terms = evaluate(params, KEY, fresh(KEY, 50_000))
        return float(loss.mean()), float((terms["diffusion"] ** 2).mean()), float(loss.var())

    before, after = moments(start), moments(params)
    gamma = np.linspace(-8.0, 5.0, 10_001)
    deviation = np.sqrt(0.75) * STD**2 / (STD**2 + np.exp(gamma))
    least = np.trapezoid(deviation, gamma) ** 2
    assert after[1] - least < 0.2 * (before[1] - least)
    assert after[2] < 0.8 * before[2]
    np.testing.assert_allclose(after[0], before[0], atol=4 * (before[2] / 50_000) ** 0.5)


# Grey levels


def test_level_decoder_is_a_softmax_of_densities():
    """Against SciPy in double precision; it sums to one, for a needle and for a plain."""
    levels, decoder = (2 * np.arange(17) + 1) / 17 - 1, level_decoder(17)
    for mean, std in ((0.1, 0.3), (-0.95, 0.02), (1.3, 1.0), (0.3, 50.0), (2 / 17, 0.1)):
        law = jd.Normal(jnp.float32(mean), std)
        found = np.array([decoder(jnp.float32(level), law) for level in levels])
        expected = scipy.special.log_softmax(-0.5 * ((mean - levels) / std) ** 2)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(np.exp(found).sum(), 1.0, rtol=1e-5)
    image = jnp.asarray(levels[:6], jnp.float32).reshape(2, 3, 1)
    each = [decoder(x, jd.Normal(x + 0.05, 0.1)) for x in image.ravel()]
    whole = decoder(image, jd.Normal(image + 0.05, jnp.float32(0.1)))
    np.testing.assert_allclose(whole, sum(each), rtol=1e-5)


def test_bound_of_drowned_levels_is_that_of_a_uniform_model():
    """Where even z_0 is noise, each of 17 levels costs log 17, and nothing is left to diffuse."""
    objective = vdm(lambda params, x, level: 0.0 * x, jd.x0(), decoder=level_decoder(17))
    x0 = (2.0 * jax.random.randint(KEY, (50, 8), 0, 17) + 1.0) / 17 - 1.0
    found = bound(objective, parameters(learned_gamma(14.0, 16.0)), KEY, x0)
    np.testing.assert_allclose(found.reconstruction, 8 * np.log(17), rtol=1e-3)
    np.testing.assert_allclose(found.value, -8 * np.log(17), rtol=1e-3)


def test_bound_of_discrete_data_reaches_their_entropy():
    """Four levels of known masses and their exact denoiser: not below −log-mass, and near it."""
    masses, levels = np.array([0.1, 0.2, 0.3, 0.4]), jnp.array([-0.75, -0.25, 0.25, 0.75])
    index = np.asarray(jax.random.choice(KEY, 4, (20_000,), p=jnp.asarray(masses)))

    def network(params, x, level):
        inverse_std = jnp.exp(2 * level)[:, None]
        alpha = jnp.sqrt(jax.nn.sigmoid(4 * level))[:, None]
        squares = ((x / alpha - levels[None, :]) * inverse_std) ** 2
        shares = jax.nn.softmax(jnp.log(jnp.asarray(masses))[None, :] - 0.5 * squares)
        return (shares @ levels)[:, None]

    objective = vdm(network, jd.x0(), decoder=level_decoder(4))
    gaps = []
    for ends in ((-3.0, 1.0), (-8.0, 7.0)):
        found = bound(
            objective, parameters(learned_gamma(*ends)), KEY, levels[index][:, None], draws=16
        )
        gap = np.log(masses)[index] - np.asarray(found.value)
        gaps.append(gap.mean())
        error = gap.std() / len(gap) ** 0.5
        assert gaps[-1] > -3 * error
    assert gaps[0] > 0.02
    assert abs(gaps[1]) < 3 * error + 1e-3 < 0.04


# The network, and what the objective gives it


def test_fourier_features_are_sines_and_cosines_of_the_input():
    x = jax.random.uniform(KEY, (2, 8, 8, 3), minval=-1.0, maxval=1.0)
    net = networks.UNet(width=4, blocks=1, attention=(), fourier=(3, 4))
    seen = net.apply({}, x, method=net._with_fourier)
    waves = [
        wave(2.0**n * np.pi * np.asarray(x, np.float64))
        for n in (3, 4)
        for wave in (np.sin, np.cos)
    ]
    np.testing.assert_allclose(seen, np.concatenate([x, *waves], axis=-1), atol=2e-5)
    plain = networks.UNet(width=4, blocks=1, attention=())
    np.testing.assert_array_equal(plain.apply({}, x, method=plain._with_fourier), x)

    shapes = [jax.eval_shape(n.init, KEY, x, jnp.zeros(2))["params"] for n in (net, plain)]
    assert [s["in"]["kernel"].shape for s in shapes] == [(3, 3, 15, 4), (3, 3, 3, 4)]
    assert shapes[0].keys() == shapes[1].keys()
    out = jax.eval_shape(lambda: net.init_with_output(KEY, x, jnp.zeros(2))[0])
    assert out.shape == x.shape
    with pytest.raises(ValueError, match=r"fourier .* \(-1,\)"):
        jax.eval_shape(networks.UNet(fourier=(-1,)).init, KEY, x, jnp.zeros(2))


def test_condition_and_dropout_reach_the_network():
    seen = {}

    def network(params, x, level, label=None, rngs=None):
        seen["label"], seen["rngs"] = label, rngs
        return params * x + label[:, None]

    params = parameters(learned_gamma(hidden=2))
    batch = {"x": DATA[:4], "label": jnp.arange(4)}
    vdm(network, jd.epsilon())(params, KEY, batch)
    assert seen["rngs"] is None
    np.testing.assert_array_equal(seen["label"], jnp.arange(4))
    objective = vdm(network, jd.epsilon(), dropout=True)
    objective(params, KEY, batch)
    assert set(seen["rngs"]) == {"dropout"}
    objective.denoiser(params, label=jnp.arange(4) + 1)(DATA[:4], jnp.float32(0.5))
    np.testing.assert_array_equal(seen["label"], jnp.arange(4) + 1)


def test_bound_takes_a_condition_and_no_more_programs_for_more_draws():
    traces = []

    def network(params, x, level, label):
        traces.append(None)
        return x + label[:, None]

    def value(labels, draws):
        params = parameters(learned_gamma(-8.0, 4.0))
        return bound(vdm(network, jd.epsilon()), params, KEY, DATA[:4], draws=draws, label=labels)

    one, other = value(jnp.zeros(4), 3), value(jnp.array([0.0, 0.0, 5.0, 0.0]), 3)
    np.testing.assert_array_equal(one.value != other.value, [False, False, True, False])
    counts = []
    for draws in (2, 40):
        before = len(traces)
        value(jnp.zeros(4), draws)
        counts.append(len(traces) - before)
    assert counts[0] == counts[1]


def test_stated_error_of_the_bound_is_an_upper_one():
    """Against the spread over keys of the same data; the draws' even times help."""
    params = parameters(learned_gamma(-8.0, 4.0))
    keys = jax.random.split(jax.random.key(3), 200)
    found = bound(OBJECTIVE, params, keys, jnp.tile(DATA[:1], (200, 1)), draws=16)
    spread, stated = jnp.std(found.value, ddof=1), jnp.sqrt(jnp.mean(found.stderr**2))
    assert 0.9 * spread < stated < 10 * spread
    assert jnp.isnan(bound(OBJECTIVE, params, KEY, DATA[:2]).stderr).all()


def test_bound_of_an_example_does_not_depend_on_the_batch():
    params = parameters(learned_gamma(-8.0, 4.0))
    whole = bound(OBJECTIVE, params, KEY, DATA[:6], draws=2)
    half = bound(OBJECTIVE, params, KEY, DATA[:3], draws=2)
    np.testing.assert_allclose(half.value, whole.value[:3], rtol=1e-5)


def test_draws_of_an_example_are_even_in_time():
    """Where ½ ‖ε − ε̂‖² is always 1 only t is random: a sum over even times, hardly at all."""

    def network(params, x, level):
        alpha_squared, var = jax.nn.sigmoid(4 * level), jax.nn.sigmoid(-4 * level)
        return (x - jnp.sqrt(alpha_squared)[:, None] * MEAN) / jnp.sqrt(var)[:, None] + 1.0

    params = parameters(disturbed(learned_gamma(-5.0, 4.0, hidden=4), 2.0))
    x0, objective = jnp.full((200, 2), MEAN), vdm(network, jd.epsilon())
    one, many = (bound(objective, params, KEY, x0, draws=n).diffusion for n in (1, 16))
    np.testing.assert_allclose(many.mean(), 9.0, rtol=5e-3)
    assert many.std() < 0.1 * one.std()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: learned_gamma(5.0, 5.0), "gamma_min=5.0"),
        (lambda: learned_gamma(-np.inf, 5.0), "gamma_min=-inf"),
        (lambda: learned_gamma(hidden=-1), "hidden .* -1"),
        (lambda: level_decoder(1), "levels .* 1"),
        (lambda: bound(OBJECTIVE, parameters(learned_gamma()), KEY, DATA, draws=0), "draws .* 0"),
    ],
)
def test_bad_numbers_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
