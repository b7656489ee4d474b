"""Attention by cuDNN's kernel, as far as can be seen without a GPU: what is asked of JAX."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import networks
from jaxdiff.networks import attention as module

KEY = jax.random.key(0)
FLASH = {
    "UNet": networks.UNet(16, (1,), 1, attention=(8,), dtype=jnp.bfloat16),
    "DiT": networks.DiT(width=16, depth=2, heads=2, dtype=jnp.bfloat16),
    "UViT": networks.UViT(width=16, depth=3, heads=2, dtype=jnp.bfloat16),
    "EDM2": networks.EDM2(16, (1,), 1, attention=(8,), head_width=8, dtype=jnp.bfloat16),
}


def on(platform, monkeypatch):
    monkeypatch.setattr(module, "get_backend", lambda: SimpleNamespace(platform_version=platform))


@pytest.mark.parametrize("name", FLASH)
def test_a_network_with_flash_calls_cudnn_on_an_nvidia_gpu(name, monkeypatch):
    """The program for it has the kernel, forward and backward; on a CPU nothing changes."""
    plain = FLASH[name]
    flash = plain.clone(flash=True)
    x, t = jax.random.normal(KEY, (2, 8, 8, 3)), jnp.ones(2)
    # Layers that are zero at the start would hide the attention.
    params = jax.tree.map(lambda p: p + 0.1, plain.init(KEY, x, t))
    np.testing.assert_array_equal(flash.apply(params, x, t), plain.apply(params, x, t))

    def calls(net):
        loss = lambda p: jnp.sum(net.apply(p, x, t) ** 2)
        text = jax.jit(jax.grad(loss)).trace(params).lower(lowering_platforms=("cuda",)).as_text()
        return ["__cudnn$fmhaSoftmax(" in text, "__cudnn$fmhaSoftmaxBackward(" in text]

    # JAX asks for the version of cuDNN, of which there is none here, before it makes a program.
    version = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    monkeypatch.setattr(version, lambda: 91000)
    on("cuda 12090", monkeypatch)
    assert calls(flash) == [True, True]
    assert calls(plain) == [False, False]


@pytest.mark.parametrize("platform", ["PJRT C API\ncuda 12090", "rocm 60000", "libtpu", "cpu"])
@pytest.mark.parametrize("n", [4, 5])
@pytest.mark.parametrize("m", [6, 7])
def test_flash_attention_is_jaxs_with_its_arguments(n, m, platform, monkeypatch):
    """Of odd numbers of tokens too, which reach cuDNN as even ones."""
    keys, sizes = jax.random.split(KEY, 3), (n, m, m)
    q, k, v = (
        jax.random.normal(key, (2, n, 3, 8), jnp.bfloat16)
        for key, n in zip(keys, sizes, strict=True)
    )
    wanted = module.attention(q, k, v)
    fused, asked = jax.nn.dot_product_attention, []

    def recorded(*arrays, implementation=None, **options):
        asked.append(implementation)
        assert implementation is None or all(a.shape[1] % 2 == 0 for a in arrays)
        return fused(*arrays, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    on(platform, monkeypatch)
    out = module.attention(q, k, v, flash=True)
    np.testing.assert_allclose(out.astype(float), wanted.astype(float), atol=2**-7)
    assert ("cudnn" in asked) == ("cuda" in platform)


def test_flash_attention_names_what_it_cannot_do():
    q = jnp.ones((1, 4, 2, 8))
    with pytest.raises(ValueError, match="bfloat16 or float16, got float32"):
        module.attention(q, q, q, flash=True)
    for width in (12, 264):
        q = jnp.ones((1, 4, 2, width), jnp.bfloat16)
        with pytest.raises(ValueError, match=f"multiple of 8, at most 256, got {width}"):
            module.attention(q, q, q, flash=True)
