"""How pictures are scaled: read from a checkpoint's files, kept with the model, sizes that are given and drawn."""

import dataclasses
import json
import tracemalloc

import numpy as np
import pytest
from public_models import golden

import omni
from omni.grammar import Grammar, Span
from omni.image_processor import ImageProcessor
from omni.interop import chameleon, emu3, janus
from omni.parts import Image
from omni.processor import Processor, given
from omni_tokenizers.errors import OmniError

SCALING = {"rescale_factor": 0.0078, "resample": 3, "image_mean": [3.0, -1.0, 0.5]}
SQUARE = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}} | SCALING
FREE = ImageProcessor(**emu3.SCALING | {"min_pixels": 16, "max_pixels": 200}, spatial_factor=2)
NOISE = np.random.default_rng(0).integers(0, 256, (11, 24, 3), dtype=np.uint8)


@pytest.fixture
def directory(tmp_path):
    """A golden Chameleon, with pictures of 8 x 8 pixels."""
    return golden("chameleon").write(tmp_path / "chameleon")


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_the_file_says_how_pictures_are_scaled(directory, tmp_path, file):
    """Either file of transformers counts, what it leaves out is the family's; saving and exporting keep it."""
    usual = omni.load(directory)
    assert usual.processor.image_processor == ImageProcessor(**chameleon.SCALING, side=8)
    (directory / file).write_text(json.dumps({"image_processor": SQUARE} if file.startswith("proc") else SQUARE))
    model = omni.load(directory)
    expected = SCALING | {"image_mean": (3.0, -1.0, 0.5)}
    assert model.processor.image_processor == dataclasses.replace(usual.processor.image_processor, **expected)
    assert model.encode([Image(NOISE)]).tolist() != usual.encode([Image(NOISE)]).tolist()
    model.save(tmp_path / "saved")
    model.export(tmp_path / "exported")
    for way in ("saved", "exported"):
        again = omni.load(tmp_path / way)
        assert again.grammar.hash == model.grammar.hash
        np.testing.assert_array_equal(again.encode([Image(NOISE)]), model.encode([Image(NOISE)]))
    exported = json.loads((tmp_path / "exported" / "preprocessor_config.json").read_text())
    assert exported["image_processor_type"] == "ChameleonImageProcessor" and exported.items() >= SQUARE.items()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"do_resize": False}, "do_resize = False is not supported"),
        ({"do_convert_rgb": False}, "do_convert_rgb = False is not supported"),
        ({"do_center_crop": False}, "do_center_crop = False is not supported"),
        ({"size": {"height": 8, "width": 8}}, "only a shortest_edge"),
        ({"size": {"shortest_edge": 8, "longest_edge": 9}}, "only a shortest_edge"),
        ({"size": {"shortest_edge": 9}}, "crop_size"),
        ({"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}, "size and crop_size have 16"),
        ({"crop_size": 8}, "crop_size"),
        ({"resample": 6}, "resample is 6"),
        ({"resample": "lanczos"}, "resample"),
        ({"image_std": [1, 0, 1]}, "image_std"),
        ({"image_mean": [1, 1]}, "three channels"),
        ({"rescale_factor": float("nan")}, "finite"),
        ({"min_pixels": 4, "max_pixels": 10**9, "spatial_factor": 2}, "do_center_crop = True"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(directory, values, message):
    """One line with the file and the key."""
    (directory / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(OmniError, match=message) as caught:
        omni.load(directory)
    assert "preprocessor_config.json: " in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": {"height": 8, "width": 9}}, "only a square"),
        ({"size": {"shortest_edge": 8}}, "only a square"),
        ({"size": {"height": 16, "width": 16}}, "size is 16; config.json's pictures have 8"),
        ({"min_size": 9}, "min_size is 9; it must be 0 to 8"),
        ({"do_pad": False}, "do_pad = False is not supported"),
        ({"do_center_crop": True}, "do_center_crop = True is not supported"),
        ({"image_mean": [2.0, 0.5, 0.5]}, "must be a colour"),
    ],
)
def test_what_janus_does_not_scale_by_is_refused(tmp_path, values, message):
    """One line with the file and the key, of a family that fills pictures up."""
    golden("janus").write(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"background_color": [127] * 3, "min_size": 2}))
    usual = omni.load(tmp_path).processor.image_processor
    assert usual == ImageProcessor(**janus.SCALING, side=8, min_size=2)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(OmniError, match=message) as caught:
        omni.load(tmp_path)
    assert "preprocessor_config.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("shape", "inside"), [((5, 40), (3, 8)), ((30, 20), (8, 5)), ((8, 8), (8, 8))])
def test_pictures_are_filled_up_with_the_mean(shape, inside):
    """The longer edge is the side, the shorter one of its aspect or of the fewest pixels, and what is around it has the
    colour of the mean; what is read back from JSON is the same processor."""
    processor = ImageProcessor(**janus.SCALING | {"image_mean": (0.2, 0.5, 0.9)}, side=8, min_size=3)
    pixels = processor.resized(Image(np.full((*shape, 3), 255, np.uint8))).pixels
    white = (pixels == 255).all(-1)
    rows, columns = np.flatnonzero(white.any(1)), np.flatnonzero(white.any(0))
    assert pixels.shape == (8, 8, 3) and (len(rows), len(columns)) == inside and white.sum() == inside[0] * inside[1]
    assert rows[0] == (8 - inside[0]) // 2 and columns[0] == (8 - inside[1]) // 2
    assert {tuple(pixel) for pixel in pixels[~white].tolist()} <= {(51, 127, 229)}
    assert ImageProcessor.from_json(processor.to_json(), "file") == processor


def test_unknown_keys_are_ignored_aloud(directory, caplog):
    """What transformers' processor would not look at either is named in the log; what is null says nothing."""
    (directory / "preprocessor_config.json").write_text(json.dumps({"do_flip": True, "pad_size": None, "do_pad": True}))
    omni.load(directory)
    assert "do_flip is not known" in caplog.text and "pad" not in caplog.text


def test_a_narrow_picture_is_refused_before_it_takes_memory():
    """Of one row of pixels the square would need gigabytes; Emu3 has a bound of its own."""
    line = Image(np.zeros((1, 30_000, 3), np.uint8))
    with pytest.raises(OmniError, match="30000x1 pixels is too narrow"):
        ImageProcessor(**chameleon.SCALING, side=512).resized(line)
    with pytest.raises(OmniError, match="longer than 200 times"):
        FREE.resized(line)


def test_narrow_pictures_have_a_row_of_codes():
    """Those that would be rounded to no row grow to the fewest pixels; without any such number that is refused."""
    narrow = Image(np.zeros((3, 40, 3), np.uint8))
    values = FREE.to_json() | {"min_pixels": 1, "spatial_factor": 8}
    found = ImageProcessor.from_json(values, "file").resized(narrow)
    assert (found.height, found.width) == (8, 8)
    with pytest.raises(OmniError, match="file: no pictures have 8 pixels an edge at least, and 0 to 200 in all"):
        ImageProcessor.from_json(values | {"min_pixels": 0}, "file")


def test_values_are_those_of_all_pixels_at_once(monkeypatch):
    """Scaled piece by piece, to the bit, with one array of float32 and little besides."""
    pixels = np.random.default_rng(0).integers(0, 256, (7, 96, 128, 3), dtype=np.uint8)
    whole = (pixels.astype(np.float64) * FREE.rescale_factor).astype(np.float32)
    whole = (whole - np.float32(FREE.image_mean)) / np.float32(FREE.image_std)
    monkeypatch.setattr("omni.image_processor._CHUNK", 1000)
    tracemalloc.start()
    try:
        values = FREE.values(pixels)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(values, whole)
    assert values.dtype == np.float32 and peak < 1.2 * values.nbytes


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> Processor:
    """Emu3's documents with three drawn sizes and pictures of 4 to 50 codes of 2 x 2 pixels."""
    stored = golden("emu3")
    names = stored.config["vocabulary_map"]
    model = omni.load(stored.write(tmp_path_factory.mktemp("emu3")))
    shapes = [
        {"rows": rows, "columns": columns, "prefix": [names[character] for character in f"{rows}*{columns}"]}
        for rows, columns in ((2, 2), (2, 3), (3, 2))
    ]
    more = {"preprocessing": FREE.to_json(), "spelling": {character: names[character] for character in "0123456789*"}}
    grammar = Grammar(emu3.grammar(shapes, **more), model.vocabulary)
    return Processor(model.vocabulary, grammar, {"image": model.tokenizers["image"]})


def test_given_pictures_have_any_size_and_drawn_ones_those_of_the_grammar(processor):
    """A picture of a prompt keeps its own grid; as a target it has the nearest of the sizes that are drawn."""
    picture = Image(NOISE)
    ((asked,), (drawn,)) = processor.spans([given([picture]), [picture]])
    assert asked.codes.shape == (1, 4, 10) and drawn.codes.shape == (1, 2, 3)
    prepared = processor.prepared(given([picture])[0])
    assert (prepared.height, prepared.width) == (8, 20)
    np.testing.assert_array_equal(processor.prepared(prepared).pixels, prepared.pixels)
    parts = processor.parts([[asked, drawn]])[0]
    assert [(part.height, part.width) for part in parts] == [(8, 20), (4, 6)]


def test_many_pixels_go_through_the_tokenizer_in_turns(processor, monkeypatch):
    """Pictures of one size go together as far as a bound of pixels allows, at least one; their codes are the same."""
    pictures = given([Image(NOISE[::-1]), Image(NOISE[:8, :8]), Image(NOISE), Image(255 - NOISE)])
    spans, tokenizer, sizes = processor.spans([pictures])[0], processor.tokenizers["image"], []
    encode = tokenizer.encode_values
    monkeypatch.setattr(tokenizer, "encode_values", lambda values: sizes.append(len(values)) or encode(values))
    for most in (2 * 8 * 20, 1):
        monkeypatch.setattr("omni.processor._BATCH_PIXELS", most)
        for one, other in zip(spans, processor.spans([pictures])[0], strict=True):
            np.testing.assert_array_equal(one.codes, other.codes)
    assert sizes == [2, 1, 1, 1, 1, 1, 1]


def test_templates_of_given_sizes_are_made_once(processor, monkeypatch):
    """Reading a size again does not write it out again; of many sizes the last ones are kept."""
    layout, made = processor.grammar.layouts["image"], []
    original = type(layout)._template
    monkeypatch.setattr(type(layout), "_template", lambda self, shape: made.append(shape.size) or original(self, shape))
    for _ in range(3):
        processor.grammar.annotate(processor.grammar.prompt([Span("image", np.zeros((1, 9, 9), int), context=True)]))
    assert made == [(9, 9)]
    for columns in range(1, 70):
        layout.template(11, columns, given=True)
    assert layout.template(11, 69, given=True) is layout.template(11, 69, given=True)
    assert layout.template(9, 9, given=True) is not None and made.count((9, 9)) == 2


def test_given_sizes_are_read_as_they_are_written(processor):
    """Packed, parsed and annotated alike, among spans of drawn sizes; never accepted as something to draw."""
    grammar, draw = processor.grammar, np.random.default_rng(1)
    spans = [
        Span("image", draw.integers(16, size=(1, *size)), context=True) for size in ((5, 10), (2, 3), (1, 1), (7, 4))
    ]
    target = Span("image", draw.integers(16, size=(1, 3, 2)))
    document = grammar.pack([*spans, target])
    found = grammar.parse(document.ids)
    for span, other in zip([*spans, target], found, strict=True):
        np.testing.assert_array_equal(other.codes, span.codes)
        assert other.context == span.context
    own = grammar.annotate(grammar.pack([target]).ids)
    np.testing.assert_array_equal(document.states[-len(own) + 1 :], own[1:])
    length = len(document.ids)
    assert (grammar.positions(document.states, np.arange(length))[:, 0] == np.arange(length)).all()
    with pytest.raises(OmniError, match="writes no image of 5 x 10 codes"):
        grammar.pack([dataclasses.replace(spans[0], context=False)])


def test_damaged_spans_of_given_sizes_are_refused(processor):
    """A code, an end of a row or a digit that is wrong, a size without its codes, a span inside of another."""
    grammar = processor.grammar
    ids = grammar.prompt([Span("image", np.arange(50).reshape(1, 5, 10) % 16, context=True)])
    assert len(grammar.annotate(ids)) == len(ids)
    wrong = [np.delete(ids, place) for place in (3, 8, 17, -2)]
    wrong += [np.r_[ids[:place], ids[0], ids[place + 1 :]] for place in (2, 9, 17, len(ids) - 2)]
    wrong += [ids[:20], np.r_[ids[:3], ids[1:]], np.r_[ids[:2], ids[2], ids[2:]]]
    drawn = grammar.span_ids(Span("image", np.zeros((1, 2, 3), np.int32)))
    wrong.append(np.r_[ids[0], drawn[:7], ids[1:]])
    for each in wrong:
        with pytest.raises(OmniError):
            grammar.annotate(each)
        with pytest.raises(OmniError):
            grammar.parse(each)


def test_chats_hold_pictures_of_given_sizes(processor):
    """Between what is said, a picture of any size stands as one of a drawn size does; a damaged one is refused."""
    grammar, text = processor.grammar, int(processor.vocabulary.block("text")[0])
    given_, drawn = (
        grammar.span_ids(Span("image", np.zeros((1, *size), np.int32), context=True)) for size in ((5, 10), (2, 3))
    )
    for begin in ([], [text], [grammar.control["bos"], text]):  # what no document has between its parts
        after_given, after_drawn = (
            grammar.annotate_chat(np.r_[begin, ids, grammar.control["eos"], text].astype(np.int32))[
                len(begin) + len(ids) - 1 :
            ]
            for ids in (given_, drawn)
        )
        np.testing.assert_array_equal(after_given, after_drawn)
    with pytest.raises(OmniError):
        grammar.annotate_chat(np.delete(given_, 12))
