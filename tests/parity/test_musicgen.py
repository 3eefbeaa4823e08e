"""MusicGen against transformers, every parameter noise: logits, codes that are generated, sounds, the way out."""

import numpy as np
import pytest

from omni import MusicGen
from omni_tokenizers import weights

torch = pytest.importorskip("torch", reason="needs torch: pip install 'omni-any-to-any[parity]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'omni-any-to-any[parity]'")

from public_models import largest_error, noise_tensors  # noqa: E402

pytestmark = pytest.mark.parity
TOLERANCE = 1e-4
SIZES = {"vocab_size": 32, "num_hidden_layers": 2, "ffn_dim": 40, "num_attention_heads": 2, "hidden_size": 16}
SIZES |= {"pad_token_id": 32, "bos_token_id": 32, "decoder_start_token_id": 32}
CASES = {"mono": {"num_codebooks": 4}, "stereo": {"num_codebooks": 4, "audio_channels": 2}}


def fill(directory, kind):
    """The model of a directory, with noise in every tensor."""
    shapes = {key: list(value.shape) for key, value in weights.read(directory / "model.safetensors").items()}
    weights.write(directory / "model.safetensors", noise_tensors(shapes), {"format": "pt"})
    return kind.from_pretrained(directory, attn_implementation="eager").eval().requires_grad_(False)


@pytest.fixture(scope="module", params=CASES)
def decoder(request, tmp_path_factory):
    """A decoder alone, and its directory."""
    directory = tmp_path_factory.mktemp(request.param)
    config = transformers.MusicgenDecoderConfig(**SIZES, **CASES[request.param])
    transformers.MusicgenForCausalLM(config).save_pretrained(directory)
    return fill(directory, transformers.MusicgenForCausalLM), directory


@pytest.fixture(scope="module", params=CASES)
def whole(request, tmp_path_factory):
    """A whole model, whose states are projected, and its directory."""
    directory = tmp_path_factory.mktemp(f"whole_{request.param}")
    config = transformers.MusicgenConfig(
        text_encoder=transformers.T5Config(vocab_size=20, d_model=12, d_kv=6, d_ff=16, num_layers=1, num_heads=2),
        audio_encoder=transformers.EncodecConfig(
            sampling_rate=1600, num_filters=4, hidden_size=8, codebook_size=32, codebook_dim=8,
            upsampling_ratios=[4, 2], target_bandwidths=[1.0, 4.0], num_lstm_layers=1, use_causal_conv=False,
        ),
        decoder=transformers.MusicgenDecoderConfig(**SIZES, **CASES[request.param]),
    )  # fmt: skip
    transformers.MusicgenForConditionalGeneration(config).save_pretrained(directory)
    return fill(directory, transformers.MusicgenForConditionalGeneration), directory


def example(width: int, batch: int = 2, length: int = 7):
    """Delayed codes, states, and a mask that hides some of them."""
    random = np.random.default_rng(length)
    mask = np.arange(5) < np.array([[5], [3], [1]])[:batch]
    states = random.standard_normal((batch, 5, width)).astype(np.float32)
    return random.integers(0, 33, (batch, 4, length)), states, mask


def their_logits(model, codes, states, mask) -> np.ndarray:
    """[batch, codebooks, length, codes]"""
    ids = torch.tensor(codes.reshape(-1, codes.shape[-1]))
    given = {"encoder_hidden_states": torch.tensor(states), "encoder_attention_mask": torch.tensor(mask).long()}
    return model(ids, **given).logits.numpy().reshape(*codes.shape, -1)


def test_logits_equal_theirs(decoder):
    """A directory that transformers wrote gives its logits, alone and in a batch, with states that are hidden."""
    model, directory = decoder
    ours = MusicGen.load(directory)
    for batch, length in ((1, 1), (2, 7), (3, 40)):
        given = example(16, batch, length)
        expected = their_logits(model, *given)
        assert expected.std() > 0.1
        assert largest_error(ours.logits(*given), expected) < TOLERANCE


def test_every_tensor_matters(decoder, tmp_path):
    """With any one tensor changed the comparison fails."""
    model, directory = decoder
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    tensors, random = weights.read(directory / "model.safetensors"), np.random.default_rng(0)
    given = example(16)
    expected = their_logits(model, *given)
    assert len(tensors) > 2 * 16
    for key in tensors:
        noise = 0.3 * random.standard_normal(tensors[key].shape).astype(np.float32)
        weights.write(tmp_path / "model.safetensors", tensors | {key: tensors[key] + noise})
        assert largest_error(MusicGen.load(tmp_path).logits(*given), expected) > 10 * TOLERANCE, key


def test_export_is_what_transformers_loads(decoder, tmp_path):
    """Read, written, and read by transformers: no key missing or unknown, the same logits; and so again here."""
    model, directory = decoder
    ours, given = MusicGen.load(directory), example(16)
    ours.export(tmp_path)
    kind = transformers.MusicgenForCausalLM
    again, report = kind.from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert largest_error(their_logits(again.eval().requires_grad_(False), *given), their_logits(model, *given)) == 0
    np.testing.assert_array_equal(MusicGen.load(tmp_path).logits(*given), ours.logits(*given))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_sounds_equal_theirs(whole, guidance):
    """The likeliest codes of a described sound, one frame after the other, and the sound that they are."""
    model, directory = whole
    ids, mask = torch.tensor([[3, 7, 2, 9], [4, 1, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    frames, channels = 24, model.config.decoder.audio_channels
    longest = frames + 4 // channels
    settings = {"do_sample": False, "guidance_scale": guidance, "max_length": longest}
    expected = model.generate(input_ids=ids, attention_mask=mask, **settings).numpy()
    states = model.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state.numpy()
    ours = MusicGen.load(directory)
    found = ours.generate(states, mask.numpy(), seconds=frames / 200, guidance=guidance, temperature=0.0)
    assert [sound.samples.shape for sound in found] == [(channels, frames * 8)] * 2 and found[0].sample_rate == 1600
    np.testing.assert_allclose(np.stack([sound.samples for sound in found]), expected, atol=TOLERANCE)
    assert len(np.unique(ours.codes(states, mask.numpy(), frames=frames, guidance=guidance, temperature=0.0))) > 4
