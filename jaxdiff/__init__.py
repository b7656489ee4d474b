"""Score-based diffusion in JAX and Flax: the public names."""

import importlib
from typing import TYPE_CHECKING, Any

from jaxdiff import grids as grids
from jaxdiff import latents as latents
from jaxdiff import likelihood as likelihood
from jaxdiff import parameterizations as parameterizations
from jaxdiff import schedules as schedules
from jaxdiff import time_samplers as time_samplers
from jaxdiff import weightings as weightings
from jaxdiff.distributions import Categorical as Categorical
from jaxdiff.distributions import Normal as Normal
from jaxdiff.experiment import Experiment as Experiment
from jaxdiff.experiment import Likelihood as Likelihood
from jaxdiff.export import load_sampler as load_sampler
from jaxdiff.guidance.cfg import CFG as CFG
from jaxdiff.latents import decode as decode
from jaxdiff.latents import encode as encode
from jaxdiff.latents import interpolate as interpolate
from jaxdiff.latents import slerp as slerp
from jaxdiff.likelihood import joint_bound as joint_bound
from jaxdiff.likelihood import log_likelihood as log_likelihood
from jaxdiff.objectives.d3pm import categorical_bound as categorical_bound
from jaxdiff.objectives.d3pm import masked_cross_entropy as masked_cross_entropy
from jaxdiff.objectives.denoising import denoising as denoising
from jaxdiff.objectives.elbo import elbo as elbo
from jaxdiff.objectives.hybrid_score_matching import hybrid_score_matching as hybrid_score_matching
from jaxdiff.objectives.improved_ddpm import improved_ddpm as improved_ddpm
from jaxdiff.objectives.maximum_likelihood import maximum_likelihood as maximum_likelihood
from jaxdiff.objectives.score_matching import (
    implicit_score_matching as implicit_score_matching,
)
from jaxdiff.objectives.score_matching import sliced_score_matching as sliced_score_matching
from jaxdiff.objectives.vdm import vdm as vdm
from jaxdiff.parameterizations import NetDenoiser as NetDenoiser
from jaxdiff.parameterizations import epsilon as epsilon
from jaxdiff.parameterizations import learned_variance as learned_variance
from jaxdiff.parameterizations import score as score
from jaxdiff.parameterizations import v as v
from jaxdiff.parameterizations import velocity as velocity
from jaxdiff.parameterizations import x0 as x0
from jaxdiff.processes import d3pm as d3pm
from jaxdiff.processes.base import Denoised as Denoised
from jaxdiff.processes.cld import CLD as CLD
from jaxdiff.processes.cld import cld as cld
from jaxdiff.processes.cld import mixed_score as mixed_score
from jaxdiff.processes.cld import velocity_noise as velocity_noise
from jaxdiff.processes.d3pm import D3PM as D3PM
from jaxdiff.processes.gaussian import Gaussian as Gaussian
from jaxdiff.processes.gaussian import Rescaled as Rescaled
from jaxdiff.processes.linear_sde import affine_sde as affine_sde
from jaxdiff.processes.linear_sde import linear_sde as linear_sde
from jaxdiff.samplers.analytic_dpm import analytic_variance as analytic_variance
from jaxdiff.samplers.ancestral import Ancestral as Ancestral
from jaxdiff.samplers.ancestral import UnitVariance as UnitVariance
from jaxdiff.samplers.base import sample as sample
from jaxdiff.samplers.ddim import DDIM as DDIM
from jaxdiff.samplers.ddim import invert as invert
from jaxdiff.samplers.deis import DEIS as DEIS
from jaxdiff.samplers.dpm_solver import DPMSolver as DPMSolver
from jaxdiff.samplers.dpm_solver_plus import DPMSolverPP as DPMSolverPP
from jaxdiff.samplers.dpm_solver_plus import DPMSolverPPSingle as DPMSolverPPSingle
from jaxdiff.samplers.edm import EDMSampler as EDMSampler
from jaxdiff.samplers.euler import EulerMaruyama as EulerMaruyama
from jaxdiff.samplers.heun import Heun as Heun
from jaxdiff.samplers.langevin import AnnealedLangevin as AnnealedLangevin
from jaxdiff.samplers.langevin import Langevin as Langevin
from jaxdiff.samplers.langevin import UnderdampedLangevin as UnderdampedLangevin
from jaxdiff.samplers.pndm import PNDM as PNDM
from jaxdiff.samplers.predictor_corrector import PredictorCorrector as PredictorCorrector
from jaxdiff.samplers.sscs import SSCS as SSCS
from jaxdiff.samplers.switch import Window as Window
from jaxdiff.samplers.switch import switch as switch
from jaxdiff.samplers.unipc import UniPC as UniPC
from jaxdiff.schedules import cosine as cosine
from jaxdiff.schedules import edm as edm
from jaxdiff.schedules import exploding as exploding
from jaxdiff.schedules import from_betas as from_betas
from jaxdiff.schedules import learned_gamma as learned_gamma
from jaxdiff.schedules import linear_beta as linear_beta
from jaxdiff.schedules import straight as straight
from jaxdiff.schedules import subvp as subvp
from jaxdiff.solve import probability_flow as probability_flow
from jaxdiff.solve import reverse_sde as reverse_sde
from jaxdiff.training import make_train_step as make_train_step

if TYPE_CHECKING:
    from jaxdiff import interop as interop


def __getattr__(name: str) -> Any:
    """`jaxdiff.interop`, imported when it is first asked for, since it brings Flax along."""
    if name == "interop":
        return importlib.import_module("jaxdiff.interop")
    raise AttributeError(f"module 'jaxdiff' has no attribute {name!r}")
