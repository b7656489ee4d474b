"""Programs of a run: equal to the run's own, alone with JAX, and without host or collectives."""

import dataclasses
import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export as jax_export
from test_cli import mistake

import jaxdiff as jd
from jaxdiff import cli, export, solve
from jaxdiff.checkpoints import Checkpoints
from jaxdiff.cli import main
from jaxdiff.experiment import load_config, load_run, save_run
from jaxdiff.training import init_state

pytest.importorskip("flatbuffers", reason="needs the export extra")

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = {"width": 8, "multipliers": (1,), "attention": (), "sampler_steps": 4}
KEY = jax.random.key(3)
NAMED = (*cli.STEPS, "probability_flow", "reverse_sde")


def saved_run(folder, source, **options):
    """A run whose averaged parameters are no others': noise, so that no output is zero."""
    module = load_config(source)
    experiment = module.experiment(module.Config(**options))
    save_run(folder, source, experiment.config)
    params = jax.jit(experiment.init)(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    noise = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [
        leaf + 0.03 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, noise, strict=True)
    ]
    state = init_state(params, experiment.optimizer, jax.random.key(2))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(1, state._replace(ema_params=jax.tree.unflatten(tree, noisy)), {})
    return folder


def parts(run):
    """The experiment of a run, and its averaged parameters."""
    experiment = load_run(run)
    return experiment, cli._parameters(experiment, run)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return saved_run(tmp_path_factory.mktemp("runs") / "plain", CONFIGS / "digits.py", **SMALL)


@pytest.fixture(scope="module")
def classy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    source = folder / "classes.py"
    digits = (CONFIGS / "digits.py").read_text()
    source.write_text(digits.replace("config.unet()", "config.unet(num_classes=10)"))
    return saved_run(folder / "classes", source, **SMALL)


def keys_of(key, n):
    """What a run's own sampler gives its samples, and as numbers."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n))
    return keys, jax.random.key_data(keys)


def reloaded(program):
    return jax.jit(jax_export.deserialize(bytearray(program.serialize())).call)


def close(found, expected, within=2e-6):
    """Of the largest number among what is expected."""
    scale = np.abs(expected).max()
    assert 0.1 < scale < 1000.0
    np.testing.assert_allclose(found, expected, rtol=0.0, atol=within * scale)


def other(name, steps=4):
    return functools.partial(cli._sampler, name, steps)


@functools.cache
def program_of(run, name):
    """What the command makes of a run."""
    experiment, params = parts(run)
    if name == "likelihood":
        return export.export_likelihood(experiment, params)
    if name != "run":
        experiment = export.sampled_by(experiment, other(name))
    return export.export_sampler(experiment, params)


# Programs


def test_program_samples_as_the_run_does_any_number(plain):
    experiment, params = parts(plain)
    sample, expected = reloaded(program_of(plain, "run")), experiment.sample(params, KEY, 5)
    for n in (3, 5):
        close(sample(keys_of(KEY, n)[1]), expected[:n])


@pytest.mark.parametrize("name", NAMED)
def test_program_of_another_sampler_is_that_sampler(plain, name):
    """By the public functions, each example on its own where steps are adaptive."""
    experiment, params = parts(plain)
    process, denoise = experiment.process, experiment.denoiser(params)
    keys, numbers = keys_of(KEY, 3)
    first, noise = jax.vmap(jax.random.split, out_axes=1)(keys)
    x = jax.vmap(process.prior((8, 8, 1)).sample)(first)
    if name == "probability_flow":
        options = {"per_example": True, "final_denoise": True}
        expected = jd.probability_flow(process, denoise, x, 1.0, 1e-3, **options)
    elif name == "reverse_sde":
        grid = jd.grids.uniform_log_snr(process, 4, to_zero=False)
        expected = jd.reverse_sde(process, denoise, noise, x, grid, final_denoise=True)
    else:
        step = {"ddim": jd.DDIM, "heun": jd.Heun, "ancestral": jd.Ancestral}
        step = step.get(name, jd.DPMSolverPP)(process)
        expected = jd.sample(step, denoise, jd.grids.uniform_log_snr(process, 4), noise, x)
    close(reloaded(program_of(plain, name))(numbers), expected)


def test_program_of_the_likelihood_is_that_of_the_run(plain):
    experiment, params = parts(plain)
    likelihood = experiment.likelihood
    x = likelihood.examples("test", KEY)[:3]
    keys, numbers = keys_of(KEY, 3)
    expected = jax.jit(functools.partial(likelihood.estimate, per_example=True))(params, keys, x)
    found = reloaded(program_of(plain, "likelihood"))
    for n in (2, 3):
        told = found(numbers[:n], x[:n])
        assert set(told) == {*export._OUTPUTS, "bits_per_dim"}
        assert told["converged"].all()
        np.testing.assert_array_equal(told["num_evaluations"], expected.num_evaluations[:n])
        # Two programs round in their own ways: an ulp of the weights is up to 3e-6 of the value.
        close(told["value"], expected.value[:n], within=1e-5)
        close(told["stderr"], expected.stderr[:n], within=1e-3)
        np.testing.assert_allclose(told["bits_per_dim"], likelihood.bits(-told["value"]))


def test_program_of_a_model_of_classes_takes_labels(classy):
    experiment, params = parts(classy)
    keys, numbers = keys_of(KEY, 3)
    sample = reloaded(export.export_sampler(experiment, params))
    by_ddim = export.sampled_by(experiment, other("ddim")).sampler
    first, second = jnp.array([0, 7, 3]), jnp.array([1, 7, 10])
    for run in (experiment.sampler, by_ddim):
        change = np.abs(run(params, keys, label=first) - run(params, keys, label=second))
        np.testing.assert_array_equal(change.max((1, 2, 3)) > 0.01, [True, False, True])
    for label in (first, second):
        close(sample(numbers, label), experiment.sampler(params, keys, label=label))
    with pytest.raises(ValueError, match="tuple of length 2"):
        sample(numbers)


@pytest.mark.parametrize("name", ["run", "likelihood", *NAMED])
def test_programs_call_nothing_outside(plain, name):
    """For all platforms, with an open number of examples; as it is compiled, shapes are checked."""
    program = program_of(plain, name)
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert program.in_avals[0].str_short() == "uint32[n,2]"
    assert program.nr_devices == 1
    calls = set(re.findall(r"custom_call @([\w.]+)", program.mlir_module()))
    assert calls <= {"shape_assertion"}


def test_noisier_times_are_found_without_the_host():
    """EDM's sampler searches for them: a bisection, which asks no host whether there is a root."""
    config = load_config(CONFIGS / "cifar10_edm.py")
    small = SMALL | {"shape": (8, 8, 1), "levels": 256, "blocks": 1}
    run = config.experiment(config.Config(**small))
    params = jax.eval_shape(run.init, KEY)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)
    text = export.export_sampler(run, zeros).mlir_module()
    assert "callback" not in text


def test_program_loads_with_jax_alone(plain, tmp_path, capsys):
    """By the very lines that the command prints, with this library and its own out of reach."""
    path = tmp_path / "sampler.jax"
    main(["export", str(plain), "--out", str(path)])
    printed = capsys.readouterr().out
    lines = re.findall(r"^    (.*)$", printed, re.M)
    assert "takes uint32[n,2]" in printed
    assert "returns float32[n,8,8,1]" in printed
    code = [
        "import sys, json",
        "names = 'jaxdiff flax diffrax equinox lineax optimistix jaxtyping optax orbax'.split()",
        "sys.modules.update(dict.fromkeys(names))",  # to import one of them raises
        *lines,
        "print(json.dumps(program(keys[:3]).tolist()))",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    experiment, params = parts(plain)
    keys = jax.random.split(jax.random.key(0), 64)[:3]
    close(np.asarray(json.loads(done.stdout)), experiment.sampler(params, keys))


def test_what_calls_the_host_is_refused(plain):
    experiment, params = parts(plain)

    def raising(process):
        return lambda denoise, keys, x: jd.probability_flow(process, denoise, x, 1.0, 1e-3)

    with pytest.raises(ValueError, match="calls the host"):
        export.export_sampler(export.sampled_by(experiment, raising), params)


# load_sampler


def test_loaded_sampler_is_that_of_the_run(plain):
    experiment, params = parts(plain)
    sample = jd.load_sampler(plain, size=2)
    five = sample(KEY, 5)
    close(five, experiment.sample(params, KEY, 5))
    close(sample(KEY, 1), five[:1])


def test_loaded_sampler_takes_a_label_or_one_a_sample(classy):
    experiment, params = parts(classy)
    sample, keys = jd.load_sampler(str(classy)), keys_of(KEY, 3)[0]
    for cond in (4, [0, 7, 3], np.array([9, 0, 9])):
        label = jnp.broadcast_to(jnp.asarray(cond), (3,))
        close(sample(KEY, 3, cond), experiment.sampler(params, keys, label=label))
    close(sample(KEY, 3), experiment.sample(params, KEY, 3))
    for cond in (10, -1, [0, 1], 1.0, [0, 1, 10]):
        with pytest.raises(ValueError, match="cond must be"):
            sample(KEY, 3, cond)


def test_loaded_sampler_compiles_once_a_number(plain, monkeypatch):
    traced = []

    def counting(experiment):
        def sampler(params, keys):
            traced.append(len(keys))
            return experiment.sampler(params, keys)

        return dataclasses.replace(experiment, sampler=sampler)

    monkeypatch.setattr(export, "load_run", lambda run: counting(load_run(run)))
    sample = jd.load_sampler(plain)
    for key, n in ((KEY, 3), (jax.random.key(8), 3), (KEY, 4), (KEY, 3)):
        sample(key, n)
    assert traced == [3, 4]


def test_mistakes_of_a_loaded_sampler(plain, tmp_path):
    sample = jd.load_sampler(plain)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        sample(KEY, 0)
    with pytest.raises(ValueError, match="cond must be None for a run without classes, got 3"):
        sample(KEY, 2, 3)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        jd.load_sampler(plain, size=0)
    with pytest.raises(ValueError, match="is not a folder"):
        jd.load_sampler(tmp_path / "nothing")
    for name in ("config.py", "config.json"):
        (tmp_path / name).write_text((plain / name).read_text())
    with pytest.raises(ValueError, match="must hold a checkpoint"):
        jd.load_sampler(tmp_path)


@pytest.mark.devices(4)
def test_devices_share_a_loaded_sampler(plain):
    """And each device's part is as without the others, whether or not they divide the number."""
    experiment, params = parts(plain)
    sample = jd.load_sampler(plain, size=1)
    for n in (2, 4, 7):
        found = sample(KEY, n)
        close(found, experiment.sample(params, KEY, n))


@pytest.mark.devices(4)
@pytest.mark.parametrize("name", ["run", "likelihood", "probability_flow", "reverse_sde"])
def test_devices_do_not_talk(plain, name):
    experiment, params = parts(plain)
    keys, x = keys_of(KEY, 8)[0], ()
    function = experiment.sampler
    if name == "likelihood":
        function = experiment.likelihood.estimate
        x = (experiment.likelihood.examples("test", KEY)[:8],)
    elif name != "run":
        function = export.sampled_by(experiment, other(name)).sampler
    shared = jax.jit(jd.parallel.per_shard(function, jd.parallel.data_mesh()))
    shapes = jax.eval_shape(lambda *given: given, params, keys, *x)
    text = shared.lower(*shapes).compile().as_text()
    assert "num_partitions=4" in text
    assert not re.search(r"all-|collective|reduce-scatter|callback", text)


# The command


def test_command_exports_the_likelihood(plain, tmp_path, capsys):
    path = tmp_path / "likelihood.jax"
    main(["export", str(plain), "--likelihood", "--out", str(path)])
    assert "takes uint32[n,2], int32[n,8,8,1]" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["likelihood.jax"]


MISTAKES = {
    "name": (["--sampler", "dim"], "--sampler must be one of run, ancestral, ddim"),
    "both": (["--likelihood", "--sampler", "ddim"], "--likelihood has no sampler, got"),
    "steps of the run's": (["--steps", "9"], "--steps are those of another --sampler, got 9"),
    "one step": (["--steps", "1", "--sampler", "heun"], "--steps must be at least 2, got 1"),
    "folder": (["--out", "nowhere/a.jax"], "--out must be a file in a folder that exists"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_of_the_command(plain, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    options, said = MISTAKES[name]
    assert said in mistake(capsys, "export", plain, "--out", "a.jax", *options)
    assert not list(tmp_path.iterdir())


def test_states_that_are_no_samples_are_left_to_the_runs_own_sampler(tmp_path, capsys):
    run = saved_run(tmp_path / "run", CONFIGS / "d3pm_digits.py", **SMALL)
    path = tmp_path / "d3pm.jax"
    said = mistake(capsys, "export", run, "--sampler", "ddim", "--out", path)
    assert "sampler must be the run's own" in said
    assert "D3PM" in said
    main(["export", str(run), "--out", str(path)])
    sample = jax.jit(jax_export.deserialize(bytearray(path.read_bytes())).call)
    experiment, params = parts(run)
    close(sample(keys_of(KEY, 2)[1]), experiment.sample(params, KEY, 2))


def test_without_flatbuffers_nothing_is_written(plain, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = mistake(capsys, "export", plain, "--out", tmp_path / "a.jax")
    assert "pip install 'jaxdiff[export]'" in said
    assert not list(tmp_path.iterdir())


# What is exported of diffrax


@pytest.mark.parametrize("name", ["probability_flow", "reverse_sde"])
def test_solves_that_give_up_are_nan_where_they_may_not_throw(name):
    """And bit for bit the same otherwise."""
    vp = jd.Gaussian(jd.linear_beta())
    denoise = jd.NetDenoiser({}, vp, lambda params, x, level: jnp.sin(3.0 * x), jd.epsilon())
    x = jax.random.normal(KEY, (3, 2))
    if name == "probability_flow":
        run = functools.partial(jd.probability_flow, vp, denoise, x, 1.0, 1e-3)
        few = {"max_steps": 3}
    else:
        run = functools.partial(jd.reverse_sde, vp, denoise, KEY, x, jd.grids.uniform(9, end=1e-3))
        chosen = {"solver": diffrax.SPaRK(), "controller": solve.adaptive(1e-4)}
        few = chosen | {"max_steps": 3}
    np.testing.assert_array_equal(run(throw=False), run())
    assert np.isnan(run(throw=False, **few)).all()


def test_steps_between_other_times_than_the_grids_are_nan():
    """As those of a gradient that is solved backwards would be."""

    def end(t0, t1):
        term, steps = diffrax.ODETerm(lambda t, y, args: y), solve._OnGrid(jnp.linspace(0, 1, 5))
        given = {"stepsize_controller": steps, "throw": False, "max_steps": 4}
        solution = diffrax.diffeqsolve(term, diffrax.Euler(), t0, t1, None, 1.0, **given)
        return float(solution.ys[-1])

    assert end(0.0, 1.0) == pytest.approx(1.25**4)
    assert np.isnan(end(1.0, 0.0))
    assert np.isnan(end(0.0, 0.75))
