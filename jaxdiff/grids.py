"""Decreasing time grids for sampling, from the prior's time to the data's.

A grid of n steps is an array of n + 1 times t_0 > t_1 > … > t_n. Where σ(0) = 0, steps that end at
t_n = 0 return the denoised x_0 itself; elsewhere samples keep the noise σ(0). Solvers that evaluate
the score at the end of a step (Heun, stochastic Runge–Kutta) want a grid that stops above 0 where
σ(0) = 0.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxdiff import struct
from jaxdiff.processes.gaussian import Gaussian
from jaxdiff.schedules import time_of_log_snr
from jaxdiff.typing import Grid

__all__ = [
    "check",
    "karras",
    "leading",
    "linspace",
    "quadratic",
    "trailing",
    "uniform",
    "uniform_log_snr",
]


def uniform(steps: int, *, start: float = 1.0, end: float = 0.0) -> Grid:
    """Equal steps in t.

    Args:
        steps: number of steps, ≥ 1.
        start: first time, in (0, 1].
        end: last time, in [0, start).

    Returns:
        [steps + 1] decreasing times.

    Raises:
        ValueError: for an argument outside its range.
    """
    _check_ends(steps, start, end, lowest=0.0)
    return jnp.linspace(start, end, steps + 1)


def quadratic(steps: int, *, start: float = 1.0, end: float = 0.0) -> Grid:
    """Equal steps in √t, which spend more of them at small noise.

    Args:
        steps: number of steps, ≥ 1.
        start: first time, in (0, 1].
        end: last time, in [0, start).

    Returns:
        [steps + 1] decreasing times.

    Raises:
        ValueError: for an argument outside its range.

    References: Song et al. 2020, arXiv:2010.02502, appendix D.2.
    """
    _check_ends(steps, start, end, lowest=0.0)
    inner = jnp.linspace(start**0.5, end**0.5, steps + 1) ** 2
    return inner.at[0].set(start).at[-1].set(end)


def trailing(steps: int, train_steps: int = 1000) -> Grid:
    """The times T, T − T/n, …, T/n of T training steps, over T, and 0.

    Args:
        steps: number of steps n, 1 ≤ n ≤ train_steps.
        train_steps: number of discrete times T of the training.

    Returns:
        [steps + 1] decreasing times, from 1 to 0.

    Raises:
        ValueError: for an argument outside its range.

    References: Lin et al. 2023, arXiv:2305.08891, section 3.3 and table 2.
    """
    _check_counts(steps, train_steps)
    return _discrete(np.round(np.arange(steps, 0, -1) * train_steps / steps), train_steps)


def linspace(steps: int, train_steps: int = 1000) -> Grid:
    """n times from T to 1 of T training steps, evenly, over T, and 0.

    Args:
        steps: number of steps n, 1 ≤ n ≤ train_steps.
        train_steps: number of discrete times T of the training.

    Returns:
        [steps + 1] decreasing times, from 1 to 0.

    Raises:
        ValueError: for an argument outside its range.

    References: Lin et al. 2023, arXiv:2305.08891, table 2.
    """
    _check_counts(steps, train_steps)
    return _discrete(np.round(np.linspace(train_steps, 1, steps)), train_steps)


def leading(steps: int, train_steps: int = 1000) -> Grid:
    """The times 1 + (n − 1) k, …, 1 + k, 1 of T training steps with k = ⌊T/n⌋, over T, and 0.

    It does not begin at 1: draw x from the marginal at its first time, not from the prior.

    Args:
        steps: number of steps n, 1 ≤ n ≤ train_steps.
        train_steps: number of discrete times T of the training.

    Returns:
        [steps + 1] decreasing times, to 0.

    Raises:
        ValueError: for an argument outside its range.

    References: Lin et al. 2023, arXiv:2305.08891, table 2.
    """
    _check_counts(steps, train_steps)
    return _discrete(1 + np.arange(steps)[::-1] * (train_steps // steps), train_steps)


def uniform_log_snr(
    process: Gaussian, steps: int, *, start: float = 1.0, end: float = 1e-3, to_zero: bool = True
) -> Grid:
    """Equal steps in log-SNR, the clock of exponential integrators.

    Args:
        process: whose log-SNR is meant.
        steps: number of steps, ≥ 1 (≥ 2 with `to_zero`).
        start: first time, in (0, 1], with α(start) > 0.
        end: the time up to which steps are equal, in (0, start).
        to_zero: whether the last step goes from `end` to 0.

    Returns:
        [steps + 1] decreasing times.

    Raises:
        ValueError: for an argument outside its range.

    References: Lu et al. 2022, arXiv:2206.00927, section 3.3.
    """
    return _warped(process, steps, start, end, to_zero, lambda snr: snr, lambda level: level)


def karras(
    process: Gaussian,
    steps: int,
    *,
    rho: float = 7.0,
    start: float = 1.0,
    end: float = 1e-3,
    to_zero: bool = True,
) -> Grid:
    """Equal steps in σ̃^{1/ρ}, σ̃ = σ/α.

    Args:
        process: whose σ̃ is meant.
        steps: number of steps, ≥ 1 (≥ 2 with `to_zero`).
        rho: the warp, ≥ 1.
        start: first time, in (0, 1], with α(start) > 0.
        end: the time up to which steps follow the rule, in (0, start).
        to_zero: whether the last step goes from `end` to 0.

    Returns:
        [steps + 1] decreasing times.

    Raises:
        ValueError: for an argument outside its range.

    References: Karras et al. 2022, arXiv:2206.00364, eq. 5.
    """
    if not rho >= 1.0:
        raise ValueError(f"rho must be at least 1, got {rho}.")
    return _warped(
        process,
        steps,
        start,
        end,
        to_zero,
        lambda snr: jnp.exp(-0.5 * snr / rho),
        lambda level: -2.0 * rho * jnp.log(level),
    )


def check(grid: Grid) -> None:
    """Refuses what is no grid, where its numbers are known (outside of jit).

    Raises:
        ValueError: unless the grid is a strictly decreasing list of at least two times in [0, 1].
    """
    if grid.ndim != 1 or grid.shape[0] < 2:
        raise ValueError(f"grid must be a list of at least two times, got shape {grid.shape}.")
    if isinstance(grid, Tracer):
        return
    times = np.asarray(grid)  # one transfer from the device
    falls = np.all(np.diff(times) < 0.0) and times[0] <= 1.0 and times[-1] >= 0.0
    struct.require(falls, f"grid must fall strictly, from at most 1 to at least 0, got {times}.")


def _warped(process, steps, start, end, to_zero, warp, log_snr_of) -> Grid:
    _check_ends(steps, start, end, lowest=np.nextafter(0.0, 1.0))
    if to_zero and steps < 2:
        raise ValueError(f"steps must be at least 2 for a grid that ends at zero, got {steps}.")
    extremes = jax.vmap(process.log_snr)(jnp.array([start, end]))
    struct.require(
        jnp.isfinite(extremes),
        f"start and end must be times of finite log-SNR, got start={start}, end={end} with "
        f"log-SNR {extremes}: start below 1 where alpha(1) = 0.",
    )
    ends = warp(extremes)
    levels = jnp.linspace(ends[0], ends[1], steps + (0 if to_zero else 1))
    inner = jax.vmap(lambda level: time_of_log_snr(process.schedule, log_snr_of(level)))(levels)
    # The ends are known exactly; only the times between them are found by bisection.
    inner = inner.at[0].set(start).at[-1].set(end)
    return jnp.append(inner, 0.0) if to_zero else inner


def _discrete(indices: np.ndarray, train_steps: int) -> Grid:
    return jnp.asarray(np.append(indices, 0) / train_steps, jnp.result_type(float))


def _check_counts(steps: int, train_steps: int) -> None:
    if not 1 <= steps <= train_steps:
        raise ValueError(
            f"steps must satisfy 1 <= steps <= train_steps, got steps={steps} with "
            f"train_steps={train_steps}."
        )


def _check_ends(steps: int, start: float, end: float, lowest: float) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    if not lowest <= end < start <= 1.0:
        bound = "0 <=" if lowest == 0.0 else "0 <"
        raise ValueError(
            f"start and end must satisfy {bound} end < start <= 1, got start={start}, end={end}."
        )
