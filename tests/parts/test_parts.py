"""Parts: what is accepted, what is refused with one clear line, and what survives a round trip."""

import io
import pathlib
import struct
import zlib

import numpy as np
import pytest
import soundfile
from loopback_storage import BUCKET, Faults, bucket_of_this_process
from PIL import Image as PillowImage

from omni import media
from omni.parts import Audio, Image, Text, as_part, read_part
from omni_tokenizers.errors import OmniError, UsageError


def noise_picture(height=20, width=30, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def tone(seconds=0.25, rate=16000, channels=1, frequency=440.0):
    wave = 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)
    return np.tile(wave.astype(np.float32), (channels, 1))


def png_claiming(width, height):
    """A PNG whose header states any size and whose data are rubbish, so that decoding it fails as damaged."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"rubbish") + chunk(b"IEND", b"")


def refusal(function, *arguments, kind=OmniError, **options):
    """The message of the error, which must be one line."""
    with pytest.raises(kind) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


# --- text


def test_text_round_trip_and_repr(tmp_path):
    """Text survives a file unchanged, boundary-like characters included; repr is one short line."""
    part = Text("sieben \n<image> ≥ 🎵", context=True)
    part.save(tmp_path / "a.txt")
    assert read_part(tmp_path / "a.txt").text == part.text
    assert repr(Text("seven")) == "Text('seven')"
    assert repr(Text("seven", context=True)) == "Text('seven', context)"
    assert repr(Text("word\n" * 1000)).endswith("5000 characters)")
    assert len(repr(Text("word\n" * 1000))) < 120


def test_text_is_escaped_in_notebooks():
    """Nothing in a text becomes markup."""
    assert Text("<script>&</script>")._repr_html_().count("<") == 2


def test_text_refusals(tmp_path):
    """Not a string, a lone surrogate, bytes that are not UTF-8, too long a file."""
    refusal(Text, 7, kind=UsageError)
    refusal(Text, "\ud800", kind=UsageError)
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    assert "a.txt" in refusal(Text.read, tmp_path / "a.txt")
    with (tmp_path / "b.txt").open("wb") as stream:
        stream.truncate(media.MAX_TEXT_BYTES + 1)
    assert "16 MiB" in refusal(Text.read, tmp_path / "b.txt")


# --- pictures from arrays


def test_picture_shapes_become_rgb():
    """Grey is repeated, RGB kept as it is, alpha laid over white."""
    grey = noise_picture(channels=1)
    for array in (grey, grey[..., 0]):
        assert (Image(array).pixels == np.broadcast_to(grey, (20, 30, 3))).all()
    rgb = noise_picture()
    assert (Image(rgb).pixels == rgb).all()
    assert np.shares_memory(Image(rgb).pixels, rgb)
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = [0, 255, 51]
    assert Image(rgba).pixels[0].tolist() == [[255] * 3, [0] * 3, [204] * 3]


def test_picture_floats():
    """Floats in [0, 1] map to 0..255, whatever their width; outside, or NaN, they are refused."""
    import jax.numpy as jnp

    rgb = noise_picture()
    assert (Image((rgb / 255).astype(np.float32)).pixels == rgb).all()
    assert Image(jnp.ones((2, 2, 3), jnp.bfloat16)).pixels.min() == 255
    for value in (np.nan, np.inf, -0.01, 1.01):
        array = np.full((2, 2, 3), 0.5)
        array[1, 1, 1] = value
        assert "[0, 1]" in refusal(Image, array, kind=UsageError)


@pytest.mark.parametrize(
    "value",
    [np.zeros((3, 8, 8), np.uint8), np.zeros((0, 8, 3), np.uint8), np.zeros((8, 8, 3), np.int32), "x", [[1], [2, 3]]],
)
def test_picture_refusals(value):
    """Other shapes, other types, no pixels."""
    assert refusal(Image, value, kind=UsageError).startswith("picture: ")


# --- picture files


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.webp", "a.PPM"])
def test_picture_lossless_round_trip(tmp_path, name):
    """Lossless formats give back the very pixels, also when the extension names another format."""
    part = Image(noise_picture())
    part.save(tmp_path / name)
    assert (Image.read(tmp_path / name).pixels == part.pixels).all()
    (tmp_path / "wrong.jpg").write_bytes((tmp_path / name).read_bytes())
    assert (read_part(tmp_path / "wrong.jpg").pixels == part.pixels).all()


def test_picture_jpeg_is_close(tmp_path):
    """A smooth picture survives JPEG within a few grey levels."""
    ramp = np.linspace(0, 1, 64)[:, None, None] * np.ones((1, 64, 3))
    Image(ramp).save(tmp_path / "a.jpg")
    assert np.abs(Image.read(tmp_path / "a.jpg").pixels - Image(ramp).pixels.astype(int)).max() <= 4


@pytest.mark.parametrize(("width", "height"), [(60000, 60000), (12000, 12000), (9000, 9000), (1, 64_000_001)])
def test_picture_bomb_is_refused_before_decoding(tmp_path, width, height, recwarn):
    """The header's size decides, without Pillow's own warnings, below and above its own limits."""
    (tmp_path / "bomb.png").write_bytes(png_claiming(width, height))
    message = refusal(Image.read, tmp_path / "bomb.png")
    assert "64 million" in message
    assert "damaged" not in message
    assert not recwarn.list


def test_picture_bad_files(tmp_path, monkeypatch):
    """Missing, a folder, empty, cut anywhere, text, and EPS (which would start an interpreter): the file is named."""
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    PillowImage.fromarray(noise_picture(64, 64)).save(buffer, "JPEG")
    jpeg = buffer.getvalue()
    PillowImage.fromarray(noise_picture()).save("script.png", "EPS")
    files = {"empty.png": b"", "text.png": b"hello\n" * 99, "a.png": png_claiming(8, 8)}
    files |= {f"cut{n}.jpg": jpeg[: len(jpeg) * n // 10] for n in (1, 5, 9)}
    for name, data in files.items():
        pathlib.Path(name).write_bytes(data)
        assert name in refusal(Image.read, name)
    assert "0 bytes" in refusal(Image.read, "empty.png")
    assert "known format" in refusal(Image.read, "script.png")
    pathlib.Path("folder.png").mkdir()
    for name in ("missing.png", "folder.png"):
        assert name in refusal(Image.read, name, kind=UsageError)


def test_picture_damaged_anywhere_never_escapes(tmp_path, recwarn):
    """Whatever byte of a file is flipped, a picture or an OmniError comes back."""
    random = np.random.default_rng(0)
    for file_format in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
        buffer = io.BytesIO()
        PillowImage.fromarray(noise_picture(8, 8)).save(buffer, file_format)
        for position in random.integers(0, len(buffer.getvalue()), 60):
            data = bytearray(buffer.getvalue())
            data[position] ^= int(random.integers(1, 256))
            (tmp_path / "a.png").write_bytes(data)
            try:
                assert Image.read(tmp_path / "a.png").pixels.dtype == np.uint8
            except OmniError as error:
                assert "a.png" in str(error)
    assert not recwarn.list


def test_picture_animated_uses_first_frame(tmp_path, caplog):
    """The first frame of a GIF is read, and that is said; a still GIF is read in silence."""
    red, blue = (PillowImage.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    red.save(tmp_path / "a.gif", save_all=True, append_images=[blue])
    red.save(tmp_path / "b.gif")
    assert Image.read(tmp_path / "b.gif").pixels[0, 0].tolist() == [255, 0, 0]
    assert not caplog.records
    assert Image.read(tmp_path / "a.gif").pixels[0, 0].tolist() == [255, 0, 0]
    assert ["a.gif" in record.getMessage() for record in caplog.records] == [True]


def test_picture_orientation(tmp_path):
    """An EXIF orientation is applied: 6 means that the stored picture is shown a quarter turn clockwise."""
    exif = PillowImage.Exif()
    exif[0x0112] = 6
    PillowImage.fromarray(noise_picture()).save(tmp_path / "a.png", exif=exif)
    assert (Image.read(tmp_path / "a.png").pixels == np.rot90(noise_picture(), -1)).all()


def test_picture_16_bit(tmp_path):
    """16-bit grey is scaled, not clipped, in PNG, PGM and TIFF."""
    values = np.array([[0, 128, 257, 32768, 65535]], np.uint16)
    for name in ("a.png", "a.tif", "a.pgm"):
        PillowImage.fromarray(values).save(tmp_path / name)
        assert Image.read(tmp_path / name).pixels[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_picture_modes(tmp_path):
    """CMYK, palette (with a transparent colour), grey with alpha, bilevel and float files are read as they look."""
    colours = PillowImage.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8))
    colours.convert("CMYK").save(tmp_path / "cmyk.tif")
    assert Image.read(tmp_path / "cmyk.tif").pixels.tolist() == [[[255, 0, 0], [0, 0, 255]]]
    palette = colours.convert("P", palette=PillowImage.Palette.ADAPTIVE)
    palette.save(tmp_path / "palette.png", transparency=int(np.asarray(palette)[0, 1]))
    assert Image.read(tmp_path / "palette.png").pixels.tolist() == [[[255, 0, 0], [255, 255, 255]]]
    PillowImage.fromarray(np.array([[[9, 255], [9, 0]]], np.uint8), "LA").save(tmp_path / "la.png")
    assert Image.read(tmp_path / "la.png").pixels[0, :, 0].tolist() == [9, 255]
    PillowImage.fromarray(np.array([[True, False]])).save(tmp_path / "one.png")
    assert Image.read(tmp_path / "one.png").pixels[0, :, 0].tolist() == [255, 0]
    PillowImage.fromarray(np.array([[0, 1]], np.float32)).save(tmp_path / "float.tif")
    assert Image.read(tmp_path / "float.tif").pixels[0, :, 0].tolist() == [0, 255]
    PillowImage.fromarray(np.array([[0, np.nan]], np.float32)).save(tmp_path / "nan.tif")
    assert "nan.tif" in refusal(Image.read, tmp_path / "nan.tif")


def test_picture_from_pil(tmp_path):
    """Pillow images come in with the limits of files, and go out again."""
    part = Image.from_pil(PillowImage.fromarray(noise_picture()))
    assert (np.asarray(part.to_pil()) == noise_picture()).all()
    assert "64 million" in refusal(Image.from_pil, PillowImage.new("1", (8001, 8000)))
    (tmp_path / "a.png").write_bytes(png_claiming(8, 8))
    refusal(Image.from_pil, PillowImage.open(tmp_path / "a.png"))


def test_picture_save_refusals(tmp_path):
    """An unknown extension lists the known ones; an unwritable place and an impossible size say so."""
    part = Image(noise_picture())
    assert ".png" in refusal(part.save, tmp_path / "a.xyz", kind=UsageError)
    assert "no extension" in refusal(part.save, tmp_path / "a", kind=UsageError)
    assert "cannot be written" in refusal(part.save, tmp_path / "no" / "a.png")
    assert "70000x1" in refusal(Image(noise_picture(1, 70000)).save, tmp_path / "a.jpg")
    assert not list(tmp_path.iterdir())


def test_resize_crop():
    """The centre is kept: the sides of a wide picture fall away, a picture of that size is untouched."""
    stripes = np.repeat(np.uint8([10, 100, 200, 30]), 8)[None, :, None] * np.ones((16, 1, 3), np.uint8)
    part = Image(stripes, context=True)
    middle = part.resize_crop(8, 8)
    assert middle.context
    assert middle.pixels.shape == (8, 8, 3)
    assert np.abs(middle.pixels[:, :, 0] - np.repeat([100.0, 200.0], 4)).max() < 20
    assert part.resize_crop(16, 32) is part
    assert Image(noise_picture(256, 256)).resize_crop(8, 8).pixels.std() < 10  # averaged, not picked


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 100000), (5000, 1), (7, 3)])
def test_resize_crop_any_aspect(tmp_path, height, width):
    """Pictures of every size and aspect are read, and brought to every other."""
    Image(noise_picture(height, width)).save(tmp_path / "a.png")
    for target in ((32, 32), (1, 64), (64, 1)):
        assert Image.read(tmp_path / "a.png").resize_crop(*target).pixels.shape == (*target, 3)


def test_picture_shows_itself():
    """repr holds no pixels; notebooks get an enlarged picture without smoothing, and the exact one as HTML."""
    part = Image(noise_picture(16, 32))
    assert repr(part) == "Image(32x16)"
    shown = Image.from_pil(PillowImage.open(io.BytesIO(part._repr_png_()))).pixels
    assert (shown[::6, ::6] == part.pixels).all()
    assert 'width="192"' in part._repr_html_()
    exact = Image.from_pil(PillowImage.open(io.BytesIO(part.to_png_bytes())))
    assert (exact.pixels == part.pixels).all()


# --- sounds from arrays


def test_sound_arrays():
    """[n] becomes one channel; integer PCM is scaled to full scale 1; any float becomes float32."""
    assert Audio(tone()[0], 16000).samples.shape == (1, 4000)
    assert Audio(np.int16([-32768, 16384]), 16000).samples.tolist() == [[-1, 0.5]]
    assert Audio(np.int32([-(2**31), 2**30]), 16000).samples.tolist() == [[-1, 0.5]]
    assert Audio(np.uint8([0, 128, 192]), 16000).samples.tolist() == [[-1, 0, 0.5]]
    for dtype in (np.float16, np.float64):
        part = Audio(np.array([0.5, -0.25], dtype), np.int64(16000))
        assert part.samples.dtype == np.float32
        assert type(part.sample_rate) is int
    assert Audio(np.float32([0.1]), 8000).seconds == 1 / 8000


@pytest.mark.parametrize("bad", [[0, np.nan], [0, np.inf], [0, 1e300], [], [[]], [[[0.5]]], [0, 1], [1j], "x"])
def test_sound_refusals(bad):
    """NaN, infinity, overflow, nothing, other shapes, other types."""
    assert refusal(Audio, bad, 16000, kind=UsageError).startswith("sound: ")


def test_sound_refuses_channels_last_and_impossible_rates():
    """The usual mistakes with arrays from elsewhere are named."""
    assert "transpose" in refusal(Audio, np.zeros((16000, 2)), 16000, kind=UsageError)
    for rate in (16000.5, 0, -16000, 10**9, None):
        assert "sample rate" in refusal(Audio, tone(), rate, kind=UsageError)


def test_mono_and_resample():
    """192 kHz with 8 channels becomes 16 kHz mono of the same duration: the tone stays, 20 kHz goes."""
    part = Audio(tone(rate=192000, channels=8) + tone(rate=192000, channels=8, frequency=20000), 192000, context=True)
    result = part.mono().resample(16000)
    assert repr(result) == "Audio(0.25 s, 16000 Hz, mono, context)"
    assert result.samples.shape == (1, 4000)
    assert np.abs(result.samples - tone())[0, 200:-200].max() < 2e-3
    assert Audio(tone(channels=2), 16000).resample(48000).samples.shape == (2, 12000)


def test_mono_is_the_mean_and_resampling_keeps_a_sample():
    """Opposite channels cancel, equal ones keep their level; no sound becomes empty."""
    assert Audio(np.float32([[0.5, 1], [-0.5, 1]]), 16000).mono().samples.tolist() == [[0, 1]]
    assert Audio(np.float32([0.5]), 192000).resample(8000).samples.shape == (1, 1)


# --- sound files


@pytest.mark.parametrize("name", ["a.wav", "a.FLAC"])
def test_sound_lossless_round_trip(tmp_path, name):
    """Every 16-bit value comes back exactly, both ends of the scale included."""
    pcm = np.arange(-32768, 32768, dtype=np.int32).astype(np.int16).reshape(2, -1)
    part = Audio(pcm, 16000)
    part.save(tmp_path / name)
    back = read_part(tmp_path / name)
    assert back.sample_rate == 16000
    assert (back.samples == part.samples).all()
    assert (pcm == soundfile.read(tmp_path / name, dtype="int16")[0].T).all()


@pytest.mark.parametrize(
    ("name", "subtype", "tolerance"),
    [
        *[("a.wav", "PCM_U8", 0.01), ("a.wav", "PCM_24", 1e-6), ("a.wav", "FLOAT", 0), ("a.wav", "DOUBLE", 0)],
        *[("a.flac", "PCM_24", 1e-6), ("a.aiff", "PCM_16", 1e-4), ("a.ogg", "VORBIS", 0.05)],
        ("a.mp3", "MPEG_LAYER_III", 0.05),
    ],
)
def test_sound_encodings(tmp_path, name, subtype, tolerance):
    """Bit depths and formats of other programs are read at full scale 1, whole."""
    soundfile.write(tmp_path / name, tone(channels=2).T, 16000, subtype=subtype)
    part = Audio.read(tmp_path / name)
    assert part.samples.shape == (2, 4000)
    assert np.abs(part.samples - tone())[:, 500:-500].max() <= tolerance


def test_sound_192_khz_8_channels(tmp_path):
    """Read, mixed down, resampled."""
    soundfile.write(tmp_path / "a.wav", tone(rate=192000, channels=8).T, 192000, subtype="PCM_24")
    part = Audio.read(tmp_path / "a.wav")
    assert repr(part) == "Audio(0.25 s, 192000 Hz, 8 channels)"
    assert np.abs(part.mono().resample(16000).samples - tone())[0, 200:-200].max() < 1e-3


def test_sound_bad_files(tmp_path, monkeypatch):
    """Missing, empty, text, no samples, NaN, cut, a header that claims more than is there: the file is named."""
    monkeypatch.chdir(tmp_path)
    wav = Audio(tone(), 16000).to_wav_bytes()
    position = wav.index(b"data") + 4
    soundfile.write("cut.flac", tone()[0], 16000)
    flac = pathlib.Path("cut.flac").read_bytes()
    soundfile.write("cut.aiff", tone()[0], 16000)
    soundfile.write("nan.wav", np.where(np.arange(4000) == 70, np.nan, tone()[0]), 16000, subtype="FLOAT")
    soundfile.write("none.wav", np.zeros(0), 16000)
    files = {
        "empty.wav": b"",
        "text.wav": b"seven\n" * 99,
        "text.raw": b"seven\n" * 99,
        "header.wav": wav[:20],
        "cut.wav": wav[:4000],
        "lying.wav": wav[:position] + struct.pack("<I", 10**9) + wav[position + 4 :],
        "slow.wav": wav.replace(struct.pack("<I", 16000), struct.pack("<I", 5), 1),
        "cut.flac": flac[:-2000],
        "lying.flac": flac[:21] + bytes([flac[21] & 0xF0]) + struct.pack(">I", 9000) + flac[26:],
        "cut.aiff": pathlib.Path("cut.aiff").read_bytes()[:-2000],
    }
    for name, data in files.items():
        pathlib.Path(name).write_bytes(data)
    soundfile.write("foreign.voc", tone()[0], 16000)
    for name in (*files, "foreign.voc", "nan.wav", "none.wav"):
        assert name in refusal(Audio.read, name)
    assert "NaN" in refusal(Audio.read, "nan.wav")
    assert "no samples" in refusal(Audio.read, "none.wav")
    assert "truncated" in refusal(Audio.read, "lying.wav")
    Audio(tone(), 16000).save("short.wav")
    monkeypatch.setattr(soundfile.SoundFile, "blocks", lambda *_, **__: iter([np.zeros((7, 1), np.float32)]))
    assert "truncated" in refusal(Audio.read, "short.wav")
    assert "missing.wav" in refusal(Audio.read, "missing.wav", kind=UsageError)


@pytest.mark.parametrize("stated", [0x7FFFF000, 0xFFFFFFFF])
def test_sound_from_a_pipe(tmp_path, stated):
    """Programs that write WAV to a pipe state a length of 2 or 4 GiB; such files are read to their end."""
    wav = Audio(tone(), 16000).to_wav_bytes()
    position = wav.index(b"data") + 4
    (tmp_path / "a.wav").write_bytes(wav[:position] + struct.pack("<I", stated) + wav[position + 4 :])
    assert Audio.read(tmp_path / "a.wav").samples.shape == (1, 4000)


def test_sound_limits_hold_before_decoding(tmp_path, monkeypatch):
    """Duration and number of samples are judged by the header: nothing is decoded."""
    with soundfile.SoundFile(tmp_path / "long.wav", "w", 1000, 1, subtype="PCM_U8") as sound:
        sound.write(np.zeros(int(media.MAX_SECONDS) * 1000 + 1000))
    monkeypatch.setattr(media, "_decode", lambda *_: pytest.fail("decoded"))
    assert "1801 s" in refusal(Audio.read, tmp_path / "long.wav")
    monkeypatch.setattr(media, "MAX_SAMPLES", 10**6)
    assert "million" in refusal(Audio.read, tmp_path / "long.wav", max_seconds=1e9)


def test_sound_damaged_anywhere_never_escapes(tmp_path):
    """Whatever byte of a file is flipped, a sound or an OmniError comes back."""
    random = np.random.default_rng(0)
    for name in ("a.wav", "a.flac", "a.ogg", "a.aiff"):
        soundfile.write(tmp_path / name, tone(0.02)[0], 16000)
        original = (tmp_path / name).read_bytes()
        for position in random.integers(0, len(original), 60):
            data = bytearray(original)
            data[position] ^= int(random.integers(1, 256))
            (tmp_path / name).write_bytes(data)
            try:
                assert np.isfinite(Audio.read(tmp_path / name).samples).all()
            except OmniError as error:
                assert name in str(error)


def test_sound_save(tmp_path, caplog):
    """Loud samples are clipped aloud; an unknown extension, a missing folder and too many channels are refused."""
    Audio(np.float32([0.5, 2, -3]), 16000).save(tmp_path / "loud.wav")
    assert "2 samples" in caplog.text
    assert Audio.read(tmp_path / "loud.wav").samples.tolist() == [[0.5, 32767 / 32768, -1]]
    part = Audio(tone(channels=9), 16000)
    assert ".wav, .flac" in refusal(part.save, tmp_path / "a.mp3", kind=UsageError)
    assert "cannot be written" in refusal(part.save, tmp_path / "no" / "a.wav")
    assert "9 channels" in refusal(part.save, tmp_path / "a.flac")


def test_sound_shows_itself():
    """repr holds no samples; notebooks get a player with the sound inside."""
    assert repr(Audio(tone(0.52), 16000)) == "Audio(0.52 s, 16000 Hz, mono)"
    assert repr(Audio(tone(0.52, channels=2), 16000)) == "Audio(0.52 s, 16000 Hz, stereo)"
    assert "data:audio/wav;base64,UklGR" in Audio(tone(), 16000)._repr_html_()


# --- parts of any kind


def test_as_part(tmp_path):
    """Strings, arrays, Pillow images, paths and parts become parts; anything else is refused with what is accepted."""
    picture = Image(noise_picture())
    picture.save(tmp_path / "a.png")
    assert as_part(picture) is picture
    assert as_part("a.png").modality == "text"
    for value in (noise_picture(), picture.to_pil(), tmp_path / "a.png"):
        assert (as_part(value).pixels == picture.pixels).all()
    for value in (7, None, b"seven", noise_picture()[..., 0], np.zeros((2, 2, 3))):
        assert "pathlib.Path" in refusal(as_part, value, kind=UsageError)


def test_read_part_unknown_extension(tmp_path):
    """The known extensions are listed, whether or not the file exists."""
    for name in ("a.docx", "a"):
        message = refusal(read_part, tmp_path / name, kind=UsageError)
        assert all(extension in message for extension in (".png", ".wav", ".txt"))


def test_parts_are_frozen_and_equal_by_identity():
    """A part can stand in a set, and cannot be changed."""
    first, second = Text("seven"), Text("seven")
    assert len({first, second, Image(noise_picture()), Audio(tone(), 16000)}) == 4
    with pytest.raises(AttributeError):
        first.text = "eight"
    assert [part.modality for part in (Text, Image, Audio)] == ["text", "image", "audio"]


def test_paths_behind_a_store(tmp_path):
    """Parts are written to a bucket and read from there, and its failures are told in one line."""
    faults = Faults()
    with bucket_of_this_process(faults):
        for part, name in (
            (Image(noise_picture()), "a.png"),
            (Audio(tone(), 16000), "a.wav"),
            (Text("seven"), "a.txt"),
        ):
            part.save(f"gs://{BUCKET}/{name}")
            assert repr(read_part(f"gs://{BUCKET}/{name}")) == repr(part)
        assert "missing" in refusal(read_part, f"gs://{BUCKET}/missing.png", kind=UsageError)
        faults.chance = 1.0
        assert "a fault of the test" in refusal(read_part, f"gs://{BUCKET}/a.png")
        refusal(Text("seven").save, f"gs://{BUCKET}/a.txt")
