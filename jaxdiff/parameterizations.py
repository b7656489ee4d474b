"""What the network predicts, and how that becomes the moments of x_0.

Every prediction in use is a combination of data and noise, F = a x_0 + b ε, and the state is
another, x = α x_0 + σ ε. Two equations, two unknowns:

    x_0 = (b x − σ F) / (b α − a σ).

So a parameterization is its pair (a, b), and this one formula reads all of them:

==============  ==================  ==================  =======================================
factory         a                   b                   undefined where
==============  ==================  ==================  =======================================
epsilon         0                   1                   α = 0 (F tells nothing of x_0)
x0              1                   0                   never
v               −σ                  α                   never
score           0                   −1/σ                α = 0 or σ = 0
velocity        dα/dt               dσ/dt               the SNR stands still
edm             see `EDM`           see `EDM`           σ = 0 or α = 0
==============  ==================  ==================  =======================================

`learned_variance` adds a second half of channels to any of them, for the variance of x_0.

The network sees c_in x, of about unit variance, and a noise level: by default log-SNR/4, a smooth
coordinate in which a smooth embedding keeps the drift smooth in t and adaptive solvers cheap.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxdiff import struct
from jaxdiff.processes.base import SDE, Denoised, Process
from jaxdiff.processes.gaussian import Gaussian
from jaxdiff.typing import Array, Data, Params, Scalar, State, Time

__all__ = [
    "EDM",
    "X0",
    "Apply",
    "Epsilon",
    "LearnedVariance",
    "Linear",
    "NetDenoiser",
    "NoiseLevel",
    "Parameterization",
    "Score",
    "StepNumber",
    "V",
    "Velocity",
    "discrete_time",
    "edm",
    "epsilon",
    "learned_variance",
    "log_sigma",
    "predict",
    "quarter_log_sigma",
    "quarter_log_snr",
    "score",
    "v",
    "velocity",
    "x0",
]

Apply = Callable[..., Any]
"""apply(params, x [b, …], noise_level [b], **condition) → [b, …]; a Flax module's `apply`."""

NoiseLevel = Callable[[Gaussian, Time], Time]
"""What the network is told of the time."""


def quarter_log_snr(process: Gaussian, t: Time) -> Time:
    """log-SNR/4, within ±5: the default noise level."""
    return jnp.clip(process.log_snr(t), -20.0, 20.0) / 4.0


def discrete_time(process: Gaussian, t: Time) -> Time:
    """999 t, for `Sinusoidal` embeddings of a continuous time (Song et al. 2021, appendix C)."""
    return 999.0 * t


class StepNumber(NamedTuple):
    """Step k = T t − 1 of a chain of T: 0 … T − 1, as the networks of DDPM are told.

    Attributes:
        total: T.
    """

    total: int

    def __call__(self, process: Gaussian, t: Time) -> Time:
        """T t − 1."""
        return self.total * t - 1.0


def log_sigma(process: Gaussian, t: Time) -> Time:
    """log(σ/α): for `GaussianFourier` embeddings (Song et al. 2021, appendix C)."""
    return -0.5 * jnp.clip(process.log_snr(t), -20.0, 20.0)


def quarter_log_sigma(process: Gaussian, t: Time) -> Time:
    """log(σ/α)/4: c_noise of EDM (Karras et al. 2022, table 1)."""
    return 0.25 * log_sigma(process, t)


@runtime_checkable
class Parameterization(Protocol):
    """An affine map from the network's output to the moments of x_0; for one example."""

    def inputs(self, process: Any, x: State, t: Time) -> tuple[Array, Time]:
        """(c_in · x, noise level): what the network is given."""
        ...

    def denoised(self, process: Any, out: Array, x: State, t: Time) -> Denoised:
        """c_skip · x + c_out · out: what its output means."""
        ...


@struct.dataclass
class Linear:
    """F = a x_0 + b ε, read by solving for x_0; the kinds below give (a, b)."""

    noise_level: NoiseLevel = struct.field(pytree_node=False, default=quarter_log_snr)

    def coefficients(self, process: Gaussian, t: Time) -> tuple[Scalar, Scalar]:
        """(a, b) at t."""
        raise NotImplementedError

    def inputs(self, process: Gaussian, x: State, t: Time) -> tuple[State, Time]:
        """(x / √(α² + σ²), noise level): unit variance for data of unit variance."""
        alpha, sigma = process.schedule(t)
        return x * jax.lax.rsqrt(alpha**2 + sigma**2), self.noise_level(process, t)

    def target(self, process: Gaussian, x0: Data, noise: State, t: Time) -> State:
        """F = a x_0 + b ε: the output of a perfect network that knew both."""
        a, b = self.coefficients(process, t)
        return a * x0 + b * noise

    def denoised(self, process: Gaussian, out: State, x: State, t: Time) -> Denoised:
        """x_0 = (b x − σ F) / (b α − a σ)."""
        alpha, sigma = process.schedule(t)
        a, b = self.coefficients(process, t)
        return Denoised((b * x - sigma * out) / (b * alpha - a * sigma))


@struct.dataclass
class Epsilon(Linear):
    """F = ε."""

    def coefficients(self, process: Gaussian, t: Time) -> tuple[Scalar, Scalar]:
        """(0, 1)."""
        return 0.0, 1.0


def epsilon(*, noise_level: NoiseLevel = quarter_log_snr) -> Epsilon:
    """The network predicts the noise: x_0 = (x − σF)/α.

    The score is −F/σ, so it stays finite wherever σ > 0. At α = 0 the output says nothing of x_0
    and the result is not finite: use another with a zero-terminal-SNR schedule.

    Args:
        noise_level: what the network is told of the time.

    References: Ho et al. 2020, arXiv:2006.11239, eqs. 9 and 14.
    """
    return Epsilon(noise_level=noise_level)


@struct.dataclass
class X0(Linear):
    """F = x_0."""

    def coefficients(self, process: Gaussian, t: Time) -> tuple[Scalar, Scalar]:
        """(1, 0)."""
        return 1.0, 0.0

    def denoised(self, process: Gaussian, out: State, x: State, t: Time) -> Denoised:
        """x_0 = F, also where σ = 0 and the two equations say the same."""
        return Denoised(out)


def x0(*, noise_level: NoiseLevel = quarter_log_snr) -> X0:
    """The network predicts the data: x_0 = F.

    Args:
        noise_level: what the network is told of the time.

    References: Ho et al. 2020, arXiv:2006.11239, section 3.2.
    """
    return X0(noise_level=noise_level)


@struct.dataclass
class V(Linear):
    """F = αε − σx_0."""

    def coefficients(self, process: Gaussian, t: Time) -> tuple[Scalar, Scalar]:
        """(−σ, α)."""
        alpha, sigma = process.schedule(t)
        return -sigma, alpha


def v(*, noise_level: NoiseLevel = quarter_log_snr) -> V:
    """The network predicts v = αε − σx_0, defined at every noise level.

    x_0 = (αx − σF)/(α² + σ²); the denominator is 1 for variance-preserving processes.

    Args:
        noise_level: what the network is told of the time.

    References: Salimans and Ho 2022, arXiv:2202.00512, section 4 and appendix D.
    """
    return V(noise_level=noise_level)


@struct.dataclass
class Score(Linear):
    """F = −ε/σ."""

    def coefficients(self, process: Gaussian, t: Time) -> tuple[Scalar, Scalar]:
        """(0, −1/σ)."""
        return 0.0, -1.0 / process.schedule(t)[1]


def score(*, noise_level: NoiseLevel = quarter_log_snr) -> Score:
    """The network's output is the score itself: x_0 = (x + σ²F)/α.

    Its size grows as 1/σ: a network that divides its last layer by σ learns it, a plain one does
    better with `epsilon`.

    Args:
        noise_level: what the network is told of the time.

    References: Song et al. 2021, arXiv:2011.13456, eq. 7.
    """
    return Score(noise_level=noise_level)


@struct.dataclass
class Velocity(Linear):
    """F = α' x_0 + σ' ε."""

    def coefficients(self, process: Gaussian, t: Time) -> tuple[Scalar, Scalar]:
        """(dα/dt, dσ/dt)."""
        return jax.jvp(process.schedule, (t,), (jnp.ones_like(t),))[1]


def velocity(*, noise_level: NoiseLevel = quarter_log_snr) -> Velocity:
    """The network predicts the velocity dx/dt of flow matching: ε − x_0 on the straight path.

    Args:
        noise_level: what the network is told of the time.

    References: Lipman et al. 2023, arXiv:2210.02747, eqs. 14–15.
    """
    return Velocity(noise_level=noise_level)


@struct.dataclass
class EDM(Linear):
    """F with x_0 = c_skip x̃ + c_out F(c_in x̃), x̃ = x/α of noise σ̃ = σ/α."""

    sigma_data: Scalar = 0.5

    def coefficients(self, process: Gaussian, t: Time) -> tuple[Scalar, Scalar]:
        """((1 − c_skip)/c_out, −c_skip σ̃/c_out)."""
        alpha, sigma = process.schedule(t)
        noise = sigma / alpha
        total = noise**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / total
        c_out = noise * self.sigma_data * jax.lax.rsqrt(total)
        return noise**2 / total / c_out, -c_skip * noise / c_out

    def inputs(self, process: Gaussian, x: State, t: Time) -> tuple[State, Time]:
        """(c_in x̃, noise level) with c_in = 1/√(σ̃² + σ_data²)."""
        alpha, sigma = process.schedule(t)
        scale = jax.lax.rsqrt((self.sigma_data * alpha) ** 2 + sigma**2)
        return x * scale, self.noise_level(process, t)


def edm(sigma_data: float = 0.5, *, noise_level: NoiseLevel = quarter_log_snr) -> EDM:
    """EDM's preconditioning: unit variance of input and target at every noise level.

    With σ̃ = σ/α:  c_skip = σ_d²/(σ̃² + σ_d²),  c_out = σ̃σ_d/√(σ̃² + σ_d²),
    c_in = 1/√(σ̃² + σ_d²), applied to x/α.

    Args:
        sigma_data: standard deviation of the data, > 0.
        noise_level: what the network is told of the time.

    Raises:
        ValueError: unless sigma_data > 0.

    Note: the paper's noise level is ln σ/4 = −log-SNR/8, half of ours in size and with its sign
        turned; that is a scaling of the embedding's frequencies.

    References: Karras et al. 2022, arXiv:2206.00364, table 1 and eqs. 7–8.
    """
    if not sigma_data > 0.0:
        raise ValueError(f"sigma_data must be positive, got {sigma_data}.")
    return EDM(sigma_data=sigma_data, noise_level=noise_level)


@struct.dataclass
class LearnedVariance:
    """Mean and variance of x_0 from a network with twice the channels; see `learned_variance`."""

    mean: Parameterization
    steps: Scalar

    def inputs(self, process: Gaussian, x: State, t: Time) -> tuple[State, Time]:
        """What the mean's parameterization gives the network."""
        return self.mean.inputs(process, x, t)

    def denoised(
        self, process: Gaussian, out: Float[Array, "..."], x: Float[Array, "..."], t: Time
    ) -> Denoised:
        """The mean from the first half of the channels, the variance from the second."""
        out, fraction = jnp.split(out, 2, axis=-1)
        mean = self.mean.denoised(process, out, x, t).mean
        return Denoised(mean, self.variance(process, 0.5 * (fraction + 1.0), t))

    def variance(self, process: Gaussian, v: Array, t: Time) -> Array:
        """Var[x_0 | x_t] such that the step t → t − 1/T has the variance β^v β̃^{1−v}."""
        t = jnp.maximum(t, 0.01 / self.steps)  # at 0 there is no step left to read it from
        alpha, sigma = process.schedule(t)
        lower, gain = self._bounds(process, t)
        raised = jnp.maximum(lower, self._bounds(process, jnp.maximum(t, 2.0 / self.steps))[0])
        upper = lower + gain**2 * sigma**2 / (alpha**2 + sigma**2)
        raised = jnp.minimum(raised, upper)
        # β^v β̃^{1−v} − β̃ without the difference of two nearly equal numbers.
        excess = raised - lower + raised * jnp.expm1(v * jnp.log(upper / raised))
        return jnp.maximum(excess, 0.0) / gain**2

    def _bounds(self, process: Gaussian, t: Time) -> tuple[Time, Time]:
        """The training step's β̃, and the weight of x_0 in its mean."""
        known = Denoised(jnp.ones_like(t))
        s = jnp.maximum(t - 1.0 / self.steps, 0.0)
        step = process.posterior(jnp.zeros_like(t), known, t, s)
        return jnp.square(step.std), step.mean


def learned_variance(mean: Parameterization, *, steps: int = 1000) -> LearnedVariance:
    """The network also predicts the reverse variance, between its two bounds in log space.

    Of twice the channels of the data, the first half predicts the mean as `mean` says; the second,
    v', sets the variance of the step from t to t − 1/T to

        exp(v log β + (1 − v) log β̃),     v = (v' + 1)/2,

    where β̃ is that of a known x_0 and β that of x_0 as uncertain as N(0, I) data would leave it. It
    is stated as the variance of x_0 that explains it, from which every other stride follows by the
    law of total variance. Train it with `objectives.improved_ddpm`.

    Args:
        mean: what the first half of the channels predicts.
        steps: T ≥ 2, the number of equal steps that the variance is learned for.

    Raises:
        ValueError: unless steps ≥ 2.

    Note: a reverse variance below β̃ would be a negative variance of x_0, and is taken for β̃. Where
        β̃ vanishes, at the first step, the paper puts the second one's into the formula; so do we,
        for all t ≤ 2/T. For strided sampling the paper evaluates it between the new β̃ and β.

    References: Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 15.
    """
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}.")
    return LearnedVariance(mean=mean, steps=steps)


def predict(
    apply: Apply,
    params: Params,
    process: Process | SDE,
    parameterization: Parameterization,
    x: Float[Array, "b ..."],
    t: Float[Array, "b"],
    given: Mapping[str, Any],
) -> Denoised:
    """Runs the network on a batch, each example at its own time, and reads its output.

    Args:
        apply: the network.
        params: its parameters.
        process: the forward process.
        parameterization: what the output means.
        x: [b, …] states.
        t: [b] times.
        given: to the network by name: further arrays [b, …], and options such as `rngs`.

    Returns:
        The moments of x_0, of the dtype of x whatever the network computes in.
    """
    inputs, level = jax.vmap(lambda x, t: parameterization.inputs(process, x, t))(x, t)
    out = apply(params, inputs, level, **given).astype(x.dtype)
    return jax.vmap(lambda out, x, t: parameterization.denoised(process, out, x, t))(out, x, t)


@struct.dataclass
class NetDenoiser:
    """A network and its parameterization as a `Denoiser`.

    Attributes:
        params: the network's parameters, a leaf tree: new weights compile nothing.
        process: the forward process that it was trained under.
        apply: apply(params, x [b, …], noise_level [b], **condition) → [b, …].
        parameterization: what its output means.
        condition: further arrays [b, …] for the network, such as {"label": …}.
    """

    params: Params
    process: Process
    apply: Apply = struct.field(pytree_node=False)
    parameterization: Parameterization
    condition: Mapping[str, Array] = struct.field(default_factory=dict)

    def __call__(self, x: State, t: Time) -> Denoised:
        """The moments of x_0 given the states x [b, …] at one time t."""
        times = jnp.full(x.shape[:1], t)
        return predict(
            self.apply, self.params, self.process, self.parameterization, x, times, self.condition
        )
