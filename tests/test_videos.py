"""A model that reads and writes videos: prompts of them, replies with them, files on the command line."""

import json

import numpy as np
import pytest
import videos
from flax import nnx

import omni
from omni.bundle import Model
from omni.grammar import Grammar
from omni.model import Transformer, TransformerConfig
from omni.pages import described
from omni.vocabulary import Vocabulary
from omni_tokenizers.emu3 import Emu3Config, Emu3Tokenizer, Emu3VQ
from omni_tokenizers.errors import OmniError
from omni_tokenizers.quantizers import VectorQuantizerConfig
from omni_tokenizers.video import VideoAutoencoder, VideoTokenizer, VideoTokenizerConfig

pytestmark = pytest.mark.slow  # it compiles Emu3's net, small, and a transformer

SPECIAL = ("<bos>", "<turn>", "<eos>", "<pad>", "<video>", "</video>", "<frame>")
EMU3 = Emu3Config(
    channels=32, multipliers=(1, 1), attention_stages=(), residual_blocks=1, codebook_size=16, image_size=4,
    temporal_downsampling=2,
)  # fmt: skip
LAYOUT = {
    "codebooks": ["video"],
    "open": ["<video>"],
    "close": ["</video>"],
    "frame_begin": "<frame>",
    "frame_rate": 8,
    "shapes": [{"frames": {"min": 1, "max": 3}, "rows": 2, "columns": 2}],
}


def make_model(text, **changes) -> Model:
    """Random weights over text and videos of 4 x 4 pixels, two frames of which are 2 x 2 codes."""
    vocabulary = Vocabulary.build({"text": text.vocabulary_size, "video": 16}, SPECIAL)
    control = {"bos": "<bos>", "turn": "<turn>", "eos": "<eos>", "pad": "<pad>"}
    modalities = {"text": {"block": "text"}, "video": {k: v for k, v in (LAYOUT | changes).items() if v is not None}}
    grammar = Grammar({"format": 1, "control": control, "modalities": modalities}, vocabulary)
    config = TransformerConfig(
        vocabulary_size=vocabulary.size, depth=1, dim=16, heads=2, key_value_heads=1, head_dim=8, mlp_dim=32,
        rope="time_row_column",
    )  # fmt: skip
    tokenizers = {"text": text, "video": Emu3Tokenizer(EMU3, Emu3VQ(EMU3, rngs=nnx.Rngs(0)))}
    return Model(Transformer(config, rngs=nnx.Rngs(1)), vocabulary, grammar, tokenizers, context_length=96)


@pytest.fixture(scope="module")
def model(tiny_tokenizers) -> Model:
    return make_model(tiny_tokenizers["text"])


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("video model")
    model.save(path)
    return path


def test_a_prompt_holds_the_frames_at_the_models_rate(model):
    """24 frames a second are thinned to the declared 8, cropped and scaled; codes are the tokenizer's of those."""
    frames = videos.moving_crops(16)
    part = omni.Video.at_rate(frames, 24, context=True)
    seen = np.stack([omni.Image(frame).resize_crop(4, 4).pixels for frame in frames[::3]])
    tokenizer = model.tokenizers["video"]
    codes = np.asarray(tokenizer.encode(seen[None]))
    assert codes.shape == (1, 3, 2, 2) and len(np.unique(codes)) > 1
    ids = model.encode([part])
    np.testing.assert_array_equal(model.grammar.parse(ids)[0].codes, codes)
    again = model.decode(ids)[0]
    np.testing.assert_array_equal(again.frames, tokenizer.decode(codes)[0])
    assert again.fps == 8 and again.context
    np.testing.assert_array_equal(model.encode([omni.Video.at_rate(frames[::3], 8, context=True)]), ids)


def test_replies_hold_videos_and_save_them(model, tmp_path):
    prompt = ["draw seven", omni.Video.at_rate(videos.moving_crops(3), 8)]
    reply = model.generate(prompt, want=["video", "text", "video"], seed=1)
    assert [part.modality for part in reply.parts] == ["video", "text", "video"] and reply.well_formed
    for video, span in zip(reply.videos, (reply.spans[0], reply.spans[2]), strict=True):
        assert video.frames.shape == (2 * span.codes.shape[1], 4, 4, 3) and video.fps == pytest.approx(8)
    assert "<video" in reply._repr_html_() and len(repr(reply)) < 300
    paths = reply.save(tmp_path)
    assert [path.name for path in paths] == ["1.mp4", "2.txt", "3.mp4"]
    saved = omni.Video.read(paths[0])
    np.testing.assert_allclose(saved.timestamps, reply.videos[0].timestamps, atol=1e-9)
    streamed = [event.part for event in model.stream(prompt, want=["video", "text", "video"], seed=1) if event.part]
    np.testing.assert_array_equal(streamed[0].frames, reply.videos[0].frames)


def test_constrained_replies_with_videos_always_parse(model):
    """Free ones, and ones that want a video of whatever length the budget allows."""
    wanted, settings = (None, ["video"], ["video", "text", "video"]), {"temperature": 1.0, "max_tokens": 40}
    requests = [omni.Request(["seven"], wanted[seed % 3], seed=seed, **settings) for seed in range(48)]
    replies = model.generate_batch(requests)
    assert all(reply.well_formed for reply in replies)
    assert {len(video.frames) for reply in replies for video in reply.videos} == {2, 4, 6}


def test_saved_and_loaded_it_is_the_same_model(model, directory):
    part = omni.Video.at_rate(videos.moving_crops(4), 8, context=True)
    again = omni.load(directory)
    assert again.processor.frame_rate == 8
    np.testing.assert_array_equal(again.encode([part]), model.encode([part]))
    path = directory / "grammar.json"
    declaration = json.loads(path.read_text())
    declaration["modalities"]["video"]["frame_rate"] = 12
    path.write_text(json.dumps(declaration))
    with pytest.raises(OmniError, match="made with another grammar"):
        omni.load(directory)
    declaration["modalities"]["video"]["frame_rate"] = 8
    path.write_text(json.dumps(declaration))


@pytest.mark.parametrize("frames", [1, 3, 5, 6])
def test_a_tokenizer_whose_first_frame_has_codes_of_its_own(tiny_tokenizers, frames):
    """With a stride of 2 and at most 3 frames of codes, 5 frames fit and the sixth does not."""
    small = VideoTokenizerConfig(
        image_size=4, patch_size=2, temporal_downsampling=2, channels=8, residual_blocks=1,
        quantizer=VectorQuantizerConfig(16, dim=4),
    )  # fmt: skip
    model = make_model(tiny_tokenizers["text"])
    model.tokenizers["video"] = VideoTokenizer(small, VideoAutoencoder(small, rngs=nnx.Rngs(0)))
    part = omni.Video.at_rate(videos.moving_crops(frames), 8, context=True)
    if frames > 5:
        with pytest.raises(OmniError, match="at most 5 frames at 8 a second"):
            model.encode([part])
        return
    span = model.grammar.parse(model.encode([part]))[0]
    assert span.codes.shape == (1, 1 + frames // 2, 2, 2)
    assert len(model.decode(model.encode([part]))[0].frames) == frames


def test_what_does_not_fit_is_one_line(model, tiny_model, tiny_tokenizers):
    long = omni.Video.at_rate(np.zeros((7, 4, 4, 3), np.uint8), 8)
    with pytest.raises(OmniError, match="too long: this model takes at most 6 frames at 8 a second"):
        model.generate([long], want=["text"])
    model.generate([omni.Video.at_rate(long.frames[:6], 8)], want=["text"])
    with pytest.raises(OmniError, match="unknown modality 'video'"):
        tiny_model.generate([long], want=["text"])
    with pytest.raises(OmniError, match="frame_rate"):
        make_model(tiny_tokenizers["text"], frame_rate=None).generate([long], want=["text"])
    few = make_model(tiny_tokenizers["text"], shapes=[{"frames": 3, "rows": 2, "columns": 2}])
    with pytest.raises(OmniError, match="writes no video of 1 x 2 x 2 codes; it knows 3 x 2 x 2"):
        few.generate([omni.Video.at_rate(long.frames[:2], 8)], want=["text"])


def test_the_command_line_reads_and_writes_videos(run, model, directory, tmp_path):
    """Of a file, only the frames that the model sees are read; what does not fit is one line."""
    frames = videos.moving_crops(16)
    omni.Video.at_rate(frames, 24).save(tmp_path / "in.mkv")
    code, out, err = run("generate", directory, tmp_path / "in.mkv", "--want", "video", "--out", tmp_path / "out")
    assert code == 0 and f"wrote {tmp_path / 'out' / '1.mp4'}" in out, err
    expected = model.generate([omni.Video.at_rate(frames, 24)], want=["video"]).videos[0]
    assert len(omni.Video.read(tmp_path / "out" / "1.mp4").frames) == len(expected.frames)
    code, out, err = run("generate", directory, tmp_path / "in.mkv", "--want", "video")
    assert code == 0 and repr(expected) in out and "videos were not written" in err
    omni.Video.at_rate(videos.moving_crops(22), 24).save(tmp_path / "long.mkv")
    code, out, err = run("generate", directory, tmp_path / "long.mkv", "--want", "text")
    assert (code, out) == (1, "") and "8 frames, of which at most 6 can be taken" in err, err
    for content, exit_code in ((b"", 1), (b"this is no video", 1), (None, 2)):
        path = tmp_path / f"bad{exit_code}.mp4"
        if content is not None:
            path.write_bytes(content)
        code, out, err = run("generate", directory, path, "--want", "text")
        assert (code, out) == (exit_code, "") and str(path) in err and len(err.strip().splitlines()) == 1


def test_prompts_read_files_at_the_models_rate(model, tmp_path, monkeypatch):
    """A path is read frame by frame as the model sees it, so that long videos fit."""
    frames = videos.moving_crops(16)
    omni.Video.at_rate(frames, 24).save(tmp_path / "in.mkv")
    monkeypatch.setattr("omni.video_files.MAX_BYTES", frames[0].nbytes * 6)
    ids = model.encode([tmp_path / "in.mkv"])
    np.testing.assert_array_equal(ids, model.encode([omni.Video.at_rate(frames, 24)]))


def test_pages_show_videos():
    shown = described(omni.Video(videos.moving_crops(2)))
    assert shown["modality"] == "video" and shown["source"].startswith("data:video/mp4;base64,")
