"""What a likelihood costs, against the standard recipe: SciPy's RK45 on the host.

    python tests/benchmarks/likelihood_speed.py [--tolerance 1e-5]

The recipe of the papers' code (Song et al. 2021, arXiv:2011.13456): one jitted program for the
drift, another for eᵀ (∂v/∂x) e by a vector–Jacobian product, for one probe e an image, with
`scipy.integrate.solve_ivp` around them, all of the batch one flat vector. The product computes the
drift anyway: "fused" is the recipe that takes it from there, in one program.
Ours has the same probes and the same end. Its default, the norm of the worst image, is as accurate
at equal tolerance, and that is what counts; a row has the recipe's norm. Networks are trained for a
moment, on digits (8×8×1) and on generated pictures (32×32×3), once with the library's smooth
embedding of the noise level and once with the papers' sinusoids of 1000 t.

All contenders take turns, and medians are compared; the error is the distance to a solve at a tenth
of the tolerance. Exits with 1 unless ours is 2.3 × faster with the same network, 5 × faster than
the recipe with the papers' embedding, takes at most 1.15 × as long as its calls of network and
derivative by themselves, and ours is within the tolerance or as near as the recipe.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp

import jaxdiff as jd
from jaxdiff import networks, trace
from jaxdiff.data.batches import Batches
from jaxdiff.data.images import dequantize, load_images
from jaxdiff.networks import Sinusoidal
from jaxdiff.schedules import time_of_log_snr
from jaxdiff.solve import adaptive
from jaxdiff.training import fit, init_state, make_train_step, warmup_adam

PROCESS = jd.Gaussian(jd.linear_beta(0.1, 20.0))
T0 = 1e-5


class Setup(NamedTuple):
    """Images, and the size of a network for them."""

    images: Any
    levels: int
    batch: int
    steps: int
    unet: dict[str, Any]


def pictures(key: Any, n: int, side: int = 32) -> np.ndarray:
    """Coloured discs with soft edges before a gradient, 256 levels."""

    def draw(key):
        keys = jax.random.split(key, 4)
        axis = jnp.linspace(-1.0, 1.0, side)
        y, x = jnp.meshgrid(axis, axis, indexing="ij")
        centres = jax.random.uniform(keys[0], (5, 2), minval=-1.0)
        radii = jax.random.uniform(keys[1], (5,), minval=0.1, maxval=0.5)
        colours = jax.random.uniform(keys[2], (5, 3))
        slope = jax.random.normal(keys[3], (2, 3))
        image = jax.nn.sigmoid(x[..., None] * slope[0] + y[..., None] * slope[1])
        for centre, radius, colour in zip(centres, radii, colours, strict=True):
            far = jnp.hypot(x - centre[0], y - centre[1])
            inside = jax.nn.sigmoid((radius - far) * side)[..., None]
            image = inside * colour + (1 - inside) * image
        return image

    drawn = jax.vmap(draw)(jax.random.split(key, n))
    return np.asarray(jnp.round(255 * drawn)).astype(np.uint8)


def setups(steps: int, steps_large: int) -> dict[str, Setup]:
    digits = {"width": 16, "multipliers": (1, 2), "blocks": 1, "attention": (4,)}
    large = {"width": 16, "multipliers": (1, 2, 2), "blocks": 1, "attention": ()}
    return {
        "digits, 8×8×1": Setup(load_images("digits", "train").x, 17, 64, steps, digits),
        "pictures, 32×32×3": Setup(pictures(jax.random.key(0), 1024), 256, 8, steps_large, large),
    }


def papers_level(level: Any) -> Any:
    """1000 t of a noise level log-SNR/4."""
    return 1000.0 * jax.vmap(lambda level: time_of_log_snr(PROCESS.schedule, 4.0 * level))(level)


def trained(setup: Setup, *, smooth: bool) -> jd.NetDenoiser:
    """A network after some training, as a denoiser."""
    shape = setup.images.shape[1:]
    if smooth:
        net = networks.UNet(**setup.unet)
        apply = net.apply
    else:
        net = networks.UNet(**setup.unet, embedding=Sinusoidal())

        def apply(params, x, noise_level, **options):
            return net.apply(params, x, papers_level(noise_level), **options)

    objective = jd.denoising(
        apply, PROCESS, jd.epsilon(), time_sampler=jd.time_samplers.low_discrepancy()
    )

    def loss(params, key, batch):
        return objective(params, key, {"x": dequantize(key, batch["x"], setup.levels)})

    optimizer = warmup_adam(2e-3, steps=setup.steps, warmup=setup.steps // 10)
    step = make_train_step(loss, optimizer, ema_decay=0.99)
    params = net.init(jax.random.key(0), jnp.zeros((1, *shape)), jnp.zeros(1))
    state = init_state(params, optimizer, jax.random.key(1))
    batches = Batches({"x": setup.images}, min(32, setup.batch))
    state = fit(step, state, batches, steps=setup.steps, progress=False, eval_every=setup.steps)
    return jd.NetDenoiser(state.ema_params, PROCESS, apply, jd.epsilon())


def recipe(
    denoise: Any, x: Any, probe: Any, tolerance: float, *, fused: bool = False
) -> Callable[[], tuple[np.ndarray, int]]:
    """() ↦ log p of each image [b], and calls."""

    @jax.jit
    def drift(denoise, x, t):
        x0 = denoise(x, t).mean
        return jax.vmap(lambda x, x0: PROCESS.velocity(x, x0, t))(x, x0)

    @jax.jit
    def both(denoise, x, t):
        velocity, pullback = jax.vjp(lambda x: drift(denoise, x, t), x)
        return velocity, trace.inner(pullback(probe)[0], probe)

    @jax.jit
    def divergence(denoise, x, t):
        return both(denoise, x, t)[1]

    def field(*args):
        return both(*args) if fused else (drift(*args), divergence(*args))

    def slope(t, flat):
        y = jnp.asarray(flat[: x.size].reshape(x.shape), jnp.float32)
        velocity, change = field(denoise, y, jnp.float32(t))
        return np.concatenate([np.asarray(velocity).ravel(), np.asarray(change)])

    def solve():
        start = np.concatenate([np.asarray(x, np.float64).ravel(), np.zeros(len(x))])
        found = solve_ivp(slope, (T0, 1.0), start, rtol=tolerance, atol=tolerance, method="RK45")
        end = jnp.asarray(found.y[: x.size, -1].reshape(x.shape), jnp.float32)
        prior = jax.vmap(PROCESS.prior(x.shape[1:]).log_prob)(end)
        return np.asarray(prior, np.float64) + found.y[x.size :, -1], found.nfev

    return solve


def ours(denoise: Any, x: Any, controller: Any) -> Callable[[], tuple[np.ndarray, int]]:
    def solve():
        found = jd.log_likelihood(
            PROCESS,
            denoise,
            x,
            key=jax.random.key(3),
            probes=1,
            probe=trace.rademacher,
            t0=T0,
            controller=controller,
        )
        return np.asarray(found.value, np.float64), int(found.num_evaluations.max())

    return solve


def stand_alone(denoise: Any, x: Any, probe: Any, calls: int) -> Callable[[], None]:
    """Network and derivative, called from the host."""

    @jax.jit
    def one(denoise, x, t):
        return jax.jvp(lambda x: denoise(x, t).mean, (x,), (probe,))

    def run():
        t = jnp.float32(0.5)
        for _ in range(calls):
            jax.block_until_ready(one(denoise, x, t))

    return run


def compare(name: str, setup: Setup, tolerance: float, repeats: int) -> list[str]:
    """Prints a table, and says what is missed."""
    smooth, papers = trained(setup, smooth=True), trained(setup, smooth=False)
    x = dequantize(jax.random.key(2), setup.images[: setup.batch].astype(int), setup.levels)
    # The very probes that `log_likelihood` draws.
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(3), jnp.arange(setup.batch))
    probe = jax.vmap(lambda key: trace.rademacher(key, 1, x.shape[1:], x.dtype)[0][0])(keys)
    same_norm = diffrax.PIDController(rtol=tolerance, atol=tolerance)
    runs = {
        "ours": ours(smooth, x, adaptive(tolerance)),
        "ours, the recipe's norm": ours(smooth, x, same_norm),
        "recipe": recipe(smooth, x, probe, tolerance),
        "recipe, fused": recipe(smooth, x, probe, tolerance, fused=True),
        "ours, 1000 t": ours(papers, x, adaptive(tolerance)),
        "recipe, 1000 t": recipe(papers, x, probe, tolerance),
    }
    truth = {
        key: ours(denoise, x, adaptive(0.1 * tolerance))()[0]
        for key, denoise in (("", smooth), (", 1000 t", papers))
    }
    found = {key: run() for key, run in runs.items()}  # compiles, too
    calls = {key: count for key, (_, count) in found.items()}
    bare = stand_alone(smooth, x, probe, 50)
    bare()
    times: dict[str, list[float]] = {key: [] for key in (*runs, "bare")}
    for _ in range(repeats):
        for key, run in (*runs.items(), ("bare", bare)):
            since = time.perf_counter()
            run()
            times[key].append(time.perf_counter() - since)
    median = {key: statistics.median(values) for key, values in times.items()}
    one = median["bare"] / 50
    print(f"\n{name}, batch {setup.batch}, tolerance {tolerance:.0e}; a call with its derivative")
    print(f"takes {1e3 * one:.2f} ms by itself\n")
    print("| | calls | s | over calls × stand-alone | mean error, nats/dim |")
    print("|---|---|---|---|---|")
    dim, errors, wrong = x[0].size, {}, []
    for key in runs:
        error = np.abs(found[key][0] - truth[", 1000 t" if "1000" in key else ""]).mean() / dim
        share = median[key] / (calls[key] * one)
        print(f"| {key} | {calls[key]} | {median[key]:.2f} | {share:.2f} | {error:.1e} |")
        errors[key] = error
    if errors["ours"] > max(tolerance, errors["recipe"]):
        wrong.append(f"{name}: ours is off by {errors['ours']:.1e} nats/dim, and more than theirs")
    faster = {key: median[key] / median["ours"] for key in runs}
    limit = median["ours"] / (calls["ours"] * one)
    print(f"\n{faster['recipe']:.2f} × faster with the same network ", end="")
    print(f"({faster['recipe, fused']:.2f} × than the fused recipe), ", end="")
    print(f"{faster['recipe, 1000 t']:.2f} × faster than the recipe with 1000 t.")
    for value, bound, what in (
        (faster["recipe"], 2.3, "the same network"),
        (faster["recipe, 1000 t"], 5.0, "the papers' embedding"),
        (1.15 / limit, 1.0, "the limit"),
    ):
        if value < bound:
            wrong.append(f"{name}: {value:.2f} of {bound} against {what}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--tolerance", type=float, default=1e-5, help="of all solvers")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns")
    parser.add_argument("--steps", type=int, default=1500, help="of training on digits")
    parser.add_argument("--steps-large", type=int, default=200, help="of training on pictures")
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, {args}")
    wrong = []
    for name, setup in setups(args.steps, args.steps_large).items():
        wrong += compare(name, setup, args.tolerance, args.repeats)
    for line in wrong:
        print("MISSED:", line)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
