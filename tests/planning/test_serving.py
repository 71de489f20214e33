"""What a deployment is planned to take, beside what its arrays take."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dsjax.inference.cache import empty_cache
from dsjax.inference.deployment import Deployment
from dsjax.inference.layout import Layout, mesh_of, placed, weight_specs
from dsjax.inference.weights import arranged, first_placement
from dsjax.model.transformer import initial_parameters
from dsjax.planning.serving import report_of_serving, weight_bytes
from dsjax.settings import SERVING, NoOptions, is_in, load_run

DEPLOYMENTS = ("v3_prefill_32", "v3_decode_320", "v3_decode_144")


def deployment(name):
    return load_run([name], NoOptions, "plan", Deployment)[0]


@pytest.mark.parametrize("name", ["tiny_prefill", "tiny_decode"])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_weights_take_what_is_planned(name, precision):
    """To the byte, on every device."""
    planned = replace(deployment(name), precision=precision)
    # In FP8, halves of the heads are whole blocks of 128 x 128.
    model = replace(planned.model, num_hidden_layers=2, qk_nope_head_dim=96, qk_rope_head_dim=32, v_head_dim=64)
    planned = replace(planned, model=model)
    model = planned.served
    params, _ = initial_parameters(model, seed=0)
    held = first_placement(model, planned.layout).expert_of_slot
    weights = arranged(params, model, planned.layout, held, jnp.bfloat16, fp8=precision == "fp8")
    on_devices = placed(weights, weight_specs(weights), mesh_of(planned.layout))
    for device in jax.devices()[: planned.layout.devices]:
        there = [s for leaf in jax.tree.leaves(on_devices) for s in leaf.addressable_shards if s.device == device]
        assert sum(shard.data.nbytes for shard in there) == sum(weight_bytes(planned).values())


def test_the_cache_takes_what_is_planned():
    planned = deployment("tiny_decode")
    engine = planned.engine
    pages = engine.slots // planned.layout.groups * engine.context // engine.page_size + 1
    cache = empty_cache(planned.served, pages, engine.page_size, jnp.bfloat16, engine.cache_format)
    found = sum(array.nbytes for array in cache.arrays.values())
    assert report_of_serving(planned, "h800").memory["latent cache"] == found


def test_one_expert_on_a_device():
    """The report's decode unit: 58 layers of an expert in FP8, with a scale per 128 x 128."""
    expert = 3 * 7168 * 2048
    assert weight_bytes(deployment("v3_decode_320"))["experts"] == 58 * (expert + 4 * expert // 128**2)


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_the_reports_units_fit_and_are_faster_than_their_days_mean(name):
    """Rates of kernels are those of full batches; a day's mean has nights in it."""
    report = report_of_serving(deployment(name), "h800")
    assert report.fits
    mean = 4000 if "prefill" in name else 1850
    assert mean < report.tokens_per_s_per_device < 3 * mean


def test_more_of_a_thing_takes_more():
    plain = deployment("v3_decode_144")
    longer = replace(plain, engine=replace(plain.engine, context=8192))
    one_by_one = replace(plain, layout=replace(plain.layout, micro_batches=1))
    reports = [report_of_serving(d, "h800") for d in (plain, longer, one_by_one)]
    assert reports[1].memory["latent cache"] == pytest.approx(2 * reports[0].memory["latent cache"], rel=1e-3)
    assert reports[1].parts["attention over latents"] == 2 * reports[0].parts["attention over latents"]
    assert reports[2].pass_seconds > reports[0].pass_seconds
    assert report_of_serving(plain, "h200").tokens_per_s_per_device >= reports[0].tokens_per_s_per_device


def test_the_command(capsys):
    from dsjax.plan import main

    main(["v3_decode_144"])
    shown = capsys.readouterr().out
    assert "288 slots for 256 experts" in shown and "tokens/s per device" in shown
    main(["configs/serving/v3_decode_144.toml", "--json", "--engine.slots", "1440"])
    found = json.loads(capsys.readouterr().out)
    assert found["devices"] == 144 and found["memory_bytes_total"] == sum(found["memory_bytes"].values())
    assert found["layer_seconds"]["computing"] > 0


@pytest.mark.parametrize("name", ["tiny_prefill", "tiny_decode"])
def test_small_models_are_told_in_small_units_and_beside_no_large_ones(name, capsys):
    from dsjax.plan import main

    main([name])
    shown = capsys.readouterr().out
    assert "memory of a device                     MB" in shown and ", us (estimates" in shown
    numbers = [float(line.split()[-1]) for line in shown.splitlines() if line[36:].strip().replace(".", "").isdigit()]
    assert len(numbers) > 9 and min(numbers) > 0
    assert "DeepSeek" not in shown
    main(["v3_decode_144", "--model.vocab-size", "32000"])  # which is as much work
    shown = capsys.readouterr().out
    assert "DeepSeek's service" in shown and "                     GB" in shown and ", ms (estimates" in shown


def test_what_is_written_about_the_reports_units():
    """The table of docs/inference.md."""
    written = (Path(__file__).parents[2] / "docs" / "inference.md").read_text()
    for name in DEPLOYMENTS:
        report = report_of_serving(deployment(name), "h800")
        (row,) = (line.split("|") for line in written.splitlines() if line.startswith(f"| `{name}` |"))
        assert row[4].strip() == f"{report.total / 1e9:.1f}"
        assert row[5].split()[0] == f"{report.tokens_per_s_per_device:,.0f}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["v3_decode_144", "--layout.slots", "1"], "layout.slots = 1 on each of 144 devices: must be at least the 256"),
        (["v3_decode_144", "--engine.slots", "100"], "engine.slots = 100: must be a multiple of layout.node x"),
        (["v3_prefill_32", "--layout.tensor", "3"], "layout.tensor = 3: must divide model.num_attention_heads = 128"),
        (["v3_prefill_32", "--engine.prefill-tokens", "18"], "engine.prefill_tokens = 18: must be a multiple of"),
        (["v3_prefill_32", "--layout.micro-batches", "3"], "layout.micro_batches = 3: must be 1 or 2"),
        (["tiny_decode", "--model.n-shared-experts", "2"], "needs model.n_shared_experts = 1, not 2"),
        (["tiny_decode", "--layout.node", "0"], "layout.node = 0: must be at least 1"),
        (["tiny_decode", "--train.steps", "2"], "unknown option --train.steps"),
    ],
)
def test_what_cannot_be_is_said(words, message, capsys):
    from dsjax.plan import main

    with pytest.raises(SystemExit):
        main(words)
    assert message in capsys.readouterr().err


def test_a_plain_layout_has_nothing_to_balance():
    model = deployment("tiny_decode").model
    with pytest.raises(ValueError, match=r"layout.replicas = 'balanced': needs more slots than experts"):
        Layout(node=8, replicas="balanced").check(model)
    with pytest.raises(ValueError, match=r"layout.rebalance = 5: needs more slots"):
        Layout(node=8, rebalance=5).check(model)


def test_too_few_devices():
    with pytest.raises(ValueError, match=r"layout.node x layout.data x layout.tensor = 9 x 1 x 1 = 9 devices: there"):
        mesh_of(Layout(node=9))


def test_deployments_and_runs_are_told_apart(tmp_path):
    assert is_in("v3_decode_144", SERVING, "layout") and is_in("configs/serving/tiny_decode.toml", SERVING, "layout")
    assert not is_in("tiny", SERVING, "layout") and not is_in("configs/tiny.toml", SERVING, "layout")
    (tmp_path / "broken.toml").write_text("layout = [")
    assert not is_in(str(tmp_path / "broken.toml"), SERVING, "layout")
