"""EnCodec, DAC and Mimi against transformers, loaded from its directories, with every tensor random."""

import jax
import numpy as np
import pytest
from flax import nnx

import omni_tokenizers
from omni_tokenizers import checkpoints, weights
from omni_tokenizers.checkpoints import dac, encodec, interop, mimi
from omni_tokenizers.codes import Codes

torch = pytest.importorskip("torch", reason="needs torch: pip install 'omni-any-to-any[parity]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'omni-any-to-any[parity]'")

import random_codecs  # noqa: E402, needs both
from random_codecs import CONFIGS, RELEASED, random_codec, sound  # noqa: E402
from their_codecs import codebooks_of, pieces, their_codes, their_sound  # noqa: E402

pytestmark = pytest.mark.parity

FAMILIES = {"encodec": encodec.ENCODEC, "dac": dac.DAC, "mimi": mimi.MIMI}
SOUND = 1e-4
"""Sounds may differ by this share of their level."""


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """A model of transformers, our tokenizer of its directory, and that directory."""
    directory = tmp_path_factory.mktemp("theirs")
    model = random_codec(CONFIGS[request.param]())
    model.save_pretrained(directory)
    return model, omni_tokenizers.load(directory), directory


def assert_same_codes(model, tokenizer, x: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal but for near-ties, each of which is proved in float64 (`near_ties`)."""
    assert ours.shape == theirs.shape
    for row in np.flatnonzero((ours != theirs).any((1, 2))):
        for first, end, piece in pieces(tokenizer, x[row : row + 1]):
            one, other = theirs[row, :, first:end], ours[row, :, first:end]
            assert (one == other).all() or random_codecs.is_near_tie(model, piece, one, other)


def error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference over the root mean square, over our length; what DAC loses is silent here."""
    assert not ours[..., theirs.shape[2] :].any()
    ours, theirs = ours[..., : theirs.shape[2]], theirs[..., : ours.shape[2]]
    level = np.sqrt(np.square(theirs).mean())
    assert level > 1e-3 and np.abs(theirs - np.median(theirs)).mean() > 0.1 * level
    return float(np.abs(ours - theirs).max() / level)


def test_near_ties_are_told_from_errors(pair):
    """The proof that allows a difference allows none to a code that is farther, at any level."""
    model, tokenizer, _ = pair
    first, end, piece = pieces(tokenizer, sound(model.config, 1, 240))[0]
    theirs = their_codes(model, piece).ids[0, :, first:end]
    assert random_codecs.is_near_tie(model, piece, theirs, theirs)
    for level in range(tokenizer.codebooks):
        wrong = theirs.copy()
        wrong[level, 1] = (wrong[level, 1] + 1) % tokenizer.codebook_sizes[level]
        assert not random_codecs.is_near_tie(model, piece, theirs, wrong)


LENGTHS = {1: (2411, 7, 1), 3: (1201, 96)}


@pytest.mark.parametrize("batch", LENGTHS)
def test_codes_and_sound_equal_theirs(pair, batch, capsys):
    """Codes are equal, sound of the same codes within 1e-4; at least half of each codebook is used on the way."""
    model, tokenizer, _ = pair
    used, differing, largest = [set() for _ in range(tokenizer.codebooks)], 0, 0.0
    for length in LENGTHS[batch]:
        x = sound(model.config, batch, length, seed=length)
        ours, theirs = tokenizer.encode(x), their_codes(model, x)
        assert_same_codes(model, tokenizer, x, ours.ids, theirs.ids)
        if theirs.scales is not None:
            np.testing.assert_allclose(ours.scales, theirs.scales, rtol=1e-5)
        largest = max(largest, error(tokenizer.decode(theirs), their_sound(model, theirs)))
        assert tokenizer.decode(ours).shape == x.shape
        differing += int((ours.ids != theirs.ids).sum())
        for level, codes in zip(used, theirs.ids.swapaxes(0, 1), strict=True):
            level |= set(codes.ravel().tolist())
    with capsys.disabled():
        print(f"\n{type(tokenizer).__name__}: {differing} codes differ, sound within {largest:.1e}")
    assert min(map(len, used)) >= tokenizer.codebook_sizes[0] / 2
    assert largest < SOUND


def test_a_clip_among_longer_ones_is_as_alone(pair):
    """Each clip of a padded batch, with garbage after its end, has the codes and sound transformers gives it alone."""
    model, tokenizer, _ = pair
    lengths = np.array([1201, 611, 45])
    x = sound(model.config, 3, 1201)
    dirty = np.where(np.arange(1201) < lengths[:, None, None], x, 0.7).astype(np.float32)
    together = tokenizer.encode(dirty, lengths)
    decoded = tokenizer.decode(together)
    for row, length in enumerate(lengths):
        alone = x[row : row + 1, :, :length]
        theirs = their_codes(model, alone)
        frames = theirs.shape[2]
        assert_same_codes(model, tokenizer, alone, together.ids[row : row + 1, :, :frames], theirs.ids)
        assert not together.ids[row, :, frames:].any() and not decoded[row, :, length:].any()
        scales = None if together.scales is None else together.scales[row : row + 1, : theirs.scales.shape[1]]
        expected = their_sound(model, Codes(together.ids[row : row + 1, :, :frames], None, scales))
        assert error(decoded[row : row + 1, :, :length], expected) < SOUND


def test_without_lengths_padding_is_sound(pair):
    """Zeros after a clip's end, whose length nobody gives, are encoded as transformers encodes its padding."""
    model, tokenizer, _ = pair
    x = sound(model.config, 3, 700)
    mask = np.broadcast_to(np.arange(700) < np.array([700, 611, 45])[:, None, None], x.shape)
    theirs = their_codes(model, x * mask, mask=mask)
    assert_same_codes(model, tokenizer, x * mask, tokenizer.encode(x * mask).ids, theirs.ids)


def test_fewer_codebooks_are_a_prefix(pair):
    """Codes of fewer levels are the first ones, and decode as transformers decodes them."""
    model, tokenizer, _ = pair
    x = sound(model.config, 1, 240)
    whole = tokenizer.encode(x)
    for number in (tokenizer.fewest_codebooks, tokenizer.codebooks - 1):
        codes = tokenizer.encode(x, codebooks=number)
        np.testing.assert_array_equal(codes.ids, whole.ids[:, :number])
        assert error(tokenizer.decode(codes), their_sound(model, codes)) < SOUND


def test_bandwidths_buy_what_they_buy_there(pair):
    """Each bandwidth of an EnCodec gives as many codebooks as transformers takes, and the same codes."""
    model, tokenizer, _ = pair
    if tokenizer.type != "encodec":
        pytest.skip("a matter of EnCodec")
    x = sound(model.config, 1, 240)
    counts = [codebooks_of(model, bandwidth) for bandwidth in model.config.target_bandwidths]
    for bandwidth, codebooks in zip(model.config.target_bandwidths, counts, strict=True):
        theirs = their_codes(model, x, codebooks)
        assert_same_codes(model, tokenizer, x, tokenizer.encode(x, bandwidth=bandwidth).ids, theirs.ids)
    assert counts == sorted(set(counts)) and counts[-1] == tokenizer.codebooks


def measured(tokenizer, x: np.ndarray):
    """A jitted function of weights: the codes they give for sound, and their sound of fixed codes."""
    frames, step = 48, tokenizer.samples_per_frame
    audio = np.swapaxes(x, 1, 2)[:, : frames * step]
    lengths = np.full(len(x), frames * step - 5, np.int32)
    besides = [np.ones(len(x), np.float32)] if tokenizer.type == "encodec" else []
    ids = np.random.default_rng(0).integers(0, tokenizer.codebook_sizes[0], (len(x), tokenizer.codebooks, frames))

    @jax.jit
    def measure(state):
        net = nnx.merge(tokenizer.graphdef, state)
        codes = jax.tree.leaves(net.encode(audio, lengths, tokenizer.codebooks))[0]
        return codes, net.decode(ids, -(-lengths // step), *besides)[:, : frames * step - 5]

    return measure


def test_every_tensor_matters(pair):
    """A change of any one tensor of the checkpoint shows in the codes or in the sound, unless it is to be ignored."""
    model, tokenizer, directory = pair
    family, random = FAMILIES[model.config.model_type], np.random.default_rng(0)
    tensors = weights.read(directory / "model.safetensors")
    ignored = {name for name in tensors if name.endswith(family.ignored)}
    net, pairs = tokenizer.net, family.pairs(tokenizer.config)
    measure = measured(tokenizer, sound(model.config, 2, 48 * tokenizer.samples_per_frame))
    codes, decoded = measure(tokenizer.state)
    seen = {}
    for name, value in tensors.items():
        size = np.sqrt(np.mean(np.square(value))) or 1  # not the spread: magnitudes of weights are nearly one value
        noise = size * random.standard_normal(value.shape).astype(np.float32)
        state = interop.to_state(net, tensors | {name: value + noise}, pairs, "changed", ignored=ignored)
        changed = measure(state)
        seen[name] = bool((changed[0] != codes).any()), error(changed[1], decoded) > SOUND
    assert {name for name, found in seen.items() if not any(found)} == ignored
    codebooks = {name for name in seen.keys() - ignored if "codebook" in name}
    assert codebooks and {seen[name] for name in codebooks} == {(True, True)}


def test_export_gives_back_what_was_read(pair, tmp_path):
    """transformers reads what is exported as the same model; reading it here again changes no bit."""
    model, tokenizer, directory = pair
    checkpoints.export_checkpoint(tokenizer, tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    own = ("_name_or_path", "dtype", "_frame_rate")
    assert loaded.config.frame_rate == model.config.frame_rate
    one, other = (model.config.to_dict() for model in (loaded, type(model).from_pretrained(directory)))
    assert {key: one[key] for key in one if key not in own} == {key: other[key] for key in other if key not in own}
    ignored = FAMILIES[model.config.model_type].ignored
    again, expected = dict(effective(loaded)), dict(effective(model))
    assert again.keys() == expected.keys()
    for name in expected:
        if not name.endswith(ignored):
            # A weight norm is computed three times on the way, each time with three roundings of 6e-8; what has none
            # is the same to the bit.
            largest = 6e-7 * np.abs(expected[name]).max() if name.endswith("normed") else 0
            np.testing.assert_allclose(again[name], expected[name], rtol=0, atol=largest, err_msg=name)
    assert omni_tokenizers.load(tmp_path).hash == tokenizer.hash


def effective(model):
    """Names and values of a model's tensors, weight norms multiplied out."""
    for name, value in model.state_dict().items():
        if "parametrizations" not in name:
            yield name, value.numpy()
    for name, module in model.named_modules():
        if hasattr(module, "parametrizations"):
            yield f"{name} normed", module.weight.detach().numpy()


def test_shards_are_read_together(pair, tmp_path):
    """A checkpoint in several files is the same as in one."""
    model, tokenizer, _ = pair
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert omni_tokenizers.load(tmp_path).hash == tokenizer.hash


def test_our_own_directory_is_the_same_tokenizer(pair, tmp_path):
    """What `save` writes of an imported tokenizer loads with the same hash and codes."""
    model, tokenizer, _ = pair
    tokenizer.save(tmp_path)
    again, x = omni_tokenizers.load(tmp_path), sound(model.config, 1, 100)
    assert (again.hash, again.config, type(again)) == (tokenizer.hash, tokenizer.config, type(tokenizer))
    np.testing.assert_array_equal(again.encode(x).ids, tokenizer.encode(x).ids)


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASED)
def test_released_configurations(name, tmp_path, capsys):
    """The sizes that are published, with random weights: same codes, same sound, from a short clip."""
    model = random_codec(RELEASED[name](), 0.4)
    model.save_pretrained(tmp_path)
    tokenizer = omni_tokenizers.load(tmp_path)
    x = sound(model.config, 1, int(0.31 * model.config.sampling_rate) + 1)
    ours, theirs = tokenizer.encode(x), their_codes(model, x)
    assert_same_codes(model, tokenizer, x, ours.ids, theirs.ids)
    largest, differing = error(tokenizer.decode(theirs), their_sound(model, theirs)), (ours.ids != theirs.ids).sum()
    with capsys.disabled():
        used = np.mean([len(np.unique(codes)) for codes in theirs.ids[0]]) / theirs.shape[2]
        print(
            f"\n{name}: {differing} of {theirs.ids.size} codes differ, sound within {largest:.1e}, {used:.0%} distinct"
        )
    assert largest < SOUND
