"""Pictures of prompts against transformers: pixels of its image processors, ids of its models."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PillowImage

import omni
from omni.image_processor import ImageProcessor
from omni.interop import chameleon, emu3, janus
from omni.parts import Image

torch = pytest.importorskip("torch", reason="needs torch: pip install 'omni-any-to-any[parity]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'omni-any-to-any[parity]'")
skimage = pytest.importorskip("skimage", reason="needs scikit-image: pip install 'omni-any-to-any[quickstart]'")

from their_models import CASES  # noqa: E402
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil  # noqa: E402
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil  # noqa: E402

pytestmark = pytest.mark.parity

FOLDER = Path(skimage.__file__).parent / "data"
# A file of scikit-image, what is cut from it, (top, left, height, width), and the mode that it is brought into.
PHOTOS = {
    "as large": ("astronaut.png", None),
    "landscape": ("coffee.png", None),
    "landscape, odd": ("chelsea.png", None),
    "portrait": ("rocket.jpg", (0, 200, 427, 161)),
    "portrait, odd": ("chelsea.png", (3, 5, 287, 101)),
    "large": ("retina.jpg", None),
    "wide": ("hubble_deep_field.jpg", (100, 0, 37, 997)),
    "transparent": ("logo.png", None),
    "grey": ("camera.png", None),
    "palette": ("color.png", (0, 0, 123, 77), "P"),
    "grey and transparent": ("logo.png", (50, 20, 300, 211), "LA"),
    "tiny": ("astronaut.png", (100, 200, 5, 7)),
    "a row": ("astronaut.png", (100, 200, 2, 40)),
    "one pixel": ("astronaut.png", (100, 200, 1, 1)),
}
OWN = {
    "chameleon": chameleon.SCALING | {"side": 512},
    "emu3": emu3.SCALING | {"spatial_factor": 8},
    "janus": janus.SCALING | {"side": 384, "min_size": janus.MIN_SIZE},
}
THEIRS = {
    # Of pictures that are not RGB Janus's makes none, unless it is asked to.
    "janus": JanusImageProcessorPil(do_convert_rgb=True),
    "janus released": JanusImageProcessorPil(do_convert_rgb=True, image_mean=[0.5] * 3, image_std=[0.5] * 3),
    "janus narrow": JanusImageProcessorPil(do_convert_rgb=True, size={"height": 48, "width": 48}, min_size=40),
    "chameleon": ChameleonImageProcessorPil(),
    "emu3": transformers.Emu3ImageProcessor(),
    "emu3 released": transformers.Emu3ImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3),
}


def photo(name: str) -> PillowImage.Image:
    file, cut, *mode = PHOTOS[name]
    picture = PillowImage.open(FOLDER / file)
    if cut is None:
        return picture
    top, left, height, width = cut
    picture = picture.crop((left, top, left + width, top + height))
    return picture.convert(*mode) if mode else picture


def their_pixels(processor, picture: PillowImage.Image) -> np.ndarray:
    """[height, width, 3], float32; what is only one or three pixels high is given as RGB in an order that it knows."""
    order = {} if isinstance(processor, ChameleonImageProcessorPil) else {"input_data_format": "channels_last"}
    return np.moveaxis(np.asarray(processor(picture, return_tensors="np", **order)["pixel_values"][0]), 0, -1)


def ours(processor) -> ImageProcessor:
    """What our reader makes of what theirs writes."""
    return ImageProcessor.from_json(json.loads(processor.to_json_string()), "a test")


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize("name", PHOTOS)
def test_pixels_equal_theirs(kind, name):
    """Of photos of every form, those of transformers' image processors, to the bit."""
    picture, processor = photo(name), ours(THEIRS[kind])
    scaled = processor.resized(Image.from_pil(picture))
    np.testing.assert_array_equal(processor.values(scaled.pixels[None])[0], their_pixels(THEIRS[kind], picture))
    np.testing.assert_array_equal(processor.resized(scaled).pixels, scaled.pixels)


@pytest.mark.parametrize("kind", OWN)
def test_values_without_a_file_are_those_of_the_training(kind):
    """Sizes and filter of transformers, but [-1, 1]: there Chameleon's white is 0.989, Emu3's and Janus's have CLIP's
    mean, with which Janus's fills up what is no square."""
    picture = Image.from_pil(photo("as large" if kind == "janus" else "landscape, odd"))
    own, theirs = ImageProcessor(**OWN[kind]), ours(THEIRS[kind])
    pixels = own.resized(picture).pixels
    np.testing.assert_array_equal(pixels, theirs.resized(picture).pixels)
    np.testing.assert_allclose(own.values(pixels), pixels / 127.5 - 1, atol=2e-7)
    white = np.full((1, 1, 1, 3), 255, np.uint8)
    apart = (own.values(white) - theirs.values(white)).ravel()
    expected = [0.011] * 3 if kind == "chameleon" else [-0.9303, -1.0749, -1.1459]
    np.testing.assert_allclose(apart, expected, atol=1e-4)


def test_where_chameleons_release_scales_otherwise():
    """It rounds the longer edge where transformers cuts it off: some photos are scaled a little otherwise."""
    apart = {}
    for name in PHOTOS:
        ours = ImageProcessor(**OWN["chameleon"]).resized(Image.from_pil(photo(name)))
        picture = Image.from_pil(photo(name)).to_pil()
        width, height = (round(512 / min(picture.size) * edge) for edge in picture.size)
        left, top = (width - 512) // 2, (height - 512) // 2
        scaled = picture.resize((width, height), PillowImage.Resampling.LANCZOS)
        theirs = np.asarray(scaled.crop((left, top, left + 512, top + 512)))
        apart[name] = np.abs(np.float32(theirs) - ours.pixels)
    different = [name for name in PHOTOS if apart[name].any()]
    assert len(different) == 6 and "landscape, odd" in different
    assert 40 < max(each.max() for each in apart.values()) < 60
    assert 2 < max(each.mean() for each in apart.values()) < 2.5


@pytest.fixture(scope="module")
def both_chameleons(tmp_path_factory):
    """A tiny model of transformers with pictures of 16 x 16 pixels, its processor, and ours of their directory."""
    path, settings = tmp_path_factory.mktemp("chameleon"), CASES["chameleon"].settings
    pictures = settings["vq_config"] | {"resolution": 16}
    theirs = dataclasses.replace(CASES["chameleon"], settings=settings | {"vq_config": pictures}).write(path)
    processor = ChameleonImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor.save_pretrained(path)
    return theirs, processor, omni.load(path)


def check_codes(found: np.ndarray, theirs: np.ndarray) -> None:
    """The same codes; of noise some latents lie between two vectors, where either may be found."""
    assert found.shape == theirs.shape and len(np.unique(theirs)) > 3
    assert (found != theirs).mean() < 0.02


@pytest.mark.parametrize("name", ["landscape, odd", "portrait", "transparent", "tiny"])
def test_chameleons_ids_equal_theirs(name, both_chameleons):
    """A picture of a prompt becomes the ids that transformers' processor and model make of it, between its tokens."""
    theirs, processor, ours = both_chameleons
    picture = photo(name)
    with torch.no_grad():
        expected = theirs.model.get_image_tokens(processor(picture, return_tensors="pt")["pixel_values"])
    names = CASES["chameleon"].settings["vocabulary_map"]
    ids = ours.prepare([omni.Request([picture])])[0].ids
    assert ids[[0, 1, -2]].tolist() == [names["<s>"], names["<racm3:break>"], names["<eoss>"]]
    check_codes(ids[2:-2], expected.numpy().ravel())


@pytest.fixture(scope="module")
def both_emu3(tmp_path_factory):
    """The same of an Emu3 with codes of 8 x 8 pixels and pictures of about 50 x 50."""
    path, case = tmp_path_factory.mktemp("emu3"), CASES["emu3"]
    pictures = case.settings["vq_config"] | {"channel_multiplier": [1, 1, 1, 1]}
    text = case.settings["text_config"] | {"max_position_embeddings": 4400}
    theirs = dataclasses.replace(case, settings=case.settings | {"vq_config": pictures, "text_config": text}).write(
        path
    )
    processor = transformers.Emu3ImageProcessor(min_pixels=32 * 32, max_pixels=56 * 56)
    processor.save_pretrained(path)
    return theirs, processor, omni.load(path)


@pytest.mark.parametrize("name", ["landscape, odd", "portrait, odd", "transparent", "a row"])
def test_emu3s_ids_equal_theirs(name, both_emu3):
    """A picture of a prompt has a size of its own, "rows*columns" in plain text, before the ids of theirs."""
    theirs, processor, ours = both_emu3
    picture, names = photo(name), CASES["emu3"].settings["vocabulary_map"]
    values = processor(picture, return_tensors="pt")
    (height, width), sizes = values["image_sizes"][0].tolist(), ours.grammar.layouts["image"].shapes
    assert (height // 8, width // 8) not in sizes
    with torch.no_grad():
        expected = theirs.model.get_image_tokens(values["pixel_values"], values["image_sizes"]).numpy()
    ids = ours.prepare([omni.Request([picture])])[0].ids
    size = [names[character] for character in f"{height // 8}*{width // 8}"]
    before = [1, names["<|image start|>"], *size, names["<|image token|>"]]
    assert ids[: len(before)].tolist() == before
    assert ids[-3:-1].tolist() == [names["<|extra_201|>"], names["<|image end|>"]]
    check_codes(ids[len(before) : -3], expected)
    rows = ids[len(before) : -3].reshape(height // 8, -1)
    assert (rows[:, -1] == names["<|extra_200|>"]).all()
    document = ours.grammar.parse(ids)
    assert [span.codes.shape for span in document] == [(1, height // 8, width // 8)]
    assert len(ours.grammar.annotate(ids)) == len(ids)


def test_pictures_of_many_sizes_go_together(both_emu3):
    """What is beside a picture changes nothing of it, though transformers pads all to one size; and replies come."""
    ours = both_emu3[2]
    pictures = [photo(name) for name in ("landscape, odd", "portrait, odd")]
    alone = [ours.prepare([omni.Request([picture])])[0].ids[1:-1] for picture in pictures]
    together = ours.prepare([omni.Request(pictures, max_tokens=3)])
    np.testing.assert_array_equal(together[0].ids[1:-1], np.concatenate(alone))
    assert len(ours.engine.generate(together)[0].ids) <= 3


def test_an_exported_file_is_theirs(both_chameleons, tmp_path):
    """transformers reads the processor's file of an export as the processor that it was."""
    _, processor, ours = both_chameleons
    ours.export(tmp_path)
    assert ChameleonImageProcessorPil.from_pretrained(tmp_path).to_dict() == processor.to_dict()
    assert omni.load(tmp_path).grammar.hash == ours.grammar.hash
