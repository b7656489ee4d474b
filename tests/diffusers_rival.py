"""The schedulers of diffusers, run on an ε-function of ours and on the times that they choose.

Their step k of T is our time (k + 1)/T; their last state is our time 0.
"""

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import jaxdiff as jd

TRAINING_STEPS = 1000
BETAS = np.linspace(1e-4, 0.02, TRAINING_STEPS)
PROCESS = jd.Gaussian(jd.from_betas(BETAS))


class Rival(NamedTuple):
    """What a scheduler did.

    Attributes:
        x: [b, …] its samples.
        times: the times, in ours, at which it called the network, in order.
    """

    x: np.ndarray
    times: np.ndarray


def run(
    scheduler_class: Any,
    steps: int,
    denoise: Callable,
    x: Any,
    *,
    timesteps: list[int] | None = None,
    noises: Any = None,
    **options: Any,
) -> Rival:
    """Samples with a scheduler of diffusers.

    Args:
        scheduler_class: such as `diffusers.DDIMScheduler`.
        steps: its number of inference steps.
        denoise: the denoiser of ours under `PROCESS`, from which it gets its ε-function.
        x: [b, …] states at the first time, at our scale.
        timesteps: steps of its choice to be replaced by these, where it allows that.
        noises: [n, b, …] what it is to draw as standard noise, in order, if it draws any.
        **options: of the scheduler.
    """
    import torch

    scheduler = scheduler_class(num_train_timesteps=TRAINING_STEPS, trained_betas=BETAS, **options)
    if timesteps is None:
        scheduler.set_timesteps(steps)
    else:
        scheduler.set_timesteps(timesteps=timesteps)
    noise_of = jax.jit(_noise)
    sample, draws, times = torch.tensor(np.asarray(x)), iter(() if noises is None else noises), []
    # Schedulers that keep x/α start from noise of the deviation that they ask for.
    in_sigma = float(scheduler.init_noise_sigma) != 1.0
    if in_sigma:
        sample = sample / float(PROCESS.schedule(_time(scheduler.timesteps[0]))[0])
    draw = lambda *args, **options: torch.tensor(np.asarray(next(draws)), dtype=sample.dtype)
    with mock.patch(f"{scheduler_class.__module__}.randn_tensor", draw, create=True):
        for step in scheduler.timesteps:
            seen = scheduler.scale_model_input(sample, step)
            times.append(float(_time(step)))
            noise = noise_of(denoise, jnp.asarray(seen.numpy()), _time(step))
            noise = torch.tensor(np.asarray(noise))
            sample = scheduler.step(noise, step, sample).prev_sample
    return Rival(sample.numpy(), np.array(times))


def _time(step: Any) -> jax.Array:
    return jnp.asarray((float(step) + 1.0) / TRAINING_STEPS)


def _noise(denoise: Callable, x: jax.Array, t: jax.Array) -> jax.Array:
    return jax.vmap(lambda x, x0: PROCESS.marginal(x0, t).noise(x))(x, denoise(x, t).mean)
