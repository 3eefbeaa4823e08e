"""`omni bench train`: without an accelerator it runs small and says so."""

import json

import pytest

from omni.bench.training import as_text


def test_on_a_cpu_it_says_what_it_is_not(run):
    """All is measured but MFU, of a tiny shape, as is said; what cannot be is refused before anything compiles."""
    code, out, _ = run("bench", "train", "--steps", "3", "--rows", "2", "--json")
    found = json.loads(out)
    assert code == 0 and found["models"].keys() == {"tiny"} and "causal attention" in found["convention"]
    tiny = found["models"]["tiny"]
    assert tiny["tokens_per_second"] == pytest.approx(2 * 128 / tiny["step_seconds"])
    assert "mfu" not in tiny and tiny["loss"] > 0
    assert len(tiny["costs"]) == 3 and 0 < sum(cost["share"] for cost in tiny["costs"]) <= 1
    assert "nothing of speed" in as_text(found) and "tokens/s" in as_text(found)
    code, _, err = run("bench", "train", "--presets", "2b")
    assert code == 2 and "no preset '2b'; choose among 0.1b, 1b" in err
