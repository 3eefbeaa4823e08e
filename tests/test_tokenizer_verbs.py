"""import, export and the tokenizer verbs with public tokenizers: exact round trips, one clear line for what is bad."""

import collections
import functools
import hashlib
import json
import logging
import sys

import numpy as np
import pytest
import soundfile
import videos
from audio_codecs import golden
from flax import nnx
from network_weights import inception_tensors, lpips_tensors

import omni
import omni_tokenizers
from omni import tokenizer_evaluation, tokenizer_tools
from omni_tokenizers import weights
from omni_tokenizers.checkpoints.interop import from_state
from omni_tokenizers.checkpoints.vqgan import layout_rules, pairs
from omni_tokenizers.emu3 import Emu3Config, Emu3Tokenizer, Emu3VQ
from omni_tokenizers.errors import OmniError
from omni_tokenizers.video import VideoAutoencoder, VideoTokenizer, VideoTokenizerConfig
from omni_tokenizers.vqgan import VQGAN, VQGANConfig, VQGANTokenizer

VQ = VQGANConfig(
    channels=32, multipliers=(1, 1), residual_blocks=1, latent_channels=4, codebook_size=16, code_dim=4, image_size=16
)
EMU3 = Emu3Config(
    channels=32, multipliers=(1, 1), attention_stages=(), residual_blocks=1, codebook_size=16, image_size=16
)
PICTURE = np.random.default_rng(0).integers(0, 256, (21, 13, 3), np.uint8)


@pytest.fixture(scope="module")
def directories(tmp_path_factory, tiny_bundle):
    """Tokenizers by name: public codecs as transformers writes them, a VQGAN and the tiny model's own as we do."""
    root = tmp_path_factory.mktemp("tokenizers")
    for name in ("encodec 24k", "encodec 48k"):
        golden(name).write(root / name)
    abstract = nnx.eval_shape(lambda: VQGAN(VQ, rngs=nnx.Rngs(0)))
    random = np.random.default_rng(0)
    noise = {name: random.normal(size=shape) for name, shape in weights.shapes(nnx.state(abstract)).items()}
    net = nnx.merge(nnx.graphdef(abstract), weights.unflatten(nnx.state(abstract), noise))
    VQGANTokenizer(VQ, net).save(root / "vqgan")
    Emu3Tokenizer(EMU3, Emu3VQ(EMU3, rngs=nnx.Rngs(0))).save(root / "emu3")
    paths = {path.name: path for path in (*root.iterdir(), *(tiny_bundle / "tokenizers").iterdir())}
    return paths | {"model": tiny_bundle}


@pytest.fixture(scope="module")
def load_once():
    """Commands share what they load, so that it compiles once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_tools.omni_tokenizers, "load", functools.cache(omni_tokenizers.load))
        yield


def hash_of(directory) -> str:
    return omni_tokenizers.load(directory).hash


def test_import_and_export_change_the_format_alone(run, directories, tmp_path):
    """transformers' directory to ours and back, and rounded weights: each loads, the first two as they were."""
    source, ours, theirs, small = directories["encodec 24k"], *(tmp_path / name for name in ("ours", "theirs", "small"))
    code, out, err = run("import", source, ours)
    assert code == 0 and out.startswith(f"wrote {ours} (") and (ours / "tokenizer.json").exists(), err
    code, out, err = run("export", ours, theirs, "--format", "transformers")
    assert code == 0 and out.startswith(f"wrote {theirs} ("), err
    assert sorted(path.name for path in theirs.iterdir()) == ["config.json", "model.safetensors"]
    assert hash_of(ours) == hash_of(theirs) == hash_of(source)
    assert run("export", ours, small, "--dtype", "bfloat16")[0] == 0
    assert hash_of(small) != hash_of(ours)
    assert run("export", directories["text"], tmp_path / "text")[0] == 0
    assert hash_of(tmp_path / "text") == hash_of(directories["text"])


def test_a_file_of_weights_is_imported(run, directories, tmp_path):
    """One file in taming-transformers' layout, whose picture size the command line says."""
    tokenizer = omni_tokenizers.load(directories["vqgan"])
    tensors = from_state(tokenizer.state, pairs(tokenizer.net, layout_rules("taming", VQ)))
    weights.write(tmp_path / "vq.safetensors", tensors)
    assert run("import", tmp_path / "vq.safetensors", tmp_path / "vq", "--image-size", 16)[0] == 0
    assert hash_of(tmp_path / "vq") == tokenizer.hash


def test_pickles_are_refused_without_their_reader(run, tmp_path, monkeypatch):
    """A file of PyTorch is not even opened unless torch's reader, which takes tensors alone, is asked for and there."""
    (tmp_path / "vqgan.ckpt").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    monkeypatch.setitem(sys.modules, "torch", None)
    for options, message in (((), "omni import --torch-reader"), (("--torch-reader",), "need torch: pip install")):
        code, out, err = run("import", tmp_path / "vqgan.ckpt", tmp_path / "vq", *options)
        assert (code, out) == (1, "") and message in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "vq").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["import", "nowhere", "DST"], 1, "nowhere: there is no such file or directory"),
        (["import", "encodec 24k", "FULL"], 2, "no empty directory"),
        (["import", "encodec 24k", "DST", "--image-size", "256"], 2, "image_size is for single files"),
        (["import", "encodec 24k", "DST", "--image-size", "big"], 2, "invalid int value"),
        (["import", "vqgan", "DST"], 1, "no config.json there"),
        (["import", "DAMAGED", "DST"], 1, "not a whole safetensors file"),
        (["import", "encodec 24k"], 2, "required"),
        (["export", "vqgan", "FULL"], 2, "no empty directory"),
        (["export", "nowhere", "DST"], 1, "no such directory"),
        (["export", "image", "DST", "--format", "transformers"], 1, "transformers has no tokenizer like image_vq"),
        (["export", "text", "DST", "--format", "transformers"], 1, "transformers has no tokenizer like text"),
        (["export", "vqgan", "DST", "--format", "transformers"], 1, "transformers has no such VQGAN"),
        (["export", "vqgan", "DST", "--format", "transformers", "--dtype", "float16"], 2, "leave --dtype out"),
        (["export", "text", "DST", "--dtype", "float16"], 2, "leave --dtype out"),
        (["export", "vqgan", "DST", "--format", "onnx"], 2, "invalid choice"),
    ],
)
def test_what_cannot_be_written_is_one_line_and_no_file(run, directories, tmp_path, arguments, code, message):
    """Wrong sources, targets and formats are told in one line, before anything is written."""
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "mine.txt").write_text("mine")
    (tmp_path / "DAMAGED").mkdir()
    (tmp_path / "DAMAGED" / "config.json").write_text((directories["encodec 24k"] / "config.json").read_text())
    (tmp_path / "DAMAGED" / "model.safetensors").write_bytes(b"\xff" * 64)
    places = directories | {name: tmp_path / name for name in ("FULL", "DAMAGED", "DST", "nowhere")}
    found, out, err = run(*[places.get(word, word) for word in arguments])
    assert (found, out) == (code, "") and message in err, err
    assert "usage:" in err or len(err.strip().splitlines()) == 1
    assert not (tmp_path / "DST").exists() and [path.name for path in (tmp_path / "FULL").iterdir()] == ["mine.txt"]


def test_stereo_with_scales_comes_back_exactly(run, directories, tmp_path, load_once, caplog):
    """Codes of 48 kHz in a file hold the scales of its chunks: what they decode to is what transformers recorded."""
    clip = golden("encodec 48k").clips[0]
    soundfile.write(tmp_path / "in.wav", clip.audio.T, 2400, subtype="FLOAT")
    code, out, err = run("tokenizer", "encode", directories["encodec 48k"], tmp_path / "in.wav")
    entry = json.loads(out)
    assert code == 0 and not caplog.records, err
    assert entry["codes"] == [clip.codes.tolist()] and entry["lengths"] == [601] and "sizes" not in entry
    np.testing.assert_allclose(entry["scales"], clip.scales[None], rtol=1e-5)
    (tmp_path / "codes.json").write_text(out)
    assert run("tokenizer", "decode", directories["encodec 48k"], tmp_path / "codes.json", tmp_path / "out.wav")[0] == 0
    decoded, rate = soundfile.read(tmp_path / "out.wav", dtype="float32")
    assert rate == 2400 and decoded.shape == (601, 2)
    expected = np.clip(clip.sound[:, :601].T, -1, 32767 / 32768)
    np.testing.assert_allclose(decoded, expected, rtol=0, atol=0.6 / 32768)  # 16 bits
    code, out, err = run("tokenizer", "eval", directories["encodec 48k"], tmp_path / "in.wav")
    measured = json.loads(out)
    assert code == 0 and measured["sounds"] == 1 and len(measured["codebooks"]) == 3, err
    # Frames of the second chunk count, though the first ends late enough for all samples.
    assert [book["usage"] for book in measured["codebooks"]] == [len(set(level)) / 16 for level in clip.codes.tolist()]


def test_what_encoding_changes_is_said_once(run, directories, tmp_path, load_once, caplog):
    """Another rate and more or fewer channels are told on stderr, each once for all files."""
    for name, rate, channels in (("a", 32000, 2), ("b", 32000, 2), ("c", 16000, 1)):
        sound = np.random.default_rng(0).normal(size=(rate // 5, channels)) / 10
        soundfile.write(tmp_path / f"{name}.wav", sound, rate)
    caplog.set_level(logging.INFO)
    assert run("tokenizer", "eval", directories["audio"], *(tmp_path / f"{name}.wav" for name in "abc"))[0] == 0
    mixed, resampled = "sound is mixed from 2 to 1 channels", "sound is resampled from 32000 to 16000 Hz"
    said = [record.message for record in caplog.records if "measured" not in record.message]
    assert said == [f"{mixed} (2 of 3)", f"{resampled} (2 of 3)"]
    caplog.clear()
    mono = golden("encodec 48k").clips[0].audio[0]
    soundfile.write(tmp_path / "mono.wav", mono, 2400)
    code, out, _ = run("tokenizer", "encode", directories["encodec 48k"], tmp_path / "mono.wav")
    assert code == 0 and json.loads(out)["lengths"] == [601]
    assert [record.message for record in caplog.records] == ["sound is mixed from 1 to 2 channels"]


@pytest.mark.parametrize(("name", "grid"), [("vqgan", (1, 11, 7)), ("image", (1, 6, 4))])
def test_a_picture_of_any_size_keeps_it(run, directories, tmp_path, load_once, caplog, name, grid):
    """A size that is no multiple of the stride goes along with the codes, and comes back."""
    omni.Image(PICTURE).save(tmp_path / "in.png")
    code, out, err = run("tokenizer", "encode", directories[name], tmp_path / "in.png")
    entry = json.loads(out)
    assert code == 0 and np.shape(entry["codes"]) == grid and entry["sizes"] == [[21, 13]], err
    assert not caplog.records
    (tmp_path / "codes.json").write_text(out)
    assert run("tokenizer", "decode", directories[name], tmp_path / "codes.json", tmp_path / "out.png")[0] == 0
    tokenizer = omni_tokenizers.load(directories[name])
    expected = tokenizer.decode(tokenizer.encode(PICTURE[None]))[0]
    np.testing.assert_array_equal(omni.Image.read(tmp_path / "out.png").pixels, expected)


@pytest.fixture
def clip(tmp_path):
    """A lossless file of 6 frames of 13 x 21 pixels, no multiple of Emu3's 4 x 2 x 2, at times that are not even."""
    video = omni.Video(videos.moving_crops(6, 13, 21), [0, 0.1, 0.2, 0.4, 0.5, 1])
    video.save(tmp_path / "clip.mkv")
    return video


def test_a_video_of_any_size_and_length_keeps_them_and_its_times(run, directories, tmp_path, load_once, clip, caplog):
    """Size, length and times go along with the codes, and come back."""
    code, out, err = run("tokenizer", "encode", directories["emu3"], tmp_path / "clip.mkv")
    entry = json.loads(out)
    assert code == 0 and entry["modality"] == "video" and np.shape(entry["codes"]) == (1, 2, 7, 11), err
    assert entry["sizes"] == [[6, 13, 21]] and not caplog.records
    np.testing.assert_allclose(entry["timestamps"], clip.timestamps)
    (tmp_path / "codes.json").write_text(out)
    assert run("tokenizer", "decode", directories["emu3"], tmp_path / "codes.json", tmp_path / "out.mkv")[0] == 0
    tokenizer = omni_tokenizers.load(directories["emu3"])
    expected, decoded = tokenizer.decode(tokenizer.encode(clip.frames[None]))[0], omni.Video.read(tmp_path / "out.mkv")
    assert expected.std() > 1
    np.testing.assert_array_equal(decoded.frames, expected)
    np.testing.assert_allclose(decoded.timestamps, clip.timestamps)
    code, out, err = run("tokenizer", "encode", directories["emu3"], tmp_path / "clip.mkv", "--fps", 3)
    assert code == 0 and json.loads(out)["sizes"] == [[4, 13, 21]], err
    del entry["timestamps"], entry["sizes"]
    (tmp_path / "codes.json").write_text(json.dumps(entry))
    assert run("tokenizer", "decode", directories["emu3"], tmp_path / "codes.json", tmp_path / "out.mkv")[0] == 0
    bare = omni.Video.read(tmp_path / "out.mkv")
    assert bare.frames.shape == (8, 14, 22, 3) and bare.fps == pytest.approx(25)


def test_videos_are_measured_frame_by_frame(run, directories, tmp_path, load_once, clip, caplog):
    """Means over the frames of all files, with each frame's own; what cannot be measured is said once a file."""
    omni.Video(clip.frames[:3]).save(tmp_path / "short.mkv")
    files = [str(tmp_path / name) for name in ("clip.mkv", "short.mkv")]
    code, out, err = run("tokenizer", "eval", directories["emu3"], *files)
    measured = json.loads(out)
    assert code == 0 and measured["videos"] == 2 and measured["frames"] == 9, err
    tokenizer = omni_tokenizers.load(directories["emu3"])
    codes = tokenizer.encode(clip.frames[None])
    error = np.square(tokenizer.decode(codes)[0].astype(float) - clip.frames).mean((1, 2, 3))
    np.testing.assert_allclose(measured["by_frame"]["psnr"][files[0]], 10 * np.log10(255**2 / error))
    every = [value for file in files for value in measured["by_frame"]["psnr"][file]]
    assert len(every) == 9 and measured["psnr"] == pytest.approx(np.mean(every))
    assert len(measured["by_frame"]["ssim"][files[1]]) == 3 and -1 <= measured["ssim"] <= 1
    assert measured["ms_ssim"] is None and measured["by_frame"]["ms_ssim"][files[1]] == [None] * 3
    assert sum("MS-SSIM needs" in record.message for record in caplog.records) == 2
    both = np.concatenate([np.ravel(codes.ids), np.ravel(tokenizer.encode(clip.frames[None, :3]).ids)])
    assert measured["usage"] == len(np.unique(both)) / 16
    code, out, err = run("tokenizer", "eval", directories["emu3"], files[0], "--fps", 2)
    assert code == 0 and json.loads(out)["frames"] == 3, err


def test_a_tokenizer_of_one_size_is_given_videos_of_it(clip):
    """They are scaled and cropped, which is counted."""

    class Squares:
        takes_any_size, image_size = False, 8

    changes = collections.Counter()
    frames = tokenizer_tools.prepared(Squares, clip, changes)
    np.testing.assert_array_equal(frames, clip.resize_crop(8, 8).frames)
    assert changes == {"videos are scaled and cropped to 8x8 pixels": 1}


def test_videos_where_they_do_not_belong_are_one_line(run, directories, load_once, tmp_path, clip, monkeypatch):
    omni.Image(PICTURE).save(tmp_path / "in.png")
    (tmp_path / "cut.mkv").write_bytes((tmp_path / "clip.mkv").read_bytes()[:-99])
    cases = [
        (["encode", "vqgan", "clip.mkv"], 2, "a tokenizer of image; it was given video"),
        (["encode", "encodec 24k", "clip.mkv"], 2, "a tokenizer of audio; it was given video"),
        (["encode", "emu3", "cut.mkv"], 1, "truncated"),
        (["encode", "emu3", "none.mp4"], 2, "no such file"),
        (["encode", "emu3", "clip.mkv", "--fps", "0"], 2, "fps must be"),
        (["eval", "vqgan", "clip.mkv"], 2, "holds video"),
        (["eval", "emu3", "in.png", "clip.mkv"], 2, "measure them apart"),
    ]
    for (verb, name, *rest), code, message in cases:
        files = [tmp_path / word if "." in word else word for word in rest]
        found, out, err = run("tokenizer", verb, directories[name], *files)
        assert (found, out) == (code, "") and message in err and len(err.strip().splitlines()) == 1, err
    with pytest.raises(OmniError, match="400 frames of 2000x2000 are more than 67 million pixels"):
        tokenizer_tools._check_size(2000, 2000, 400)
    monkeypatch.setattr(tokenizer_tools, "_MOST_VIDEO_PIXELS", 6 * 13 * 21 - 1)
    assert "6 frames of 21x13" in run("tokenizer", "encode", directories["emu3"], tmp_path / "clip.mkv")[2]
    (tmp_path / "codes.json").write_text(json.dumps({"codes": np.zeros((1, 2, 7, 15), int).tolist()}))
    found, _, err = run("tokenizer", "decode", directories["emu3"], tmp_path / "codes.json", tmp_path / "out.mp4")
    assert found == 1 and "8 frames of 30x14" in err


STEREO = {"modality": "audio", "codes": [[[1, 2]]], "scales": [[1.0]], "lengths": [20]}


@pytest.mark.parametrize(
    ("name", "content", "code", "message"),
    [
        ("encodec 48k", None, 2, "no such file"),
        ("encodec 48k", "", 1, "not codes written by omni tokenizer encode"),
        ("encodec 48k", json.dumps(STEREO)[:-9], 1, "not codes written by omni tokenizer encode"),
        ("encodec 48k", "[" * 100_000, 1, "not codes written by omni tokenizer encode"),
        ("encodec 48k", "[1, 2]", 1, "not codes written by omni tokenizer encode"),
        ("encodec 48k", '{"modality": "audio"}', 1, "not codes written by omni tokenizer encode ('codes')"),
        ("encodec 48k", '{"codes": [[[1, 2], [3]]]}', 1, "not codes written by omni tokenizer encode"),
        ("encodec 48k", STEREO | {"modality": "image"}, 2, "holds codes of image"),
        ("encodec 48k", STEREO | {"codes": [[[1, 16]]]}, 1, "code 16 is outside the codebook"),
        ("encodec 48k", STEREO | {"codes": [[[1, 2**70]]]}, 1, "codes must be integers"),
        ("encodec 48k", STEREO | {"codes": [[[1, 0.5]]]}, 1, "codes must be integers"),
        ("encodec 48k", STEREO | {"codes": [1, 2]}, 1, "codes of 2 parts"),
        ("encodec 48k", STEREO | {"codes": [[1, 2]]}, 1, "codes must have the axes [batch, codebooks, frames]"),
        ("encodec 48k", STEREO | {"codes": 5}, 1, "codes must have the axes"),
        ("encodec 48k", STEREO | {"codes": [[[]]]}, 1, "codes must be"),
        ("encodec 48k", {"codes": [[[1, 2]]]}, 1, "these codes need scales"),
        ("encodec 48k", STEREO | {"scales": [[float("nan")]]}, 1, "scales must be finite"),
        ("encodec 48k", STEREO | {"scales": "loud"}, 1, "scales must be finite"),
        ("encodec 48k", STEREO | {"lengths": [25]}, 1, "lengths must lie in 1 to 24"),
        ("encodec 48k", STEREO | {"lengths": {}}, 1, "lengths must be 1 integers"),
        ("vqgan", {"codes": [[[1, 2]]], "sizes": [[3, 4]]}, 1, "sizes must lie in"),
        ("vqgan", {"codes": np.zeros((1, 1, 600, 600), int).tolist()}, 1, "codes of a video"),
        ("vqgan", {"codes": np.zeros((1, 1025, 1024), int).tolist()}, 1, "2048x2050 pixels are more than 4.2 million"),
        (
            "emu3",
            {"codes": np.zeros((1, 2, 2, 2), int).tolist(), "timestamps": [0, 1]},
            1,
            "8 frames need as many time",
        ),
        ("emu3", {"codes": np.zeros((1, 1, 2, 2), int).tolist(), "timestamps": "now"}, 1, "4 frames need as many time"),
        ("emu3", {"codes": np.zeros((1, 1, 2, 2), int).tolist(), "sizes": [[9, 2, 2]]}, 1, "sizes must lie in"),
        ("emu3", {"codes": [[[[99]]]]}, 1, "code 99 is outside"),
        ("text", {"codes": [99999]}, 1, "code 99999 is outside"),
        ("text", {"codes": [[1]]}, 1, "codes must have the axes [length]"),
    ],
)
def test_bad_codes_are_one_line(run, directories, load_once, tmp_path, name, content, code, message):
    """Whatever stands in a file of codes: decoded, or one line that names the file, and nothing is written."""
    if content is not None:
        (tmp_path / "codes.json").write_text(content if isinstance(content, str) else json.dumps(content))
    output = tmp_path / (
        "out.txt" if name == "text" else "out.png" if name == "vqgan" else "out.mp4" if name == "emu3" else "out.wav"
    )
    found, out, err = run("tokenizer", "decode", directories[name], tmp_path / "codes.json", output)
    assert (found, out) == (code, "") and message in err, err
    assert len(err.strip().splitlines()) == 1 and err.startswith(f"omni: {tmp_path / 'codes.json'}")
    assert not output.exists()


def test_bad_sound_and_pictures_are_one_line(run, directories, load_once, tmp_path):
    """Sound that is empty, cut off or not finite, a picture that no memory holds, a part of another modality."""
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan), 2400, subtype="FLOAT")
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 2400)
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "cut.wav").write_bytes((tmp_path / "nan.wav").read_bytes()[:-40])
    omni.Image(np.zeros((2049, 2048, 3), np.uint8)).save(tmp_path / "large.png")
    cases = [
        ("encodec 24k", "nan.wav", 1, "NaN"),
        ("encodec 24k", "none.wav", 1, "no samples"),
        ("encodec 24k", "empty.wav", 1, "the file is empty"),
        ("encodec 24k", "cut.wav", 1, "truncated"),
        ("encodec 24k", "large.png", 2, "it was given image"),
        ("vqgan", "large.png", 1, "2048x2049 pixels are more than 4.2 million"),
    ]
    for name, file, code, message in cases:
        found, out, err = run("tokenizer", "encode", directories[name], tmp_path / file)
        assert (found, out) == (code, "") and message in err and len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize(("value", "why"), [(np.inf, "nothing was lost"), (np.nan, "too short or silent")])
def test_what_json_has_no_number_for_is_null_and_said(value, why, caplog):
    """A measure without a finite value is None, so that what eval prints stays JSON."""
    assert tokenizer_evaluation._finite("psnr", value) is None and f"not measured: psnr, {why}" in caplog.text


def test_eval_with_the_users_networks(run, directories, tmp_path, caplog):
    """With weights, LPIPS and rFID are measured and signed; they are refused for sound, and where they are no LPIPS."""
    names = []
    for index in range(3):
        names.append(tmp_path / f"{index}.png")
        omni.parts.Image(np.random.default_rng(index).integers(0, 256, (32, 32, 3), np.uint8)).save(names[-1])
    lpips, inception, plain = (tmp_path / f"{name}.safetensors" for name in ("lpips", "inception", "plain"))
    weights.write(lpips, lpips_tensors())
    weights.write(plain, {name: value for name, value in lpips_tensors().items() if not name.startswith("lin")})
    weights.write(inception, inception_tensors())
    both = ("--lpips-weights", lpips, "--inception-weights", inception)
    code, out, err = run("tokenizer", "eval", directories["vqgan"], *names, *both)
    assert code == 0 and "rFID of 3 pictures" in caplog.text, err
    found = json.loads(out)
    assert found["lpips"] > 0 and found["rfid"] > 0
    for name, path in (("lpips_weights", lpips), ("rfid_weights", inception)):
        assert found[name]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    code, out, err = run("tokenizer", "eval", directories["image"], names[0], *both)
    found = json.loads(out)
    assert code == 0 and found["psnr"] > 0 and (found["lpips"], found["rfid"]) == (None, None), err
    assert "16 x 16" in caplog.text and "two pictures" in caplog.text
    code, _, err = run("tokenizer", "eval", directories["vqgan"], *names, "--lpips-weights", plain)
    assert code == 1 and "is no LPIPS" in err
    soundfile.write(tmp_path / "tone.wav", np.full(1600, 0.1), 16000)
    code, _, err = run("tokenizer", "eval", directories["audio"], tmp_path / "tone.wav", *both)
    assert code == 2 and "LPIPS and rFID compare pictures" in err
    code, _, err = run("tokenizer", "eval", directories["vqgan"], *names, "--inception-weights", tmp_path / "absent")
    assert code == 1 and "absent" in err


def test_many_pictures_are_measured_a_few_at_a_time(run, directories, tmp_path, monkeypatch):
    """The result is that of all of them together, for any number that goes together."""
    names = [tmp_path / f"{index}.png" for index in range(5)]
    for index, name in enumerate(names):
        omni.Image(np.random.default_rng(index).integers(0, 256 - 50 * index, (24, 24, 3), np.uint8)).save(name)
    found = []
    for together in (16, 2):
        monkeypatch.setattr("omni.tokenizer_evaluation._TOGETHER", together)
        code, out, _ = run("tokenizer", "eval", directories["vqgan"], *names)
        found.append(json.loads(out))
        assert code == 0 and found[-1]["pictures"] == 5
    # A pixel may be a level apart: rounding differs with the batch.
    assert found[0] == pytest.approx(found[1], abs=1e-3) and found[0]["psnr"] > 0


def test_a_tokenizer_of_videos_takes_pictures(run, tmp_path):
    """A picture is a video of one frame, in all verbs."""
    small = VideoTokenizerConfig(image_size=16, patch_size=8, channels=8, residual_blocks=1)
    VideoTokenizer(small, VideoAutoencoder(small, rngs=nnx.Rngs(0))).save(tmp_path / "video")
    omni.Image(PICTURE).save(tmp_path / "a.png")
    code, out, err = run("tokenizer", "encode", tmp_path / "video", tmp_path / "a.png")
    assert code == 0 and np.shape(json.loads(out)["codes"]) == (1, 2, 2), err
    (tmp_path / "codes.json").write_text(out)
    code, _, err = run("tokenizer", "decode", tmp_path / "video", tmp_path / "codes.json", tmp_path / "b.png")
    assert code == 0 and omni.Image.read(tmp_path / "b.png").pixels.shape == (16, 16, 3), err
    code, out, err = run("tokenizer", "eval", tmp_path / "video", tmp_path / "a.png")
    assert code == 0 and json.loads(out)["pictures"] == 1, err
