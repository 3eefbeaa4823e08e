"""`omni bench generate`: both sides hold the same model and answer alike, and what is printed is what was found."""

import json

import pytest

from omni.bench import generation, generation_sides
from omni.bench.generation import Options, as_markdown
from omni.bench.generation_sides import KINDS, Ours, Theirs, Work
from omni_tokenizers import weights
from omni_tokenizers.errors import OmniError, UsageError

pytest.importorskip("torch", reason="needs torch: pip install 'omni-any-to-any[parity]'")
pytest.importorskip("transformers", reason="needs transformers: pip install 'omni-any-to-any[parity]'")
pytestmark = pytest.mark.parity


class Here:
    """A side in this process, called as if it were in another."""

    def __init__(self, name, make, *arguments):
        self.name, self.side = name, make(*arguments)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def call(self, method, *arguments):
        return getattr(self.side, method)(*arguments)


@pytest.fixture
def small(monkeypatch):
    """A model of one thin layer, whose pictures have 4 x 4 codes, and both sides here."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name, value in (sizes | {"num_key_value_heads": 2}).items():
        monkeypatch.setitem(generation_sides.SETTINGS, name, value)
    pictures = generation_sides.SETTINGS["vq_config"] | {"resolution": 64}
    monkeypatch.setitem(generation_sides.SETTINGS, "vq_config", pictures)
    monkeypatch.setattr(generation_sides, "PICTURE", 16)
    monkeypatch.setattr(generation, "Remote", Here)


def test_every_cell_is_timed(small, run):
    """From the command line to the JSON and its table."""
    code, out, error = run(
        *("bench", "generate", "--batch", "1,2", "--text-tokens", "5", "--prompt-tokens", "40"),
        *("--rounds", "1", "--device", "cpu", "--json"),
    )
    assert code == 0, error
    results = json.loads(out)
    expected = [(kind, batch) for kind in KINDS for batch in (1, 2) if (kind, batch) != ("mixed", 1)]
    assert [(cell["kind"], cell["batch"]) for cell in results["cells"]] == expected
    for cell in results["cells"]:
        assert cell["ratio"] == pytest.approx(cell["torch"]["median"] / cell["ours"]["median"])
        assert "cache" in cell["torch"]["way"] and cell["ours"]["median"] > 0
    cell = results["cells"][-1]
    assert f"| mixed | 2 | {cell['ours']['median']:.2f} (" in as_markdown(results)


def test_both_sides_do_the_work(small, tmp_path, monkeypatch):
    """Theirs emits codes in pictures and text elsewhere, as many tokens as ours."""
    theirs, ours = Theirs("cpu"), Ours("cpu")
    theirs.make(str(tmp_path))
    ours.load(str(tmp_path))
    emitted = []
    generate = theirs.model.generate
    monkeypatch.setattr(theirs.model, "generate", lambda **named: emitted.append(generate(**named)) or emitted[-1])
    theirs._run(Work("mixed", 2, 8, 5), "static cache")
    text, picture = (each[0].tolist() for each in emitted)
    assert len(text) == 8 + 5 and min(text[8:]) >= 8713
    assert len(picture) == 8 + 1 + 16 and picture[8] == 8197 and set(picture[9:]) <= set(range(4, 8196))
    ours._run(Work("mixed", 2, 8, 5))


def test_other_weights_are_noticed(small, monkeypatch):
    """Times of two models that differ would mean nothing."""
    load = Ours.load

    def damaged(self, directory):
        path = f"{directory}/model.safetensors"
        tensors = weights.read(path)
        tensors["lm_head.weight"] = -tensors["lm_head.weight"]
        weights.write(path, tensors, {"format": "pt"})
        load(self, directory)

    monkeypatch.setattr(Ours, "load", damaged)
    with pytest.raises(OmniError, match="different greedy tokens"):
        generation.compare(Options(("text",), (1,), rounds=1, device="cpu"))


@pytest.mark.parametrize("wrong", [{"kinds": ("song",)}, {"batches": ()}, {"rounds": 0}, {"prompt_tokens": 1}])
def test_impossible_options_are_refused(wrong):
    with pytest.raises(UsageError):
        Options(**wrong)
