"""Spoken sentences, and what codecs are compared with on them."""

import contextlib
import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from flax import nnx

from omni.recipes import espeak, opus, sentences, speech, speech_comparison
from omni.train.metrics import training_seconds
from omni.train.optimizer import OptimizerConfig
from omni_tokenizers.audio import AudioTokenizerConfig, SpectralCodec
from omni_tokenizers.encodec import EncodecNet
from omni_tokenizers.errors import OmniError, UsageError
from omni_tokenizers.quantizers import ResidualQuantizerConfig, VectorQuantizerConfig

pytest.importorskip("espeakng_loader")

SPECTRAL = AudioTokenizerConfig(
    sample_rate=24000,
    hop=320,
    window=640,
    mels=16,
    dim=8,
    encoder_blocks=1,
    decoder_blocks=1,
    downsample=1,
    quantizer=ResidualQuantizerConfig(2, VectorQuantizerConfig(8, dim=4)),
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """`prepare` with ten voices that say one or two sentences."""
    with pytest.MonkeyPatch.context() as patch:
        variants = espeak.variants()[:10]
        patch.setattr(espeak, "variants", lambda: variants)
        patch.setattr(speech, "VALIDATION", 0.1)
        patch.setattr(speech, "PER_VOICE", {"train": 1, "validation": 1, "held_out": 2})
        yield speech.prepare(tmp_path_factory.mktemp("speech") / "data")


def test_splits_by_voice_and_by_sentence():
    """A fifth of the voices is held out; no voice, in whatever accent, and no sentence is in two splits."""
    assert len(sentences.TRAIN) >= 200 and len(sentences.HELD_OUT) >= 40
    plan = speech.plan(0)
    voices = {split: {utterance.voice.split("+")[1] for utterance in of} for split, of in plan.items()}
    texts = {split: {utterance.text for utterance in of} for split, of in plan.items()}
    assert len(voices["held_out"]) == round(0.2 * len(espeak.variants()))
    for split, other in (("train", "validation"), ("train", "held_out"), ("validation", "held_out")):
        assert not voices[split] & voices[other] and not texts[split] & texts[other]
    assert plan == speech.plan(0) != speech.plan(1)
    assert all(len(text.split()) >= 3 and text[-1] in ".?" for text in (*sentences.TRAIN, *sentences.HELD_OUT))


def test_clips_are_sentences_without_silence_at_their_ends(directory):
    """24 kHz at one peak, seconds long; what is written is what is read."""
    clips = speech.load(directory, "held_out")
    assert len(clips) == 4 and len(set(clips.voices)) > 1
    for index in range(len(clips)):
        clip = clips[index]
        assert clip.dtype == np.float32 and 24000 < len(clip) < 10 * 24000
        assert abs(np.abs(clip).max() - 0.9) < 0.01
        audible = np.flatnonzero(np.abs(clip) > 0.017)
        assert audible[0] < 240 and len(clip) - audible[-1] < 240
    assert sum(map(len, (clips[index] for index in range(4)))) == len(clips.samples)


def test_prepared_speech_is_kept(directory, tmp_path):
    """A finished directory is left alone; another seed's, something else's or a damaged one is refused."""
    before = (directory / "manifest.json").stat()
    assert speech.prepare(directory) == directory and (directory / "manifest.json").stat() == before
    with pytest.raises(OmniError, match="seed 0"):
        speech.prepare(directory, seed=1)
    with pytest.raises(OmniError, match=r"python -m omni\.recipes\.speech"):
        speech.load(tmp_path, "train")
    with pytest.raises(UsageError, match="held_out"):
        speech.load(directory, "test")
    (tmp_path / "manifest.json").write_text((directory / "manifest.json").read_text())
    np.save(tmp_path / "train.npy", np.zeros(3, np.int16))
    with pytest.raises(OmniError, match="where the manifest lists"):
        speech.load(tmp_path, "train")


def test_speech_is_prepared_into_an_empty_directory_only(tmp_path, monkeypatch):
    """An empty directory is filled; one that holds something else is refused, in words that lead on."""
    utterance = espeak.Utterance("Hello.", "en-us+m1", 150, 50)
    monkeypatch.setattr(speech, "plan", lambda seed: {split: [utterance] for split in ("train", "held_out")})
    monkeypatch.setattr(espeak, "speak", lambda utterances: iter([np.zeros(0, np.float32)] * len(list(utterances))))
    monkeypatch.setattr(espeak, "trimmed", lambda *_: np.zeros(5, np.int16))
    (tmp_path / "empty").mkdir()
    assert len(speech.load(speech.prepare(tmp_path / "empty"), "train")) == 1
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "notes.txt").touch()
    with pytest.raises(OmniError, match=r"else: holds something else than speech; .*another directory"):
        speech.prepare(tmp_path / "else")


@pytest.mark.parametrize(("error", "code"), [(OmniError, 1), (UsageError, 2)])
def test_errors_are_one_line(monkeypatch, capsys, error, code):
    """`python -m omni.recipes.speech DIRECTORY` exits as `omni` does."""

    def failing(*_):
        raise error("no voice")

    monkeypatch.setattr(speech, "prepare", failing)
    monkeypatch.setattr("sys.argv", ["", "data"])
    with pytest.raises(SystemExit) as exit:
        speech.main()
    assert exit.value.code == code and capsys.readouterr().err == "omni: no voice\n"


def test_excerpts_depend_on_seed_and_index_alone(directory):
    """Excerpts of fixed length from anywhere in a clip, quieter by 0 to 12 dB, short clips padded."""
    examples = speech.SpeechExcerpts(str(directory))
    dataset, again = examples.dataset(3), examples.dataset(3)
    first = [dataset[index] for index in range(40)]
    for name, value in again[17].items():
        np.testing.assert_array_equal(value, first[17][name])
    assert not np.array_equal(examples.dataset(4)[17]["audio"], first[17]["audio"])
    peaks = [np.abs(example["audio"]).max() for example in first]
    assert min(peaks) < 0.5 and max(peaks) > 0.7
    assert all(example["audio"].shape == (24000,) and example["length"] == 24000 for example in first)
    longer = speech.SpeechExcerpts(str(directory), samples=480_000).dataset(3)[0]
    assert longer["length"] < 480_000 and not longer["audio"][longer["length"] :].any()
    assert set(examples.held_out()[0]) == {"audio", "length"}


def test_opus_is_measured_at_the_nearest_rate(directory):
    """More bits, nearer to the original; the rate of the sound alone lies below that of the files."""
    clips = speech.load(directory, "held_out")
    clips = [clips[index] for index in range(2)]
    low, rate = opus.nearest(clips, 24000, 1000)
    high, higher = opus.nearest(clips, 24000, 16000)
    assert [len(clip) for clip in low] == [len(clip) for clip in clips]
    assert 5500 < rate["bits_per_second"] < 8000, "its lowest, as no lower one can be had"
    assert 14000 < higher["bits_per_second"] < 18000
    assert rate["bits_per_second"] < rate["bits_per_second_of_files"] - 1000
    scores = [speech_comparison.measured(clips, decoded) for decoded in (low, high, clips)]
    assert scores[0]["mel_distance"] > scores[1]["mel_distance"] > scores[2]["mel_distance"] == 0
    assert scores[0]["stoi"] < scores[1]["stoi"] < scores[2]["stoi"]


def test_opus_bytes_are_those_of_its_packets(tmp_path):
    """Counted page by page they leave only headers: a clip twice as long has the bytes of about twice the packets."""
    noise = 0.1 * np.random.default_rng(0).normal(size=96000).astype(np.float32)
    short, long = (opus._opus_bytes(opus._opus(noise[:n], 24000, 0.95)) for n in (48000, 96000))
    assert long == pytest.approx(2 * short, rel=0.05)
    assert 0.5 < 8 * long / 4 / 18500 < 1.5, "libsndfile's level 0.95 asks for 18.5 kbit/s"


def test_seanet_has_the_same_bits():
    """As many frames and codes as the spectral codec; one with other frames is refused."""
    config = speech_comparison.seanet(4, SPECTRAL)
    audio, lengths = np.zeros((2, 4000), np.float32), np.array([4000, 3000], np.int32)

    def codes(net_class, config):
        return net_class(config, rngs=nnx.Rngs(0)).autoencode(audio, lengths, None, training=False)[1].codes

    nets = {SpectralCodec: SPECTRAL, EncodecNet: config}
    shapes = [jax.eval_shape(functools.partial(codes, *each)).shape for each in nets.items()]
    assert shapes == [(2, 13, 2)] * 2
    assert config.quantizer == SPECTRAL.quantizer
    with pytest.raises(UsageError, match="320"):
        speech_comparison.seanet(4, dataclasses.replace(SPECTRAL, hop=160, window=320))


def test_a_run_that_goes_on_has_a_longer_curve(tmp_path, monkeypatch):
    """Checkpoints that came since are measured, those measured before are not measured again."""
    kept, restored = [2, 4], []

    class Kept(contextlib.nullcontext):
        def steps(self):
            return kept

        def restore(self, abstract, step):
            restored.append(step)
            return None, None

    monkeypatch.setattr(speech_comparison, "Checkpoints", lambda *_: Kept(Kept()))
    monkeypatch.setattr(speech_comparison, "through", lambda *_: {"mel_distance": 1.0})
    monkeypatch.setattr(speech_comparison, "training_seconds", lambda _: {step: 2.0 * step for step in (2, 4, 8)})
    comparison = speech_comparison.SpeechComparison(str(tmp_path), points=2, spectral=SPECTRAL, filters=())
    config = comparison.training(tmp_path, comparison.tasks(tmp_path)["spectral"], 4)
    speech_comparison.curve(config, [])
    kept[:] = [4, 8]  # step 2 made room
    points = speech_comparison.curve(dataclasses.replace(config, steps=8), [])
    assert [(point["step"], point["training_seconds"]) for point in points] == [(2, 4.0), (4, 8.0), (8, 16.0)]
    assert restored == [2, 4, 8] and json.loads((tmp_path / "curve.json").read_text()) == points


@pytest.mark.slow
def test_codecs_are_compared_and_the_comparison_goes_on(directory, tmp_path, monkeypatch):
    """One command trains all for equally long and measures each on its way; again, nothing is done anew."""
    (tmp_path / "data").symlink_to(directory)
    comparison = speech_comparison.SpeechComparison(
        str(tmp_path), steps=4, batch_size=2, points=2, clips=2, spectral=SPECTRAL, filters=(4,)
    )
    comparison = dataclasses.replace(comparison, optimizer=OptimizerConfig(learning_rate=1e-3, ema_decay=0.9))
    monkeypatch.setattr(speech_comparison, "_TIMED", 1)
    (tmp_path / "seconds_per_step.json").write_text('{"spectral": 1.0, "seanet_4": 2.0}')
    comparison.run()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["bits_per_second"] == 75 * 2 * 3 and results["clips"] == 2
    steps = {name: [point["step"] for point in curve] for name, curve in results["codecs"].items()}
    assert steps == {"spectral": [2, 4], "seanet_4": [1, 2]}
    for name, curve in results["codecs"].items():
        seconds = training_seconds(tmp_path / name)
        assert [point["training_seconds"] for point in curve] == [round(seconds[step], 1) for step in steps[name]]
    measures = [point["mel_distance"] for curve in results["codecs"].values() for point in curve]
    assert len(set(measures)) == 4 and results["opus"]["bits_per_second"] > 5000
    monkeypatch.delattr(speech_comparison, "through")
    comparison.run()
    assert json.loads((tmp_path / "results.json").read_text()) == results
