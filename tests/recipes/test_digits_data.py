"""Scans and speech of the digits recipe."""

import functools
import sys
from pathlib import Path

import numpy as np
import pytest

import omni_tokenizers
from omni.cli import main
from omni.evaluate.features import picture_features
from omni.parts import Image
from omni.recipes import digits_data, espeak
from omni.train.metrics import read_metrics
from omni_tokenizers.errors import OmniError

pytest.importorskip("espeakng_loader")
pytest.importorskip("sklearn")

VOICES = 5  # variants, so that synthesis takes moments


@pytest.fixture(scope="module")
def small():
    """prepare with few voices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits_data, "UTTERANCES", 1)
        yield functools.partial(digits_data.prepare, voices=VOICES)


@pytest.fixture(scope="module")
def directory(small, tmp_path_factory):
    return small(tmp_path_factory.mktemp("digits") / "data", seed=0)


@pytest.fixture(scope="module")
def data(directory):
    return digits_data.load(directory)


def test_splits_by_scan_and_by_voice(data):
    """A fifth of the scans of each digit and a fifth of the voices are held out, and nothing stands in both splits."""
    train, test = data.train, data.test
    assert sorted([*train.scans.scans, *test.scans.scans]) == list(range(1797))
    share = np.bincount(test.scans.labels) / np.bincount(np.r_[train.scans.labels, test.scans.labels])
    np.testing.assert_allclose(share, 0.2, atol=0.005)
    variants = [{voice.split("+")[1] for voice in split.speech.voices} for split in (train, test)]
    assert not variants[0] & variants[1]
    assert len(variants[1]) == round(0.2 * (len(variants[0]) + len(variants[1]))) > 0


def test_scans_alone_are_those_that_are_written(data):
    """Without any speech they are split and drawn as `prepare` does with the same seed; of another seed they differ."""
    for split, made in digits_data.split_scans(0).items():
        written = getattr(data, split).scans
        order = np.argsort(written.scans)
        for name in ("images", "raw", "labels", "scans"):
            np.testing.assert_array_equal(getattr(made, name), getattr(written, name)[order])
    assert set(digits_data.split_scans(1)["test"].scans) != set(digits_data.split_scans(0)["test"].scans)


def test_clips_are_trimmed_and_bounded(data):
    """Each clip is loud, at most 0.96 s long and begins and ends with at most a few milliseconds of silence."""
    for clip in data.train.speech.audio:
        assert clip.dtype == np.float32 and 1600 < len(clip) <= digits_data.LONGEST
        assert abs(np.abs(clip).max() - 0.9) < 0.01
        audible = np.flatnonzero(np.abs(clip) > 0.017)
        assert audible[0] < 160 and len(clip) - audible[-1] < 160


def test_distinct_voices(data):
    """No two voices say a word alike."""
    speech = data.train.speech
    words = [clip.tobytes() for clip, label in zip(speech.audio, speech.labels, strict=True) if label == 7]
    assert len(set(words)) == len(words) == len(set(speech.voices))


def test_same_seed_same_data(small, data, tmp_path):
    """The datasets are a function of the seed: made again they hold the same arrays; another seed splits otherwise."""
    again = digits_data.load(small(tmp_path / "again", seed=0))
    for first, second in ((data.train, again.train), (data.test, again.test)):
        np.testing.assert_array_equal(first.scans.images, second.scans.images)
        assert all(np.array_equal(a, b) for a, b in zip(first.speech.audio, second.speech.audio, strict=True))
    other = {record["scan"] for split, record in digits_data._scan_records(seed=1) if split == "test"}
    assert other != set(data.test.scans.scans)


def test_interrupted_prepare_leaves_nothing_that_loads(small, tmp_path, monkeypatch):
    """After an interruption between the two datasets there is no directory, and preparing again works."""
    write = digits_data._write

    def stop(directory, name, records):
        if name == "digit_speech":
            raise KeyboardInterrupt
        return write(directory, name, records)

    target = tmp_path / "data"
    with monkeypatch.context() as patch:
        patch.setattr(digits_data, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            small(target, seed=0)
    assert not target.exists() and (tmp_path / "data.partial").exists()
    for left in (target, tmp_path / "data.partial"):
        with pytest.raises(OmniError, match="no digits data"):
            digits_data.load(left)
    assert len(digits_data.load(small(target, seed=0)).train.speech)
    assert not (tmp_path / "data.partial").exists()


def test_prepared_data_is_kept(small, directory, tmp_path):
    """A finished directory is left alone; one of another seed or of something else is refused."""
    before = (directory / "manifest.json").stat()
    assert small(directory, seed=0) == directory
    assert (directory / "manifest.json").stat() == before
    with pytest.raises(OmniError, match="seed 0"):
        small(directory, seed=1)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(OmniError, match="something else than digits data"):
        small(tmp_path, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_augmentation_keeps_the_digit(data):
    """A classifier that has seen plain training scans alone reads augmented held-out ones, whatever their colours."""
    from sklearn.svm import SVC

    def features(images):
        return picture_features([Image(pixels) for pixels in images])

    train, test, rng = data.train.scans, data.test.scans, np.random.default_rng(0)
    judge = SVC(C=10).fit(features(train.images), train.labels)
    assert judge.score(features(test.images), test.labels) > 0.96
    for plain in (1.0, 0.0):
        assert judge.score(features(digits_data.augment_images(test.raw, rng, plain)), test.labels) > 0.85


def test_augmentation_shares_and_plain_pictures(data):
    """The stated shares of training pictures are white on black and black on white; held-out ones are as scanned."""
    images = digits_data.augment_images(data.train.scans.raw, np.random.default_rng(0))
    corners = images[:, [0, 0, -1, -1], [0, -1, 0, -1]].reshape(len(images), -1)
    assert abs((corners < 8).all(1).mean() - digits_data.PLAIN) < 0.05
    assert abs((corners > 247).all(1).mean() - digits_data.INVERTED) < 0.05
    held_out = data.test.scans
    np.testing.assert_array_equal(held_out.images, digits_data.plain_images(held_out.raw))
    assert (held_out.images[..., 0] == held_out.images[..., 2]).all()


def test_sound_is_played_faster_or_slower():
    """A tone of 1000 Hz comes out at 920 to 1090 Hz, as much shorter as it is higher, and never beyond the longest."""
    tone = np.sin(2 * np.pi * 1000 * np.arange(8000) / digits_data.SAMPLE_RATE).astype(np.float32)
    pitches = []
    for seed in range(40):
        result = digits_data.augment_audio(tone, np.random.default_rng(seed))
        heard = np.flatnonzero(np.abs(result["audio"]) > 0.02)
        samples = result["audio"][heard[0] : heard[-1] + 1]
        pitches.append(np.argmax(np.abs(np.fft.rfft(samples, 1 << 16))) * digits_data.SAMPLE_RATE / (1 << 16))
        assert len(samples) * pitches[-1] == pytest.approx(8000 * 1000, rel=0.01)
        assert heard[-1] < result["length"] <= digits_data.LONGEST == len(result["audio"])
    assert 920 <= min(pitches) < 950 and 1050 < max(pitches) <= 1090
    longest = digits_data.augment_audio(np.ones(digits_data.LONGEST, np.float32), np.random.default_rng(0))
    assert longest["length"] <= digits_data.LONGEST


@pytest.mark.parametrize("make", [digits_data.scan_dataset, digits_data.speech_dataset])
def test_sources_depend_on_seed_and_index_alone(directory, make):
    """Example i is the same from a fresh source read at i directly; another pass or seed gives another."""
    source, length = make(directory, 5), len(digits_data.load_scans(directory, "train"))
    if make is digits_data.speech_dataset:
        length = len(digits_data.load_speech(directory, "train"))
    key = next(iter(source[0]))
    passes = [source[index] for index in range(20)]
    fresh = make(directory, 5)
    for index in (19, 3):
        for name, value in fresh[index].items():
            np.testing.assert_array_equal(value, passes[index][name])
    assert not np.array_equal(source[length][key], passes[0][key])
    assert not np.array_equal(make(directory, 6)[0][key], passes[0][key])


def test_speech_source_shapes(directory):
    """Excerpts are padded with zeros from their length on; some are parts of longer words, from any place."""
    source = digits_data.speech_dataset(directory, 0)
    lengths = []
    for index in range(60):
        example = source[index]
        assert example["audio"].shape == (digits_data.EXCERPT,) and example["audio"].dtype == np.float32
        assert example["length"].dtype == np.int32
        assert np.abs(example["audio"][: example["length"]]).max() > 0.1
        assert not example["audio"][example["length"] :].any()
        lengths.append(int(example["length"]))
    assert max(lengths) == digits_data.EXCERPT and min(lengths) < digits_data.EXCERPT


@pytest.mark.parametrize(
    ("utterance", "message"),
    [
        (espeak.Utterance("", "en-us+m3"), "characters"),
        (espeak.Utterance("one\0two", "en-us+m3"), "characters"),
        (espeak.Utterance("one" * 1000, "en-us+m3"), "characters"),
        (espeak.Utterance("one", "nowhere"), "no voice"),
        (espeak.Utterance("one", "x" * 4000), "no such"),
        (espeak.Utterance("one", "en-us+m3", rate=100_000), "rate"),
        (espeak.Utterance("one", "en-us+m3", pitch=-1), "pitch"),
    ],
)
def test_bad_utterances_are_errors(utterance, message):
    """What espeak-ng cannot say is an error that names it, never a crash."""
    with pytest.raises(OmniError, match=message):
        list(espeak.speak([utterance]))


def test_a_crash_of_espeak_is_an_error(monkeypatch):
    """When the child process dies, the caller learns at which utterance."""
    monkeypatch.setattr(espeak.sys, "executable", "/bin/false")
    with pytest.raises(OmniError, match=r"stopped at .*one"):
        list(espeak.speak([espeak.Utterance("one", "en-us+m3")]))


def test_missing_packages_name_the_extra(monkeypatch, tmp_path):
    """Without espeakng-loader or scikit-learn the error says what to install."""
    for package in ("espeakng_loader", "sklearn.datasets"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(OmniError, match="quickstart"):
                digits_data.prepare(tmp_path / package, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["image", "audio"])
def test_tokenizer_experiments_train_from_the_command_line(directory, tmp_path, modality):
    """`omni tokenizer train EXPERIMENT` with overrides trains, writes a log and leaves a tokenizer that opens."""
    file = Path(__file__).parents[2] / "experiments" / "tokenizers" / f"digits_{modality}.py"
    output = tmp_path / "run"
    sizes = {"image": ["--task.tokenizer.channels", "8"], "audio": ["--task.tokenizer.dim", "8"]}[modality]
    settings = [
        "--output",
        str(output),
        "--task.data.directory",
        str(directory),
        "--steps",
        "2",
        "--batch-size",
        "8",
        *sizes,
    ]
    main(["tokenizer", "train", str(file), *settings])
    assert omni_tokenizers.load(output).modality == modality
    assert read_metrics(output)[-1]["step"] == 2
    assert list(output.glob("**/events.out.tfevents*")), "TensorBoard finds nothing"
