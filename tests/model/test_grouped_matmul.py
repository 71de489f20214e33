"""The grouped product against a loop over the groups in float64, for every way to divide the rows."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.model import grouped_matmul as module
from dsjax.model.grouped_matmul import buffer_rows, group_rows, grouped_matmul, resolve
from dsjax.runtime import made_for

IMPLEMENTATIONS = ["tiles", "batched", "ragged"]
DIVISIONS = [
    (40, 0, 0, 0),
    (0, 0, 0, 40),
    (0, 0, 0, 0),
    (1, 1, 1, 37),
    (8, 16, 8, 8),
    (7, 0, 33, 0),
    (300, 0, 5, 130),
]
K, N = 12, 20
PLAIN = {"dtype": jnp.float32, "alignment": 32}
FOR_KERNELS = {"dtype": jnp.bfloat16, "alignment": 128}


def problem(sizes, alignment, total=None, dtype=np.float32):
    """Rows in the layout, matrices, an output gradient, and the group of every row (-1 for padding)."""
    rng = np.random.default_rng(0)
    rows = buffer_rows(total if total is not None else sum(sizes), len(sizes), alignment)
    group_of_row = np.full(rows, -1)
    start = 0
    for g, size in enumerate(sizes):
        group_of_row[start : start + size] = g
        start += -(-size // alignment) * alignment
    assert start <= rows
    x = rng.normal(size=(rows, K)) * (group_of_row >= 0)[:, None]
    w, dy = rng.normal(size=(len(sizes), N, K)), rng.normal(size=(rows, N))
    groups = group_rows(jnp.asarray(sizes, jnp.int32), rows, alignment)
    return *(jnp.asarray(a, dtype) for a in (x, w, dy)), groups, group_of_row


def loop_over_groups(x, w, dy, group_of_row):
    """y, dx and dw in float64. The gradient of rows that belong to no group is not looked at, hence not computed."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
    for g in range(len(w)):
        mine = group_of_row == g
        y[mine], dx[mine], dw[g] = x[mine] @ w[g].T, dy[mine] @ w[g], dy[mine].T @ x[mine]
    return y, dx, dw


@functools.partial(jax.jit, static_argnames="impl")
def values_and_gradients(x, w, dy, groups, impl):
    y, transpose = jax.vjp(lambda x, w: grouped_matmul(x, w, groups, impl=impl), x, w)
    return y, *transpose(dy)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("sizes", DIVISIONS, ids=str)
def test_equals_a_loop_over_groups(sizes, impl):
    x, w, dy, groups, group_of_row = problem(sizes, 8)
    y, dx, dw = values_and_gradients(x, w, dy, groups, impl=impl)
    want_y, want_dx, want_dw = loop_over_groups(x, w, dy, group_of_row)
    real = group_of_row >= 0
    np.testing.assert_allclose(y, want_y, atol=1e-4)
    np.testing.assert_allclose(dx[real], want_dx[real], atol=1e-4)
    np.testing.assert_allclose(dw, want_dw, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=3, max_size=3), st.sampled_from([4, 16]))
def test_no_division_overflows_the_buffer(sizes, alignment):
    """The buffer is made for a total of 100 rows, divided as it comes; every row is found once."""
    sizes = [min(s, 100 - sum(sizes[:i])) if sum(sizes[:i]) < 100 else 0 for i, s in enumerate(sizes)]
    x, w, dy, groups, group_of_row = problem(sizes, alignment, total=100)
    y, _, dw = values_and_gradients(x, w, dy, groups, "tiles")
    want_y, _, want_dw = loop_over_groups(x, w, dy, group_of_row)
    np.testing.assert_allclose(y, want_y, atol=1e-4)
    np.testing.assert_allclose(dw, want_dw, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_padding_does_not_leak(impl):
    """Whatever the output gradient holds in padding rows, matrices do not see it; padding stays zero in the output."""
    x, w, dy, groups, group_of_row = problem((7, 0, 33, 2), 8)
    padding = (group_of_row < 0)[:, None]
    y, _, dw = values_and_gradients(x, w, dy, groups, impl)
    _, _, dw_spoilt = values_and_gradients(x, w, jnp.where(padding, 1e6, dy), groups, impl)
    assert not np.any(np.where(padding, y, 0))
    np.testing.assert_array_equal(dw, dw_spoilt)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_bfloat16_sums_in_float32(impl):
    x, w, dy, groups, group_of_row = problem((300, 0, 5, 130), 8, dtype=jnp.bfloat16)
    y, dx, dw = values_and_gradients(x, w, dy, groups, impl)
    assert y.dtype == dx.dtype == dw.dtype == jnp.bfloat16
    want_y, want_dx, want_dw = loop_over_groups(x, w, dy, group_of_row)
    real = group_of_row >= 0
    for got, want in ((y[real], want_y[real]), (dx[real], want_dx[real]), (dw, want_dw)):
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-8, atol=2e-2)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_input_and_weight_gradients_are_separate_equations(impl):
    """A pipeline may run either without the other: dw's equations do not appear in what dx needs, nor the reverse."""
    x, w, dy, groups, _ = problem((7, 0, 33, 2), 8)

    def backward(x, w, dy):
        return jax.vjp(lambda x, w: grouped_matmul(x, w, groups, impl=impl), x, w)[1](dy)

    jaxpr = jax.make_jaxpr(backward)(x, w, dy).jaxpr

    def needed_for(variables):
        equations = []
        for equation in reversed(jaxpr.eqns):
            if any(out in variables for out in equation.outvars):
                equations.append(equation)
                variables = [*variables, *equation.invars]
        return equations

    def products(equations):
        return [e for e in equations if e.primitive.name == "jit" and e.params["name"].startswith("_rows_times")]

    (for_dx,), (for_dw,) = (products(needed_for([out])) for out in jaxpr.outvars)
    assert (for_dx.params["name"], for_dw.params["name"]) == ("_rows_times_matrices", "_rows_times_rows")


@functools.partial(jax.jit, static_argnames="impl")
def by_kernel(x, w, dy, groups, impl):
    """What `values_and_gradients` does, by an implementation that is not asked whether it works here."""
    y, transpose = jax.vjp(lambda x, w: module._grouped_matmul(x, w, groups, impl, 2), x, w)
    return y, *transpose(dy)


def check_kernels():
    """Compare them, and the rule of differentiation, on a simulated GPU; `pallas.matmul` is about more."""
    x, w, dy, groups, group_of_row = problem((5, 0, 130), 128, dtype=jnp.bfloat16)
    y, dx, dw = by_kernel(x, w, dy, groups, "interpret")
    assert y.dtype == dx.dtype == dw.dtype == jnp.bfloat16
    want_y, want_dx, want_dw = loop_over_groups(x, w, dy, group_of_row)
    real = group_of_row >= 0
    assert not np.any(np.where(real[:, None], 0, y))
    for got, want in ((y, want_y), (dx[real], want_dx[real]), (dw, want_dw)):
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-8, atol=2e-2)


def test_the_kernels_equal_a_loop_over_groups():
    """In a process of its own: the simulation of a wrong kernel may hang."""
    subprocess.run([sys.executable, __file__], check=True, timeout=120, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def lowered_for_gpu(dtype, alignment, impl="auto"):
    groups = group_rows(jnp.asarray((5, 0, 130), jnp.int32), buffer_rows(135, 3, alignment), alignment)
    x, w, dy = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((groups.rows, K), (3, N, K), (groups.rows, N)))

    def both(x, w, dy):
        y, transpose = jax.vjp(lambda x, w: grouped_matmul(x, w, groups, impl=impl), x, w)
        return y, *transpose(dy)

    with made_for("gpu"):
        return jax.jit(both).trace(x, w, dy).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("impl", ["auto", "mosaic"])
def test_on_hopper_the_three_products_are_kernels(impl):
    text = lowered_for_gpu(jnp.bfloat16, 128, impl)
    assert text.count("mosaic_gpu_v2") == 3 and "dot_general" not in text


@pytest.mark.parametrize("dtype, alignment", [(jnp.float32, 128), (jnp.float16, 128), (jnp.bfloat16, 64)])
def test_without_a_kernel_hopper_gets_batches(dtype, alignment):
    text = lowered_for_gpu(dtype, alignment)
    assert "mosaic_gpu" not in text and text.count("dot_general") == 3
    with pytest.raises(ValueError, match=r"needs a Hopper GPU .*, bfloat16 and alignment = 128; here are Hopper, "):
        lowered_for_gpu(dtype, alignment, "mosaic")


def test_errors_name_what_is_wrong():
    x, w, _, groups, _ = problem((7, 0, 33, 2), 8)
    with pytest.raises(ValueError, match=r"should be \["):
        grouped_matmul(x[1:], w, groups)
    with pytest.raises(ValueError, match="multiple of alignment = 8"):
        group_rows(jnp.zeros(4, jnp.int32), 12, 8)
    with pytest.raises(ValueError, match="no implementation 'triton'"):
        resolve("triton", "cpu", **PLAIN)


def test_auto_is_what_suits_the_platform():
    assert (resolve("auto", "cpu", **PLAIN), resolve("auto", "tpu", **FOR_KERNELS)) == ("tiles", "ragged")
    assert resolve("ragged", "cpu", **PLAIN) == "ragged"
    copied = (resolve("auto", "gpu", **PLAIN, copied_bytes=size) for size in (2**30, 2**30 + 1))
    assert tuple(copied) == ("batched", "tiles")
    assert resolve("batched", "gpu", **PLAIN, copied_bytes=2**40) == "batched"


def test_kernels_are_for_hopper():
    for platform in ("cpu", "tpu", "gpu"):  # the last without a Hopper GPU, as nothing is made for one
        with pytest.raises(ValueError, match=f"here are {platform}, bfloat16 and 128"):
            resolve("mosaic", platform, **FOR_KERNELS)
    with made_for("gpu"):
        assert resolve("mosaic", "gpu", **FOR_KERNELS) == resolve("auto", "gpu", **FOR_KERNELS) == "mosaic"
        assert resolve("auto", "gpu", **FOR_KERNELS, copied_bytes=2**40) == "mosaic"
        assert resolve("batched", "gpu", **FOR_KERNELS) == "batched"
        assert resolve("auto", "gpu", dtype=jnp.float32, alignment=128) == "batched"


if __name__ == "__main__":
    check_kernels()
