"""Chameleon's own layout beside a slow forward pass that computes as the original does: neighbours, rank by rank."""

import dataclasses
import itertools
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from text_json import write_chameleon_names

import omni
from omni.interop import chameleon
from omni.interop.chameleon_original import OriginalTensors, open_release, read_config, release_preset
from omni.interop.weights import places_in, read_transformer

sys.path.insert(0, str(Path(__file__).parent))
from chameleon_reference import forward, random_ranks

VOCABULARY = 48
CASES = {
    "7b": ({"dim": 32, "n_layers": 2, "n_heads": 4}, 1),
    "34b": ({"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "swin_norm": True, "rope_theta": 500.0}, 2),
}


def logits(parameters, ranks, ids):
    """Our logits of one row of ids."""
    config = read_config({"model": parameters}, ranks, "params.json")
    tensors = OriginalTensors(ranks, config, "a release")
    model = read_transformer(config, tensors, places_in(tensors, config, chameleon.FAMILY), VOCABULARY, None)
    positions = np.broadcast_to(np.arange(len(ids))[None, :, None], (1, len(ids), 3))
    with jax.default_matmul_precision("highest"):
        return np.asarray(_apply(model, ids[None], positions))[0]


_apply = nnx.jit(lambda model, ids, positions: model(ids, positions, None))


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """Parameters, ranks, ids and what the slow pass makes of them."""
    parameters, number = CASES[request.param]
    ranks = random_ranks(parameters, number, VOCABULARY, 48)
    ids = np.random.default_rng(1).integers(0, VOCABULARY, 11)
    return parameters, ranks, ids, forward(parameters, ranks, ids)


def test_logits_are_the_originals(case, capsys):
    """Same weights, same logits within 1e-4 of the largest."""
    parameters, ranks, ids, expected = case
    error = np.abs(logits(parameters, ranks, ids) - expected).max() / max(1, np.abs(expected).max())
    with capsys.disabled():
        print(f"\noriginal chameleon, {len(ranks)} ranks: logits {error:.1e}", end="")
    assert expected.std() > 0.1 and error < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_of_every_rank_matters(name):
    """With any one tensor of one rank changed the comparison fails, or it is refused where ranks must agree."""
    parameters, number = CASES[name][0] | {"n_layers": 1}, CASES[name][1]
    ranks, ids = random_ranks(parameters, number, VOCABULARY, 48), np.arange(7) * 5
    expected, random = forward(parameters, ranks, ids), np.random.default_rng(2)
    for rank, key in itertools.product(range(number), ranks[0]):
        changed = [dict(each) for each in ranks]
        changed[rank][key] = ranks[rank][key] + 0.3 * random.standard_normal(ranks[rank][key].shape).astype(np.float32)
        if number > 1 and re.search(r"(attention_norm|ffn_norm|^norm)\.weight$", key):
            with pytest.raises(omni.OmniError, match="differs between files"):
                logits(parameters, changed, ids)
        else:
            error = np.abs(logits(parameters, changed, ids) - expected).max() / max(1, np.abs(expected).max())
            assert error > 1e-3, (rank, key)


def test_documents_are_those_of_the_tokenizers_names(tmp_path):
    """The tokenizer's names say which ids are pictures; typed, they stay text; bos and eos are Chameleon's."""
    names = write_chameleon_names(tmp_path)
    config = dataclasses.replace(read_config(*_release()), vocabulary_size=448)
    preset, text = release_preset(omni.bundle.epath.Path(tmp_path), config)
    assert preset.vocabulary.special["</s>"] == 2 and preset.vocabulary.special["<racm3:break>"] == 418
    assert preset.vocabulary.block("image").tolist() == [names[name] for name in names if name.startswith("IMG")]
    assert not set(text.ids[text.encode("IMGIMGAZ<eoss>")].tolist()) & set(names.values())
    with pytest.raises(omni.OmniError, match=r"text_tokenizer\.json: there is no such file"):
        release_preset(omni.bundle.epath.Path(tmp_path / "none"), config)


def _release():
    parameters, number = CASES["7b"]
    return {"model": parameters}, random_ranks(parameters, number, VOCABULARY, 48), "params.json"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"consolidated\.00\.pth is missing; there is none"),
        (["consolidated.00.pth", "consolidated.02.pth"], r"consolidated\.01\.pth is missing"),
    ],
)
def test_missing_files_are_named(tmp_path, files, message):
    """A rank without its file, before any is read."""
    for file in files:
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(omni.OmniError, match=message):
        open_release(omni.bundle.epath.Path(tmp_path))


def test_pickles_are_asked_for_by_name(tmp_path, run):
    """Without the name of torch's reader nothing of a release is opened."""
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(omni.OmniError, match="torch_reader=True"):
        omni.load(tmp_path)
    code, _, err = run("import", tmp_path, tmp_path / "out")
    assert code == 1 and "--torch-reader" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ranks: ranks[1].pop("output.weight"), "'output.weight' is not in all files"),
        (
            lambda ranks: [rank.update(more=rank["norm.weight"]) for rank in ranks],
            "tensor 'more' belongs to no parameter",
        ),
        (lambda ranks: [rank.pop("norm.weight") for rank in ranks], "'model.norm.weight' is missing"),
        (lambda ranks: ranks[1].update({"layers.0.attention.wq.weight": np.zeros((3, 3))}), "not one shape in all"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(change, message):
    """Each mistake is one line that names the tensor."""
    parameters, number = CASES["34b"]
    ranks = random_ranks(parameters, number, VOCABULARY, 48)
    change(ranks)
    with pytest.raises(omni.OmniError, match=message):
        logits(parameters, ranks, np.arange(3))
