"""Every kernel on a simulated GPU: equal to its definition, and without races."""

import pytest

NARROW = {"stages": 2, "store_n": 32}
"""Float32 results."""
GROUPED = {"r": 640, "n": 128, "k": 256}
SIZES = [100, 0, 256, 5]
"""Five tiles' room for four: one partial tile each for two groups, one group of none, one tile behind the last."""

CASES = {
    "dense": dict(kind="dense", m=256, n=128, k=384, out_dtype="float32", config={"stages": 3, "store_n": 32}),
    "dense, partial tiles, padded K": dict(kind="dense", m=101, n=196, k=300, config={"stages": 2}),
    "dense, three warpgroups": dict(kind="dense", m=200, n=128, k=384, config={"warpgroups": 3, "stages": 2}),
    "dense, cluster along M": dict(kind="dense", m=384, n=128, k=256, config={"stages": 2, "cluster": "m"}),
    "dense, 192 columns": dict(kind="dense", m=128, n=320, k=384, config={"tile_n": 192, "stages": 3}),
    "dense, 192 columns, cluster": dict(
        kind="dense", m=130, n=576, k=256, config={"tile_n": 192, "stages": 2, "cluster": "n"}
    ),
    "1D1D": dict(kind="dense", m=202, n=136, k=256, rows=1, out_dtype="float32", config=NARROW),
    "grouped": dict(kind="grouped", sizes=SIZES, **GROUPED, config={"stages": 3}, num_sms=3),
    "grouped, cluster": dict(
        kind="grouped", sizes=SIZES, **GROUPED, out_dtype="float32", config=NARROW | {"cluster": "n"}
    ),
    "grouped, 192 columns": dict(
        kind="grouped", sizes=[130, 5], r=384, n=192, k=256, config={"tile_n": 192, "stages": 2}
    ),
    "wgrad": dict(kind="wgrad", sizes=SIZES, r=640, n=128, k=256, config=NARROW),
    "wgrad, partial tiles": dict(kind="wgrad", sizes=SIZES, r=512, n=70, k=132, config=NARROW, num_sms=3),
    "wgrad, 192 columns, cluster": dict(
        kind="wgrad", sizes=[5, 256], r=384, n=64, k=320, config=NARROW | {"tile_n": 192, "cluster": "n"}
    ),
    "wgrad, adding": dict(kind="wgrad", sizes=SIZES, r=512, n=128, k=128, into=True, config=NARROW),
    "masked": dict(kind="masked", counts=[3, 0, 130, 70], c=132, n=256, k=256, config={"stages": 2}),
    "masked, one warpgroup": dict(
        kind="masked",
        counts=[0, 64, 7],
        c=65,
        n=192,
        k=256,
        config={"warpgroups": 1, "tile_n": 64, "stages": 4},
        num_sms=1,
    ),
    "16 bits, 256 columns, cluster": dict(
        kind="grouped_16bit", sizes=SIZES, r=640, n=264, k=200, config={"tile_n": 256, "stages": 2, "cluster": "n"}
    ),
    "16 bits, transposed": dict(
        kind="grouped_16bit", sizes=SIZES, r=640, n=136, k=200, contract=1, config={"stages": 2}, num_sms=3
    ),
    "16 bits, wgrad": dict(kind="wgrad_16bit", sizes=SIZES, r=640, n=128, k=200, config=NARROW),
    "16 bits, wgrad, adding": dict(
        kind="wgrad_16bit", sizes=SIZES, r=640, n=72, k=256, into=True, config=NARROW | {"tile_n": 256}, num_sms=1
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_its_definition(simulate, name):
    case = {"num_sms": 2} | CASES[name]
    answer = simulate(**case)
    assert "raised" not in answer, answer["raised"]
    assert answer["largest"] > 10
    in_float32 = case.get("out_dtype") == "float32" or "wgrad" in case["kind"]
    assert answer["error"] < (1e-6 if in_float32 else 4e-3)  # BF16 rounds at 2^-9
    assert not answer["races"]


WAIT = "plgpu.barrier_wait({}.at[slot])\n"
MULTIPLY = "product = pl.run_scoped(partial_sum, plgpu.ACC((ROWS, tile_n), jnp.float32))\n"
INDENT = " " * 16
MISTAKES = {
    "a slot is filled before it is empty": (WAIT.format("empty") + INDENT + "    # The slot", "# The slot"),
    "a slot is read before it is full": (WAIT.format("full") + INDENT + "next_b_scale", "next_b_scale"),
    "a slot is released before it is read": (
        MULTIPLY + INDENT + "if b_scale_tiles is None:\n" + INDENT + "    release(slot)\n",
        "release(slot)\n" + INDENT + MULTIPLY,
    ),
    "TMA may not see what threads wrote": ("plgpu.commit_smem()\n                rows", "rows"),
    "TMA may write before threads have read": ("fence_async_shared_cta()", "pass"),
    "both warpgroups take the same rows": ("pl.ds(warpgroup * ROWS, ROWS)\n\n", "pl.ds(0, ROWS)\n\n"),
    "more releases are awaited than come": ("Barrier(num_arrivals=warpgroups,", "Barrier(num_arrivals=warpgroups + 1,"),
    "fewer releases are awaited than come": ("Barrier(num_arrivals=warpgroups,", "Barrier(num_arrivals=1,"),
    "the scales are the next block's": ("block_scales(tile.first)", "block_scales(tile.first + 1)"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_show(simulate_changed, name):
    """What the tests above would say if the kernel were wrong: numbers, a race, an error, or no answer."""
    case = dict(kind="dense", m=256, n=256, k=512, out_dtype="float32", config=NARROW, num_sms=1)
    try:
        answer = simulate_changed(*MISTAKES[name])(seconds=30, **case)
    except TimeoutError:
        return
    if "raised" in answer:
        assert "RACE DETECTED" in answer["raised"] or "Barrier" in answer["raised"], answer["raised"]
    else:
        assert answer["races"] or answer["error"] > 1e-3, answer
