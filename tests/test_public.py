"""Every public object: what it survives, that it is documented, and what importing it costs."""

import ast
import dataclasses
import importlib
import inspect
import itertools
import pickle
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import jaxdiff
import jaxdiff as jd
from jaxdiff import networks, parameterizations, recipes, schedules
from jaxdiff.data import mixture, toys
from jaxdiff.distributions import BlockNormal
from jaxdiff.experiment import load_config
from jaxdiff.interop import score_sde
from jaxdiff.objectives import elbo, improved_ddpm, vdm
from jaxdiff.objectives.d3pm import categorical_bound, masked_cross_entropy
from jaxdiff.objectives.dequantization import dequantized
from jaxdiff.processes import d3pm, linear_sde
from jaxdiff.processes.base import example_keys
from jaxdiff.samplers import analytic_dpm
from jaxdiff.samplers.ddim import DDIMInversion

ROOT = Path(__file__).parent.parent
KEY = jax.random.key(0)
KEYS = example_keys(KEY, 3)
X = jax.random.normal(KEY, (3, 2))
T, S = jnp.float32(0.6), jnp.float32(0.4)
VP = jd.Gaussian(jd.linear_beta())
BATCH = {"x": X}
KL = networks.AutoencoderKL((4,), blocks=1, groups=2, attention=False)
IMAGES = jnp.ones((1, 2, 2, 3))
KL_PARAMS = jax.tree.map(
    lambda leaf: jnp.full(leaf.shape, 0.1), jax.eval_shape(KL.init, KEY, IMAGES)
)


def apply(params, x, noise_level):
    return params["w"] * jnp.tanh(x + 0.5 * x[:, ::-1]) + noise_level[:, None]


def power(n, t):
    return (1.0 - t) ** n


def logits(params, tokens, noise_level):
    return params["w"] * jax.nn.one_hot(tokens, 3) + noise_level[:, None, None]


def first_half(params, x, noise_level):
    return apply(params, x, noise_level)[:, : x.shape[1] // 2]


def halves(key, process, n):
    return jnp.full(n, 0.5), jnp.ones(n)


def denoiser(w=1.0, process=VP, parameterization=None):
    return jd.NetDenoiser({"w": jnp.float32(w)}, process, apply, parameterization or jd.epsilon())


class Noun(NamedTuple):
    """How to make an object from a number, and what to ask of it."""

    make: Callable[[float], Any]
    use: Callable[[Any], jax.Array]


def _schedule(make):
    return Noun(make, lambda schedule: jnp.stack(schedule(T)))


def _parameterization(make):
    return Noun(make, lambda p: p.denoised(VP, X[0], X[1], T).mean + p.inputs(VP, X[1], T)[0])


def _kernel(make):
    return Noun(make, lambda kernel: kernel.forward(jnp.eye(3), S, T))


def _tokens(make):
    tokens = jnp.array([[0, 1], [1, 0], [1, 1]])
    return Noun(make, lambda loss: loss({"w": jnp.float32(1.0)}, KEY, {"x": tokens})[0])


def _step(make):
    return Noun(make, lambda step: step.update(KEYS, X, step.init(X), T, S, denoiser())[0])


def _weighting(make):
    return Noun(make, lambda weighting: weighting(VP, T))


def _times(make):
    return Noun(make, lambda sampler: jnp.stack(sampler(KEY, VP, 4)))


def _denoiser(make):
    return Noun(make, lambda denoise: denoise(X, T).mean)


def no_noise(params, x):
    return params["w"] * x


def learned(n):
    return {"network": {"w": n}, "schedule": vars(jd.learned_gamma(-5.0, n, hidden=2))}


def twice(params, x, noise_level):
    return jnp.concatenate([apply(params, x, noise_level)] * 2, axis=-1)


def _cubics(n):
    return linear_sde.Cubics(n * jnp.array([[0.1], [0.2], [0.3], [0.4]]))


def _shrink(x, t):
    return -t * x


def _one_and_time(t):
    return 1.0 + t


def _vector_sde(n):
    table = lambda value: linear_sde.Cubics(jnp.stack([value, n * value, value, value])[:, None])
    return linear_sde.LinearSDE(
        f=Partial(_shrink),
        g=Partial(_one_and_time),
        mean_map=table(jnp.eye(2, 3)),
        covariance=table(jnp.eye(2)),
    )


# One entry a class; the number reaches a leaf wherever the class has any.
def _half_filled(params, centres, noise):
    return jnp.full_like(centres, 0.5), noise.reshape(len(noise), -1).sum(1)


def _power(n, params, key, batch):
    return (batch["x"].reshape(len(batch["x"]), -1) ** (2 * n)).sum(1), {}


NOUNS = {
    "LinearBeta": _schedule(lambda n: jd.linear_beta(0.1, 10.0 + n)),
    "SubVP": _schedule(lambda n: jd.subvp(0.1, 10.0 + n)),
    "Cosine": _schedule(lambda n: jd.cosine(0.008 * n)),
    "Exploding": _schedule(lambda n: jd.exploding(0.01, 10.0 + n)),
    "EDMSchedule": _schedule(lambda n: jd.edm(0.002, 10.0 + n)),
    "LearnedGamma": _schedule(lambda n: jd.learned_gamma(-5.0, n)),
    "Straight": _schedule(lambda n: jd.straight()),
    "TabulatedBeta": _schedule(lambda n: jd.from_betas([0.01 * n, 0.02, 0.03])),
    "Epsilon": _parameterization(lambda n: jd.epsilon()),
    "X0": _parameterization(lambda n: jd.x0()),
    "V": _parameterization(lambda n: jd.v()),
    "Score": _parameterization(lambda n: jd.score()),
    "Velocity": _parameterization(lambda n: jd.velocity()),
    "RawEpsilon": _parameterization(lambda n: score_sde.RawEpsilon(sign=n)),
    "EDM": _parameterization(lambda n: parameterizations.edm(0.5 * n)),
    "EDMWeighting": _weighting(lambda n: jd.weightings.edm(0.5 * n)),
    "P2": _weighting(lambda n: jd.weightings.p2(n)),
    "MinSNR": _weighting(lambda n: jd.weightings.min_snr(1e-3 * n)),
    "Uniform": _times(lambda n: jd.time_samplers.uniform(0.1 * n)),
    "LowDiscrepancy": _times(lambda n: jd.time_samplers.low_discrepancy(0.1 * n)),
    "Steps": _times(lambda n: jd.time_samplers.steps(int(10 * n))),
    "LogUniform": _times(lambda n: jd.time_samplers.log_uniform(0.1 * n)),
    "Importance": _times(lambda n: jd.time_samplers.importance(0.1 * n)),
    "LogNormal": _times(lambda n: jd.time_samplers.log_normal(-1.0, n)),
    "Normal": Noun(lambda n: jd.Normal(X[0], n), lambda normal: normal.log_prob(X[1])),
    "Gaussian": Noun(
        lambda n: jd.Gaussian(jd.linear_beta(0.1, 10.0 + n)),
        lambda process: process.posterior(X[0], jd.Denoised(X[1], 0.1), T, S).sample(KEY),
    ),
    "Rescaled": _denoiser(
        lambda n: jd.Rescaled(denoiser(n), VP, jd.Gaussian(jd.edm(0.002, 10.0 + n)))
    ),
    "Ancestral": _step(lambda n: jd.Ancestral(jd.Gaussian(jd.linear_beta(0.1, 10.0 + n)))),
    "DDIM": _step(lambda n: jd.DDIM(VP, eta=0.2 * n)),
    "DDIMInversion": _step(lambda n: DDIMInversion(jd.Gaussian(jd.linear_beta(0.1, 10.0 + n)))),
    "EulerMaruyama": _step(lambda n: jd.EulerMaruyama(VP, eta=n)),
    "Heun": _step(lambda n: jd.Heun(jd.Gaussian(jd.linear_beta(0.1, 10.0 + n)))),
    "EDMSampler": _step(lambda n: jd.EDMSampler(VP, churn=0.2 * n)),
    "AnnealedLangevin": _step(lambda n: jd.AnnealedLangevin(VP, snr=0.2 * n, steps=2)),
    "Langevin": Noun(
        lambda n: jd.Langevin(VP, snr=0.2 * n, steps=2),
        lambda corrector: corrector.correct(KEYS, X, T, denoiser()),
    ),
    "UnderdampedLangevin": Noun(
        lambda n: jd.UnderdampedLangevin(VP, step_size=0.2 * n),
        lambda corrector: corrector.correct(KEYS, X, T, denoiser()),
    ),
    "PredictorCorrector": _step(
        lambda n: jd.PredictorCorrector(jd.DDIM(VP), jd.Langevin(VP, snr=0.2 * n))
    ),
    "Window": _step(lambda n: jd.Window(jd.DDIM(VP), jd.Heun(VP), low=0.48 * n)),
    "DPMSolver": _step(lambda n: jd.DPMSolver(VP, ratio=0.4 * n)),
    "DPMSolverPP": _step(lambda n: jd.DPMSolverPP(VP, eta=0.4 * n)),
    "DPMSolverPPSingle": _step(lambda n: jd.DPMSolverPPSingle(VP, ratio=0.4 * n, eta=0.1)),
    "UniPC": _step(lambda n: jd.UniPC(jd.Gaussian(jd.linear_beta(0.1, 10.0 + n)))),
    "DEIS": _step(lambda n: jd.DEIS(jd.Gaussian(jd.linear_beta(0.1, 10.0 + n)))),
    "PNDM": _step(lambda n: jd.PNDM(jd.Gaussian(jd.linear_beta(0.1, 10.0 + n)))),
    "NetDenoiser": _denoiser(denoiser),
    "Pretrained": _denoiser(
        lambda n: jd.interop.Pretrained({"w": jnp.float32(n)}, VP, apply, jd.epsilon())
    ),
    "PretrainedAutoencoder": Noun(
        lambda n: jd.interop.PretrainedAutoencoder(KL_PARAMS, KL, scaling=n),
        lambda autoencoder: autoencoder.encode(KEY, IMAGES),
    ),
    "CFG": _denoiser(lambda n: jd.CFG(denoiser(1.0), denoiser(0.5), weight=n)),
    "UnitVariance": Noun(
        lambda n: jd.UnitVariance(VP, denoiser(n)), lambda denoise: sum(denoise(X, T), 0.0)
    ),
    "Denoising": Noun(
        lambda n: jd.denoising(
            apply,
            jd.Gaussian(jd.linear_beta(0.1, 10.0 + n)),
            parameterizations.edm(),
            time_sampler=halves,
        ),
        lambda objective: objective({"w": jnp.float32(1.0)}, KEY, BATCH)[0],
    ),
    "Cubics": Noun(_cubics, lambda cubics: cubics(T)),
    "SolvedSchedule": _schedule(
        lambda n: linear_sde.SolvedSchedule(log_alpha=_cubics(-n), variance=_cubics(n))
    ),
    "DenseNormal": Noun(
        lambda n: linear_sde.DenseNormal(X[0], n * jnp.eye(2)), lambda normal: normal.log_prob(X[1])
    ),
    "LinearSDE": Noun(_vector_sde, lambda process: process.velocity(X[0], X[1], T)),
    "VectorEpsilon": Noun(
        lambda n: linear_sde.VectorEpsilon(),
        lambda p: p.denoised(_vector_sde(1.0), X[0], X[1], T).mean,
    ),
    "LearnedVariance": Noun(
        lambda n: parameterizations.learned_variance(jd.epsilon(), steps=int(10 * n)),
        lambda p: p.denoised(VP, X.reshape(-1)[:4], X[2], T).var,
    ),
    "ImprovedDDPM": Noun(
        lambda n: improved_ddpm.improved_ddpm(
            twice,
            VP,
            parameterizations.learned_variance(jd.epsilon(), steps=10),
            weight=n,
            time_sampler=halves,
        ),
        lambda objective: objective({"w": jnp.float32(1.0)}, KEY, BATCH)[0],
    ),
    "VDM": Noun(
        lambda n: jd.vdm(apply, jd.epsilon(), decoder=elbo.discrete_decoder(17, floor=n)),
        lambda objective: objective(learned(1.0), KEY, BATCH)[0],
    ),
    "LevelDecoder": Noun(
        lambda n: vdm.LevelDecoder(centres=n * jnp.linspace(-1.0, 1.0, 5)),
        lambda decoder: decoder(X[0], jd.Normal(X[1], 0.1)),
    ),
    "Dequantized": Noun(
        lambda n: dequantized(Partial(_power, n), _half_filled, levels=4),
        lambda objective: objective({"model": {}, "dequantizer": {}}, KEY, BATCH)[0],
    ),
    "MaximumLikelihood": Noun(
        lambda n: jd.maximum_likelihood(
            apply, jd.Gaussian(jd.linear_beta(0.1, 10.0 + n)), jd.x0(), jnp.array([1.0, 0.5, 0.1])
        ),
        lambda objective: objective({"w": jnp.float32(1.0)}, KEY, BATCH)[0],
    ),
    "ScoreMatching": Noun(
        lambda n: jd.sliced_score_matching(no_noise),
        lambda objective: objective({"w": jnp.float32(1.0)}, KEY, BATCH)[0],
    ),
    "DiscreteDecoder": Noun(
        lambda n: elbo.discrete_decoder(17, floor=n),
        lambda decoder: decoder(X[0], jd.Normal(X[1], 0.1)),
    ),
    "Categorical": Noun(
        lambda n: jd.Categorical(jnp.array([[0.2 * n, 1.0 - 0.2 * n]])),
        lambda law: law.log_prob(jnp.array([[1.0, 0.0]])),
    ),
    "UniformKernel": _kernel(lambda n: d3pm.uniform(3, Partial(power, n))),
    "AbsorbingKernel": _kernel(lambda n: d3pm.absorbing(3, Partial(power, n))),
    "TableKernel": _kernel(lambda n: d3pm.discretized_gaussian(3, [0.5 * n] * 5)),
    "D3PM": Noun(
        lambda n: jd.D3PM(d3pm.uniform(3, Partial(power, n))),
        lambda process: (
            process.posterior(jnp.eye(3), jd.Denoised(jnp.full((3, 3), 0.3)), T, S).probs
        ),
    ),
    "Logits": Noun(
        lambda n: d3pm.Logits(),
        lambda p: p.denoised(jd.D3PM(d3pm.uniform(3)), jnp.eye(3), jnp.eye(3), T).mean,
    ),
    "CategoricalBound": _tokens(
        lambda n: categorical_bound(
            logits,
            jd.D3PM(d3pm.uniform(3)),
            d3pm.Logits(),
            jnp.array([1.0, 0.5, 0.0]),
            cross_entropy=n,
        )
    ),
    "MaskedCrossEntropy": _tokens(
        lambda n: masked_cross_entropy(
            logits, jd.D3PM(d3pm.absorbing(3)), d3pm.Logits(), t_min=0.1 * n
        )
    ),
    "Divergence": Noun(
        lambda n: elbo.Divergence(
            jd.Gaussian(jd.linear_beta(0.1, 10.0 + n)), Partial(elbo.log_density), 0.0
        ),
        lambda step: step.update(KEYS, X, step.init(X), T, S, denoiser())[1][0],
    ),
    "AnalyticVariance": Noun(
        lambda n: analytic_dpm.AnalyticVariance(
            VP, denoiser(), jnp.array([-9.0, 9.0]), jnp.array([n, 0.5])
        ),
        lambda denoise: denoise(X, T).var,
    ),
    "Residual": Noun(
        lambda n: analytic_dpm.Residual(jd.Gaussian(jd.linear_beta(0.1, 10.0 + n)), X),
        lambda step: step.update(KEYS, jnp.zeros(3), None, T, S, denoiser())[0],
    ),
    "BlockNormal": Noun(
        lambda n: BlockNormal(X[:2], jnp.array([[n, 0.0], [0.5, 1.0]])),
        lambda normal: normal.log_prob(2.0 * X[:2]),
    ),
    "CLD": Noun(
        lambda n: jd.cld(beta=n),
        lambda process: process.posterior(X[:2], jd.Denoised(X[2], 0.1), T, S).sample(KEY),
    ),
    "VelocityNoise": Noun(
        lambda n: jd.velocity_noise(), lambda p: p.denoised(jd.cld(), X[2], X[:2], T).mean
    ),
    "MixedScore": Noun(
        lambda n: jd.mixed_score(), lambda p: p.denoised(jd.cld(), X[2], X[:2], T).mean
    ),
    "SSCS": Noun(
        lambda n: jd.SSCS(jd.cld(beta=n)),
        lambda step: step.update(
            KEYS, jnp.stack([X, 2.0 * X], axis=1), None, T, S, lambda x, t: jd.Denoised(x[:, 0])
        )[0],
    ),
    "HybridScoreMatching": Noun(
        lambda n: jd.hybrid_score_matching(
            first_half, jd.cld(beta=n), jd.mixed_score(), time_sampler=halves
        ),
        lambda objective: objective({"w": jnp.float32(1.0)}, KEY, BATCH)[0],
    ),
    "GaussianMixture": Noun(
        lambda n: mixture.gaussian_mixture([0.3, 0.7], [[0.0, n], [1.0, 0.0]], 0.5),
        lambda law: jax.vmap(law.log_prob)(X),
    ),
    "MixtureDenoiser": _denoiser(
        lambda n: mixture.gmm5().denoiser(jd.Gaussian(jd.linear_beta(0.1, 10.0 + n)))
    ),
    "Toy": Noun(
        lambda n: dataclasses.replace(toys.rings, entropy=n),
        lambda toy: toy.sample(KEY, 3) + toy.entropy,
    ),
}
every_noun = pytest.mark.parametrize("name", NOUNS)


def _modules():
    """All of the library but the one that is made of TFDS."""
    names = [info.name for info in pkgutil.walk_packages(jaxdiff.__path__, "jaxdiff.")]
    return [importlib.import_module(name) for name in names if name != "jaxdiff.data.digits"]


def _public(module):
    return [(name, getattr(module, name)) for name in getattr(module, "__all__", [])]


# Nouns


def test_registry_misses_no_noun():
    """A new `struct.dataclass` has to be entered above."""
    found = {
        value.__name__
        for module in _modules()
        for value in vars(module).values()
        if inspect.isclass(value)
        and value.__module__.startswith("jaxdiff")
        and "__dataclass_fields__" in vars(value)
        and inspect.getmodule(value) is module
        and value.__eq__ is object.__eq__  # the mark of `struct.dataclass`
    }
    assert found - {"Linear"} == set(NOUNS)  # Linear is the abstract part of several
    for name, noun in NOUNS.items():
        assert type(noun.make(1.0)).__name__ == name


@every_noun
def test_noun_is_an_argument_that_compiles_once(name):
    make, use = NOUNS[name]
    traces = []

    @jax.jit
    def compiled(noun):
        traces.append(noun)
        return use(noun)

    first, second = compiled(make(1.0)), compiled(make(1.5))
    np.testing.assert_allclose(first, use(make(1.0)), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(second, use(make(1.5)), rtol=2e-5, atol=1e-6)
    assert len(traces) == 1
    if jax.tree.leaves(make(1.0)):
        assert not np.allclose(first, second), "the number does not reach the result"


@every_noun
def test_noun_survives_tree_map_and_pickle(name):
    make, use = NOUNS[name]
    noun = make(1.0)
    expected = use(noun)
    for copy in (jax.tree.map(lambda leaf: leaf, noun), pickle.loads(pickle.dumps(noun))):
        assert type(copy) is type(noun)
        assert jax.tree.structure(copy) == jax.tree.structure(noun)
        np.testing.assert_array_equal(use(copy), expected)


@every_noun
def test_noun_holds_whatever_jax_puts_in_it(name):
    """JAX rebuilds trees of shapes, tracers and sentinels: nothing may be validated there."""
    noun = NOUNS[name].make(1.0)
    sentinels = jax.tree.map(lambda _: object(), noun)
    assert jax.tree.structure(sentinels) == jax.tree.structure(noun)
    assert jax.tree.leaves(jax.tree.map(lambda _: None, noun)) == []


def test_nouns_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        jd.linear_beta().beta_max = 3.0  # pyright: ignore[reportAttributeAccessIssue]


def test_structures_tell_classes_apart():
    structures = {name: jax.tree.structure(noun.make(1.0)) for name, noun in NOUNS.items()}
    for one, other in itertools.combinations(structures, 2):
        assert structures[one] != structures[other], f"{one} passes for {other}"


def test_a_compiled_function_does_not_answer_for_another_class():
    """The trap of `jaxdiff.struct`, end to end: two schedules of two numbers each."""
    compiled = jax.jit(lambda schedule: jnp.stack(schedule(T)))
    for make in (jd.linear_beta, jd.subvp, jd.exploding):
        np.testing.assert_allclose(compiled(make()), jnp.stack(make()(T)), rtol=1e-6)


def test_jax_still_takes_dataclasses_for_one_another():
    """Pins the fault that `jaxdiff.struct` avoids: once this fails, flax's dataclass will do.

    The hashes differ, so whether a cache is taken in is a matter of luck.
    """

    @flax.struct.dataclass
    class Double:
        x: float

    @flax.struct.dataclass
    class Triple:
        x: float

    assert jax.tree.structure(Double(1.0)) == jax.tree.structure(Triple(1.0))


def test_options_are_compiled_in_and_compared():
    """`pytree_node=False` fields belong to the structure."""
    plain, other = jd.epsilon(), jd.epsilon(noise_level=parameterizations.log_sigma)
    assert jax.tree.structure(plain) != jax.tree.structure(other)
    assert jax.tree.leaves(plain) == []


def test_paths_name_fields():
    """Error messages of JAX speak of `.schedule.beta_max`, not of an index."""
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(VP)]
    assert paths == [".schedule.beta_min", ".schedule.beta_max", ".prior_mean"]


@pytest.mark.parametrize("kind", ["sample", "reverse_sde", "probability_flow", "log_likelihood"])
def test_no_sweep_compiles_anew(kind):
    """Keys, weights, β, η, the guidance weight and times: one trace for all."""
    traces = []

    def counted(params, x, noise_level):
        traces.append(kind)
        return apply(params, x, noise_level)

    def run(key=KEY, w=1.0, beta_max=20.0, eta=0.5, weight=2.0, end=1e-3):
        process = jd.Gaussian(jd.linear_beta(0.1, beta_max))
        nets = [
            jd.NetDenoiser({"w": jnp.float32(v)}, process, counted, jd.epsilon()) for v in (w, 0.1)
        ]
        denoise = jd.CFG(nets[0], nets[1], weight=weight)
        grid = jd.grids.uniform(5, end=end)
        if kind == "sample":
            return jd.sample(jd.DDIM(process, eta=eta), denoise, grid, key, X)
        if kind == "reverse_sde":
            return jd.reverse_sde(process, denoise, key, X, grid, eta=eta)
        if kind == "probability_flow":
            return jd.probability_flow(process, denoise, X, 1.0, end)
        return jd.log_likelihood(process, denoise, X, key=key, probes=1, t0=end).value

    first = run()
    count = len(traces)
    assert count > 0
    sweeps = [{"w": 1.1}, {"beta_max": 19.0}, {"weight": 1.0}, {"end": 2e-3}]
    if kind != "probability_flow":
        sweeps.append({"key": jax.random.key(1)})
    if kind in ("sample", "reverse_sde"):
        sweeps.append({"eta": 0.7})
    for sweep in sweeps:
        assert not np.allclose(run(**sweep), first, rtol=1e-6, atol=0), f"{sweep} changes nothing"
    assert len(traces) == count


# Documentation


def test_every_public_name_exists_and_is_documented():
    missing = []
    for module in _modules():
        assert module.__doc__ or hasattr(module, "__path__"), f"{module.__name__} has no docstring"
        for name, value in _public(module):
            if inspect.isroutine(value) or inspect.isclass(value):
                missing += _undocumented(f"{module.__name__}.{name}", value)
    assert not missing


def _undocumented(name, value):
    missing = [] if inspect.getdoc(value) else [name]
    if inspect.isclass(value):
        methods = inspect.getmembers(value, inspect.isfunction)
        own = [(m, f) for m, f in methods if not m.startswith("_")]
        own = [(m, f) for m, f in own if f.__module__.startswith("jaxdiff")]
        missing += [f"{name}.{m}" for m, f in own if not inspect.getdoc(f)]
    return missing


def test_top_level_functions_document_their_arguments():
    """Every parameter of every function that `jaxdiff` offers stands under its Args."""
    functions = [value for value in vars(jd).values() if inspect.isroutine(value)]
    functions += [value for name, value in _public(schedules) if inspect.isroutine(value)]
    for function in functions:
        doc = inspect.getdoc(function) or ""
        for parameter in inspect.signature(function).parameters:
            if len(inspect.signature(function).parameters) > 2 or "Args:" in doc:
                assert re.search(rf"^\s*\*{{0,2}}{parameter}: ", doc, re.M), (function, parameter)


def test_modules_say_what_is_public():
    for module in _modules():
        if not hasattr(module, "__path__"):
            assert hasattr(module, "__all__"), f"{module.__name__} has no __all__"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_config_fields_are_documented_and_used(path):
    tree = ast.parse(path.read_text())
    (config,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config")
    assert ast.get_docstring(config)
    fields = []
    for node, after in itertools.pairwise([*config.body, None]):
        if isinstance(node, ast.AnnAssign):
            assert isinstance(node.target, ast.Name)
            assert node.value is not None, f"{node.target.id} has no default"
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            assert documented, f"{node.target.id} is not documented"
            fields.append(node.target.id)
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "config"
    }
    assert all(hasattr(load_config(path).Config, name) for name in used)
    # Of what it inherits, a config may set defaults and leave the use to the options.
    inherited = {name for base in vars(recipes).values() for name in _fields(base)}
    assert set(fields) - inherited <= used


def test_shared_options_are_documented_and_used():
    source = inspect.getsource(recipes)
    for name in {name for base in vars(recipes).values() for name in _fields(base)}:
        assert re.search(rf"^    {name}: .*\n    \"\"\"", source, re.M), name
        used = rf"(self|config)\.{name}\b|at_least\(\d, (self|config)[^)]*\"{name}\""
        elsewhere = "".join(path.read_text() for path in (ROOT / "configs").glob("*.py"))
        assert re.search(used, source + elsewhere), name


def _fields(value):
    """Of a class of shared options."""
    ours = inspect.isclass(value) and value.__module__ == recipes.__name__
    return getattr(value, "__dataclass_fields__", {}) if ours else {}


# Imports


HEAVY = {
    "PIL",
    "grain",
    "matplotlib",
    "orbax",
    "sklearn",
    "tensorboardX",
    "tensorflow",
    "tensorflow_datasets",
    "torch",
    "tqdm",
    "tyro",
}


def test_importing_jaxdiff_loads_nothing_heavy():
    code = "import sys, jaxdiff; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "jax" in loaded
    assert loaded.isdisjoint(HEAVY), sorted(loaded & HEAVY)


def test_importing_jaxdiff_changes_no_settings():
    """Neither JAX's configuration, nor its choice of devices, which is made on first use."""
    code = (
        "import jax\n"
        "before = dict(jax.config.values)\n"
        "import jaxdiff, jaxdiff.networks, jaxdiff.plotting, jaxdiff.evaluation, jaxdiff.cli\n"
        "changed = {k for k, v in jax.config.values.items() if before.get(k, v) != v}\n"
        "from jax._src import xla_bridge\n"
        "print(changed or 'same', xla_bridge.backends_are_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["same", "False"]


def test_imports_point_one_way():
    """The contracts of .importlinter."""
    pytest.importorskip("importlinter", reason="needs the test extra")
    code = "from importlinter.cli import lint_imports_command as lint; lint(['--no-cache'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout
