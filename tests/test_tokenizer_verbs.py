"""import, export and the tokenizer verbs with public tokenizers: exact round trips, one clear line for what is bad."""

import functools
import hashlib
import json
import logging
import sys

import numpy as np
import pytest
import soundfile
from audio_codecs import golden
from flax import nnx
from network_weights import inception_tensors, lpips_tensors

import omni
import omni_tokenizers
from omni import tokenizer_tools
from omni_tokenizers import weights
from omni_tokenizers.checkpoints.interop import from_state
from omni_tokenizers.checkpoints.vqgan import layout_rules, pairs
from omni_tokenizers.vqgan import VQGAN, VQGANConfig, VQGANTokenizer

VQ = VQGANConfig(
    channels=32, multipliers=(1, 1), residual_blocks=1, latent_channels=4, codebook_size=16, code_dim=4, image_size=16
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
        (["export", "model", "DST", "--format", "transformers"], 2, "not a tokenizer's directory"),
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
    """Another rate, more or fewer channels and other picture sizes are told on stderr, each once for all files."""
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
    caplog.clear()
    omni.Image(PICTURE).save(tmp_path / "in.png")
    assert run("tokenizer", "encode", directories["image"], tmp_path / "in.png")[0] == 0
    assert [record.message for record in caplog.records] == ["pictures are scaled and cropped to 8x8 pixels"]


def test_a_picture_of_any_size_keeps_it(run, directories, tmp_path, load_once, caplog):
    """A size that is no multiple of the stride goes along with the codes, and comes back."""
    omni.Image(PICTURE).save(tmp_path / "in.png")
    code, out, err = run("tokenizer", "encode", directories["vqgan"], tmp_path / "in.png")
    entry = json.loads(out)
    assert code == 0 and np.shape(entry["codes"]) == (1, 11, 7) and entry["sizes"] == [[21, 13]], err
    assert not caplog.records
    (tmp_path / "codes.json").write_text(out)
    assert run("tokenizer", "decode", directories["vqgan"], tmp_path / "codes.json", tmp_path / "out.png")[0] == 0
    tokenizer = omni_tokenizers.load(directories["vqgan"])
    expected = tokenizer.decode(tokenizer.encode(PICTURE[None]))[0]
    np.testing.assert_array_equal(omni.Image.read(tmp_path / "out.png").pixels, expected)


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
        ("text", {"codes": [99999]}, 1, "code 99999 is outside"),
        ("text", {"codes": [[1]]}, 1, "codes must have the axes [length]"),
    ],
)
def test_bad_codes_are_one_line(run, directories, load_once, tmp_path, name, content, code, message):
    """Whatever stands in a file of codes: decoded, or one line that names the file, and nothing is written."""
    if content is not None:
        (tmp_path / "codes.json").write_text(content if isinstance(content, str) else json.dumps(content))
    output = tmp_path / ("out.txt" if name == "text" else "out.png" if name == "vqgan" else "out.wav")
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

    def psnr() -> float:
        return value

    assert tokenizer_tools._measured(psnr) is None and f"not measured: psnr, {why}" in caplog.text


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
    code, _, err = run("tokenizer", "eval", directories["vqgan"], *names, "--lpips-weights", plain)
    assert code == 1 and "is no LPIPS" in err
    soundfile.write(tmp_path / "tone.wav", np.full(1600, 0.1), 16000)
    code, _, err = run("tokenizer", "eval", directories["audio"], tmp_path / "tone.wav", *both)
    assert code == 2 and "LPIPS and rFID compare pictures" in err
    code, _, err = run("tokenizer", "eval", directories["vqgan"], *names, "--inception-weights", tmp_path / "absent")
    assert code == 1 and "absent" in err
