"""What is measured of a model means something."""

from nestlearn.compare.contenders import enter
from nestlearn.compare.speed_unit import measure
from tests.compare.small import plan


def test_costs_are_measured(tmp_path):
    base = plan(tmp_path).base
    short, long = (
        {
            name: measure(enter(name, base.replace([f"sequence_length={length}"]), 9_000, 256).config, 1, 2)
            for name in ("transformer", "retnet")
        }
        for length in (16, 64)
    )
    assert all(value > 0 for key, value in short["retnet"].items() if key != "train_peak_bytes")
    # two tensors, of 64 or 16 keys and values of width 16 in float32
    assert long["transformer"]["state_bytes"] - short["transformer"]["state_bytes"] == 2 * 48 * 16 * 4
    assert long["retnet"]["state_bytes"] == short["retnet"]["state_bytes"]
