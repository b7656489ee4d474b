"""What sampling and likelihood cost beyond the network calls they make.

    python tests/benchmarks/sampling.py

Each solve is timed against its *bare* cost: as many calls of the same network, on the same batch,
inside one compiled `lax.scan` that does nothing else. The measure is the ratio of the two per
call. A rival that a user could write, the textbook DDIM and Euler–Maruyama scans, stands beside
them, and a library's, `diffuse-jax`, where that is installed.

All contenders take turns, A B C A B C …, and medians are compared, so that what else the machine
does meets all of them. Exits with 1 if a ratio is above its bound or if a sweep compiles anew.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

import jaxdiff as jd
from jaxdiff import networks
from jaxdiff.experiment import load_config

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.methods import METHODS


class Contender(NamedTuple):
    """Something to time.

    Attributes:
        run: () ↦ arrays.
        calls: the network calls that it makes.
        bare: the name of the contender that makes such calls and nothing else.
        bound: the largest ratio to it, per call; None if it is for information.
    """

    run: Callable[[], object]
    calls: int
    bare: str | None = None
    bound: float | None = None


class Counted:
    """The network, counting how often it is traced."""

    def __init__(self, apply):
        self.apply = apply
        self.traces = 0

    def __call__(self, params, x, noise_level):
        self.traces += 1
        return self.apply(params, x, noise_level)


def random_params(net, shape, key):
    """Parameters without the zeros that the last layers start from."""
    params = net.init(key, jnp.zeros((1, *shape)), jnp.zeros(1))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    pairs = zip(keys, leaves, strict=True)
    noisy = [leaf + 0.02 * jax.random.normal(key, leaf.shape) for key, leaf in pairs]
    return jax.tree.unflatten(structure, noisy)


def contenders(net, steps: int, batch: int, repeats_of_bare: int) -> dict[str, Contender]:
    shape = (8, 8, 1)
    process = jd.Gaussian(jd.linear_beta(0.1, 20.0))
    params = random_params(net, shape, jax.random.key(0))
    denoise = jd.NetDenoiser(params, process, net.apply, jd.epsilon())
    key = jax.random.key(1)
    x = process.prior((batch, *shape)).sample(key)
    grid = jd.grids.uniform(steps)
    direction = jax.random.rademacher(key, x.shape, x.dtype)

    def level(t):
        return jnp.full(batch, jnp.clip(process.log_snr(t), -20.0, 20.0) / 4.0)

    @jax.jit
    def bare(params, x):
        def call(x, t):
            return net.apply(params, x, level(t)), None

        return jax.lax.scan(call, x, grid[:-1])[0]

    @jax.jit
    def bare_jvp(params, x):
        def call(x, t):
            apply = lambda x: net.apply(params, x, level(t))
            value, change = jax.jvp(apply, (x,), (direction,))
            return value + change, None

        return jax.lax.scan(call, x, grid[1 : repeats_of_bare + 1])[0]

    @jax.jit
    def textbook_ddim(params, x):
        def step(x, times):
            t, s = times
            (alpha_t, sigma_t), (alpha_s, sigma_s) = process.schedule(t), process.schedule(s)
            noise = net.apply(params, x, level(t))
            return alpha_s * (x - sigma_t * noise) / alpha_t + sigma_s * noise, None

        return jax.lax.scan(step, x, (grid[:-1], grid[1:]))[0]

    @jax.jit
    def textbook_euler_maruyama(params, x, key):
        def step(carry, times):
            x, key = carry
            t, s = times
            key, fresh = jax.random.split(key)
            beta = 0.1 + t * (20.0 - 0.1)
            score = -net.apply(params, x, level(t)) / process.schedule(t)[1]
            drift = -0.5 * beta * x - beta * score
            noise = jnp.sqrt(beta * (t - s)) * jax.random.normal(fresh, x.shape)
            return (x - drift * (t - s) + noise, key), None

        return jax.lax.scan(step, (x, key), (grid[:-1], grid[1:]))[0][0]

    flow = jd.probability_flow(process, denoise, x, 1.0, 1e-3, evaluations=True)
    likelihood = jd.log_likelihood(process, denoise, 0.5 * jnp.tanh(x), key=key, probes=1, t0=1e-3)
    return {
        "bare network, in a scan": Contender(lambda: bare(params, x), steps),
        "bare network and jvp, in a scan": Contender(lambda: bare_jvp(params, x), repeats_of_bare),
        "jd.reverse_sde, Euler–Maruyama": Contender(
            lambda: jd.reverse_sde(process, denoise, key, x, grid),
            steps,
            "bare network, in a scan",
            1.05,
        ),
        "jd.probability_flow, Dopri5": Contender(
            lambda: jd.probability_flow(process, denoise, x, 1.0, 1e-3),
            int(flow.num_evaluations),
            "bare network, in a scan",
            1.10,
        ),
        "jd.log_likelihood, one probe": Contender(
            lambda: jd.log_likelihood(
                process, denoise, 0.5 * jnp.tanh(x), key=key, probes=1, t0=1e-3
            ),
            int(likelihood.num_evaluations[0]),
            "bare network and jvp, in a scan",
        ),
        "textbook DDIM scan": Contender(
            lambda: textbook_ddim(params, x), steps, "bare network, in a scan"
        ),
        "textbook Euler–Maruyama scan": Contender(
            lambda: textbook_euler_maruyama(params, x, key), steps, "bare network, in a scan"
        ),
        **every_sampler(process, denoise, steps, key, x),
        **rivals(net, params, process, steps, batch, shape),
    }


def every_sampler(process, denoise, calls: int, key, x) -> dict[str, Contender]:
    """All stepping samplers, at as many steps as the calls allow."""

    def contender(method):
        steps = method.steps(calls)
        step, grid = method.step(process), jd.grids.uniform(steps)
        model = method.model(process, denoise)
        run = lambda: jd.sample(step, model, grid, key, x)
        return Contender(run, method.calls(steps), "bare network, in a scan", 1.05)

    return {f"jd.sample, {name}": contender(method) for name, method in METHODS.items()}


def rivals(net, params, process, steps: int, batch: int, shape) -> dict[str, Contender]:
    """Euler–Maruyama and DDIM of diffuse-jax; none if it is not installed."""
    if importlib.util.find_spec("diffuse") is None:
        return {}
    from diffuse.denoisers.denoiser import Denoiser
    from diffuse.diffusion.sde import SDE, LinearSchedule
    from diffuse.integrator.deterministic import DDIMIntegrator
    from diffuse.integrator.stochastic import EulerMaruyamaIntegrator
    from diffuse.predictor import Predictor
    from diffuse.timer import VpTimer

    model = SDE(beta=LinearSchedule(b_min=0.1, b_max=20.0, t0=0.0, T=1.0))
    timer = VpTimer(n_steps=steps, eps=1e-3, tf=1.0)

    def contender(kind):
        @jax.jit
        def generate(params, key):
            def network(x, t):  # theirs maps over examples
                level = jnp.clip(process.log_snr(t), -20.0, 20.0) / 4.0
                return net.apply(params, x[None], level[None])[0]

            integrator = kind(model=model, timer=timer)
            predictor = Predictor(model, network, "noise")
            denoiser = Denoiser(integrator, model, predictor, shape)
            state, _ = denoiser.generate(key, steps, batch)
            return state.integrator_state.position

        key = jax.random.key(1)
        return Contender(lambda: generate(params, key), steps, "bare network, in a scan")

    return {
        "diffuse-jax, DDIM": contender(DDIMIntegrator),
        "diffuse-jax, Euler–Maruyama": contender(EulerMaruyamaIntegrator),
    }


def milliseconds_per_call(
    entries: dict[str, Contender], repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Times of all contenders, taking turns, after one round to compile."""
    times = {name: [] for name in entries}
    for turn in range(repeats + 1):
        for name, entry in entries.items():
            since = clock()
            jax.block_until_ready(entry.run())
            if turn:
                times[name].append(1e3 * (clock() - since) / entry.calls)
    return times


def recompilations() -> dict[str, int]:
    """How many traces sweeps cost after the first call: none, if all is well."""
    net = networks.MLP(width=8)
    x = jax.random.normal(jax.random.key(0), (4, 2))
    params = net.init(jax.random.key(0), x, jnp.zeros(4))
    grid = jd.grids.uniform(4, end=1e-3)
    extra = {}
    for kind in ("sample", "reverse_sde", "probability_flow", "log_likelihood"):
        counted = Counted(net.apply)

        def run(seed, scale, beta_max, eta, weight, kind=kind, counted=counted):
            process = jd.Gaussian(jd.linear_beta(0.1, beta_max))
            key, weights = jax.random.key(seed), jax.tree.map(lambda leaf: scale * leaf, params)
            denoise = jd.NetDenoiser(weights, process, counted, jd.epsilon())
            guided = jd.CFG(denoise, denoise, weight=weight)
            if kind == "sample":
                return jd.sample(jd.DDIM(process, eta=eta), guided, grid, key, x)
            if kind == "reverse_sde":
                return jd.reverse_sde(process, guided, key, x, grid, eta=eta)
            if kind == "probability_flow":
                return jd.probability_flow(process, guided, x, 1.0, 1e-3)
            return jd.log_likelihood(process, guided, x, key=key, probes=1)

        start = (0, 1.0, 20.0, 0.5, 1.0)
        run(*start)
        first = counted.traces
        for place, value in enumerate((1, 1.1, 19.0, 0.7, 2.0)):
            run(*start[:place], value, *start[place + 1 :])
        extra[kind] = counted.traces - first
    return extra


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=100, help="network calls of a sampler")
    parser.add_argument("--batch", type=int, default=16, help="images at a time")
    parser.add_argument("--repeats", type=int, default=7, help="timed turns, at least 7 to judge")
    parser.add_argument(
        "--cpu-time", action="store_true", help="of this process, on a CPU that others use too"
    )
    options = parser.parse_args()

    net = (
        load_config(Path(__file__).parents[2] / "configs" / "digits.py").Config(dropout=0.0).unet()
    )
    entries = contenders(net, options.steps, options.batch, options.steps // 4)
    clock = time.process_time if options.cpu_time else time.perf_counter
    times = milliseconds_per_call(entries, options.repeats, clock)
    median = {name: statistics.median(values) for name, values in times.items()}
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, {options}\n")
    print(f"{'':34}{'calls':>6}{'ms a call':>11}{'(fastest)':>11}{'ratio':>8}{'bound':>7}")
    failed = False
    for name, entry in entries.items():
        ratio = "" if entry.bare is None else f"{median[name] / median[entry.bare]:.3f}"
        bound = "" if entry.bound is None else f"{entry.bound:.2f}"
        failed |= bool(bound) and float(ratio) > float(bound)
        print(
            f"{name:34}{entry.calls:6}{median[name]:11.3f}{min(times[name]):11.3f}"
            f"{ratio:>8}{bound:>7}"
        )
    extra = recompilations()
    print("\ntraces over new keys, weights, β, η and guidance weights, beyond the first call:")
    print(", ".join(f"{kind} {count}" for kind, count in extra.items()))
    if failed or any(extra.values()):
        sys.exit("\nabove a bound" if failed else "\na sweep compiles anew")


if __name__ == "__main__":
    main()
