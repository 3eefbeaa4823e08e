"""Sound files as a codec's family reads them: its own feature extractor and model, beside `Audio.read` and `encode`."""

import numpy as np
import pytest

import omni_tokenizers
from omni.parts import Audio

torch = pytest.importorskip("torch", reason="needs torch: pip install 'omni-any-to-any[parity]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'omni-any-to-any[parity]'")

import soundfile  # noqa: E402
from random_codecs import CONFIGS, random_codec, sound  # noqa: E402

pytestmark = pytest.mark.parity


def extractor_of(config):
    """The feature extractor that the family's releases carry."""
    if config.model_type == "dac":
        return transformers.DacFeatureExtractor(sampling_rate=config.sampling_rate, hop_length=config.hop_length)
    sound_of = {"feature_size": config.audio_channels, "sampling_rate": config.sampling_rate}
    if config.model_type == "encodec":
        sound_of |= {"chunk_length_s": config.chunk_length_s, "overlap": config.overlap}
    return transformers.EncodecFeatureExtractor(**sound_of)


def their_codes_of(model, features) -> np.ndarray:
    """Codes [1, codebooks, frames] of what an extractor gave, chunks in a row."""
    settings = {} if model.config.model_type == "dac" else {"padding_mask": features["padding_mask"]}
    if model.config.model_type == "encodec":
        settings["bandwidth"] = model.config.target_bandwidths[-1]
    with torch.no_grad():
        found = model.encode(features["input_values"], **settings).audio_codes
    return np.concatenate(list(found.numpy()), -1) if found.ndim == 4 else found.numpy()


@pytest.mark.parametrize("kind", CONFIGS)
def test_files_are_read_as_their_extractors_do(kind, tmp_path):
    """Samples are equal to the bit, and so are codes, of lengths that fill no frame and of sounds of a few.

    EnCodec's extractor at 48 kHz completes the last chunk with silence, which its original takes as short as it is:
    so does ours, and the chunks before it are compared, and all of them once we are given the same silence.
    """
    model = random_codec(CONFIGS[kind]())
    model.save_pretrained(tmp_path / "theirs")
    tokenizer, extractor = omni_tokenizers.load(tmp_path / "theirs"), extractor_of(model.config)
    for length in (1201, 96):
        file, rate = tmp_path / f"{length}.wav", model.config.sampling_rate
        soundfile.write(file, sound(model.config, 1, length, seed=length)[0].T, rate, subtype="PCM_16")
        features = extractor(soundfile.read(file, dtype="float32")[0].T, sampling_rate=rate, return_tensors="pt")
        given, samples = features["input_values"].numpy(), Audio.read(file).samples
        np.testing.assert_array_equal(given[0, :, :length], samples)
        theirs, ours = their_codes_of(model, features), tokenizer.encode(samples[None]).ids
        whole = theirs.shape[-1]
        if kind == "encodec 48k":
            completed = tokenizer.encode(given).ids
            np.testing.assert_array_equal(completed, theirs[..., : completed.shape[-1]])
            stride, chunk = model.config.chunk_stride, model.config.chunk_length
            whole = max(0, (length - chunk) // stride + 1) * -(-chunk // model.config.hop_length)
        else:
            assert ours.shape == theirs.shape
        np.testing.assert_array_equal(ours[..., :whole], theirs[..., :whole])
