"""Janus against transformers, every parameter noise: pictures that are drawn, and pictures that are seen."""

import functools
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import omni
from omni.generate import PreparedRequest, Shadow, loop, unconditional_shadow
from omni.interop.verification import verify
from omni_tokenizers import weights

torch = pytest.importorskip("torch", reason="needs torch: pip install 'omni-any-to-any[parity]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'omni-any-to-any[parity]'")

sys.path.insert(0, str(Path(__file__).parents[1] / "interop"))
from chat_templates import TEMPLATES, write_janus  # noqa: E402
from public_models import largest_error  # noqa: E402
from their_models import CASES, VOCABULARY, loaded  # noqa: E402
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil  # noqa: E402

pytestmark = pytest.mark.parity

TOLERANCE = 1e-4
"""Of the largest value, or of 1."""
CODES, PLACES, WIDTH = 40, 16, 32
BOS, BEGIN, PAD = 1, 91, 0
NAMES = ("janus", "janus tied")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Their model of a case, ours, and the directory that transformers wrote."""

    @functools.cache
    def made(name):
        directory = tmp_path_factory.mktemp(name.replace(" ", "_"))
        theirs = CASES[name].write(directory)
        theirs.generation_config.update(pad_token_id=PAD, bos_token_id=BOS)
        theirs.generation_config.generation_kwargs = {"boi_token_id": BEGIN}
        return theirs, omni.load(directory), directory

    return made


@pytest.fixture(autouse=True)
def precise():
    """Products in full float32."""
    with jax.default_matmul_precision("highest"):
        yield


def pictures(count: int, seed: int = 0) -> list[omni.Image]:
    """Pictures of noise, of different sizes."""
    random = np.random.default_rng(seed)
    sizes = random.integers(3, 24, (count, 2))
    return [omni.Image(random.integers(0, 256, (*size, 3), dtype=np.uint8), context=True) for size in sizes]


def values(model, parts) -> np.ndarray:
    """Pictures as the towers see them: [pictures, 8, 8, 3]."""
    processor = model.processor.image_processor
    return processor.values(np.stack([processor.resized(part).pixels for part in parts]))


def their_features(theirs, scaled: np.ndarray) -> np.ndarray:
    """[pictures, 16, 32]"""
    with torch.no_grad():
        return theirs.model.get_image_features(torch.tensor(scaled.transpose(0, 3, 1, 2))).pooler_output.numpy()


def their_logits(theirs, ids: np.ndarray, scaled: np.ndarray) -> np.ndarray:
    """Of ids with pictures among them."""
    with torch.no_grad():
        pixels = torch.tensor(scaled.transpose(0, 3, 1, 2))
        return theirs.lm_head(theirs.model(input_ids=torch.tensor(ids), pixel_values=pixels).last_hidden_state).numpy()


def their_logits_of_codes(theirs, text: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of ids of text and codes of pictures behind them: logits of text, and of codes."""
    with torch.no_grad():
        before = theirs.get_input_embeddings()(torch.tensor(text))
        stream = torch.cat([before, theirs.prepare_embeddings_for_image_generation(torch.tensor(codes))], dim=1)
        stream = theirs.model.language_model(inputs_embeds=stream).last_hidden_state
        return theirs.lm_head(stream).numpy(), theirs.model.generation_head(stream).numpy()


def errors_of(theirs, ours) -> dict[str, float]:
    """How far what ours makes of everything is from what theirs does: text, codes, pictures."""
    random, block = np.random.default_rng(0), ours.vocabulary.block("image")
    text, codes = random.integers(0, VOCABULARY - 16, (2, 7)), random.integers(0, CODES, (2, PLACES))
    found = ours.logits(np.concatenate([text, block[codes]], axis=1))
    of_text, of_codes = their_logits_of_codes(theirs, text, codes)
    parts = pictures(2)
    scaled, seen = values(ours, parts), np.array(ours.grammar.layouts["image"].seen)
    ids = np.stack([np.concatenate([row[:4], seen, row[4:]]) for row in text])
    features = ours.processor.see(parts)
    with_pictures = ours.logits(ids, features.reshape(-1, WIDTH))
    return {
        "text": largest_error(found[..., :VOCABULARY], of_text),
        "codes": largest_error(found[..., block], of_codes),
        "features": largest_error(features, their_features(theirs, scaled)),
        "with pictures": largest_error(with_pictures[..., :VOCABULARY], their_logits(theirs, ids, scaled)),
    }


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_features_equal_theirs(name, both, capsys):
    """Logits of text and of codes behind both, features of pictures, and logits of prompts with pictures in them."""
    theirs, ours, _ = both(name)
    errors = errors_of(theirs, ours)
    with capsys.disabled():
        print(f"\n{name}: {', '.join(f'{what} {error:.1e}' for what, error in errors.items())}", end="")
    assert max(errors.values()) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_pictures_matters(name, both, tmp_path):
    """With any one tensor of the nets of codes or the tower changed the comparison fails."""
    theirs, _, directory = both(name)
    for file in directory.glob("*.json"):
        (tmp_path / file.name).write_text(file.read_text())
    tensors, random = weights.read(directory / "model.safetensors"), np.random.default_rng(0)
    parts = ("vision_model", "aligner", "generation_")
    keys = [key for key in tensors if any(part in key for part in parts)]
    assert len(keys) == 2 * 16 + 5 + 4 + 5 + 4
    tensors = {key: value for key, value in tensors.items() if "vqmodel" not in key}
    for key in keys:
        noise = 0.3 * random.standard_normal(tensors[key].shape).astype(np.float32)
        if key.endswith("k_proj.bias"):  # it adds as much to all logits of a query, which the softmax does not see
            continue
        weights.write(tmp_path / "model.safetensors", tensors | {key: tensors[key] + noise})
        assert max(errors_of(theirs, omni.load(tmp_path)).values()) > 10 * TOLERANCE, key


def test_padded_prompts_are_theirs_alone(both):
    """Rows that transformers pads to one length have the logits that ours has of each alone."""
    theirs, ours, _ = both("janus")
    random, lengths = np.random.default_rng(1), (3, 9, 14)
    rows = [random.integers(3, VOCABULARY - 16, length) for length in lengths]
    padded, mask = np.zeros((3, max(lengths)), int), np.zeros((3, max(lengths)), int)
    for place, row in enumerate(rows):
        padded[place, -len(row) :], mask[place, -len(row) :] = row, 1
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    inputs = {"input_ids": padded, "attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        found = theirs(**{name: torch.tensor(value) for name, value in inputs.items()}).logits.numpy()
    for place, row in enumerate(rows):
        assert largest_error(ours.logits(row[None])[0], found[place, -len(row) :]) < TOLERANCE


# Pictures that are drawn


def greedy(ids: np.ndarray, **settings) -> PreparedRequest:
    """The likeliest reply to a prompt."""
    zero, one = np.zeros(2, np.float32), np.ones(2, np.float32)
    usual = {"top_k": np.zeros(2, np.int32), "top_p": one, "min_p": zero, "repetition_penalty": one, "is_chat": True}
    return PreparedRequest(ids, settings.pop("max_tokens", PLACES + 3), zero, **usual | settings)


def drawn(model, prompts: np.ndarray, guidance: float, nothing=None) -> np.ndarray:
    """Codes of the likeliest picture for each prompt: [prompts, 16]."""
    weight, nothing = np.float32([1, guidance]), nothing or model.grammar.padded
    requests = [greedy(ids, want=(1,), shadows=unconditional_shadow(nothing(ids), weight)) for ids in prompts]
    replies = model.engine.generate(requests)
    assert all(reply.ids[0] == BEGIN and reply.well_formed for reply in replies)
    return np.stack([model.vocabulary.to_codes("image", reply.ids[1 : PLACES + 1]) for reply in replies])


def their_drawn(theirs, prompts: np.ndarray, guidance: float) -> np.ndarray:
    ids = torch.tensor(np.pad(prompts, ((0, 0), (0, 1)), constant_values=BEGIN))
    settings = {"generation_mode": "image", "do_sample": False, "guidance_scale": guidance}
    return theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings).numpy()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("guidance", [2, 5])
def test_drawn_pictures_are_theirs(name, guidance, both, monkeypatch):
    """Greedy codes under guidance are those of `generate(generation_mode="image")`, where the shadow reads padding in
    the place of the prompt; here without what keeps ids by default that the prompt itself finds unlikely."""
    monkeypatch.setattr(loop, "PLAUSIBLE", 1e-30)
    theirs, ours, directory = both(name)
    ours = omni.load(directory)  # whose programs are not compiled yet
    prompts = np.random.default_rng(0).integers(3, VOCABULARY - 16, (4, 8))
    prompts[:, 0] = BOS
    expected = their_drawn(theirs, prompts, guidance)
    found = drawn(ours, prompts, guidance)
    np.testing.assert_array_equal(found, expected)
    assert len({row.tobytes() for row in expected}) == 4
    empty = drawn(ours, prompts, guidance, lambda ids: ids[:1])
    assert (empty != expected).any()


def test_a_request_is_guided_by_padding(both):
    """What a prompt becomes has the guidance of the release, and a shadow as long as it that says nothing."""
    ours = both("janus")[1]
    (request,) = ours.prepare([omni.Request([omni.Image(pictures(1)[0].pixels)], ["image"])])
    (shadow,) = request.shadows
    np.testing.assert_array_equal(shadow.weight, [0, -4])
    assert shadow.ids[0] == BOS and (shadow.ids[1:] == PAD).all() and len(shadow.ids) == len(request.ids)


def test_drawn_pictures_are_decoded_alike(both):
    """Pixels of codes, but for rounding to whole numbers."""
    theirs, ours, _ = both("janus")
    codes = np.random.default_rng(0).integers(0, CODES, (3, PLACES))
    with torch.no_grad():
        expected = theirs.decode_image_tokens(torch.tensor(codes)).numpy()
    found = ours.tokenizers["image"].decode(codes.reshape(3, 4, 4)).astype(np.float32)
    assert np.abs(found - 127.5 * (np.clip(expected, -1, 1) + 1)).max() < 0.51


# Pictures that are seen


def seen_prompt(model, seed: int, count: int) -> tuple[np.ndarray, list[omni.Image]]:
    """A prompt with so many pictures among text, and the pictures."""
    random, layout = np.random.default_rng(seed), model.grammar.layouts["image"]
    parts, ids = pictures(count, seed), [[BOS], random.integers(3, VOCABULARY - 16, 3)]
    for _ in parts:
        ids += [layout.seen, random.integers(3, VOCABULARY - 16, 2)]
    return np.concatenate(ids).astype(np.int32), parts


def their_reply(theirs, ids: np.ndarray, scaled: np.ndarray, tokens: int, banned) -> np.ndarray:
    """The likeliest tokens, each from a pass over all before it."""
    for _ in range(tokens):
        logits = their_logits(theirs, ids[None], scaled)[0, -1]
        logits[banned] = -np.inf
        ids = np.append(ids, logits.argmax())
    return ids[-tokens:]


def test_replies_to_pictures_are_theirs(both):
    """64 likeliest tokens behind one and two pictures, with our cache and without it, are theirs; beside other pictures
    and a prompt of text alone they are what they are alone."""
    theirs, ours, _ = both("janus")
    text = ours.vocabulary.block("text")
    banned = np.setdiff1d(np.arange(VOCABULARY), text)
    requests, expected = [], []
    for seed, count in ((0, 1), (1, 2), (2, 1)):
        ids, parts = seen_prompt(ours, seed, count)
        features = ours.processor.see(parts).reshape(-1, WIDTH)
        reply = their_reply(theirs, ids, values(ours, parts), 64, banned)
        whole = np.concatenate([ids, reply])
        logits = ours.logits(whole[None], features)[0, len(ids) - 1 : -1, :VOCABULARY]
        np.testing.assert_array_equal(text[logits[:, text].argmax(-1)], reply)
        assert len(np.unique(reply)) > 4
        requests.append(greedy(ids, max_tokens=65, want=(0,), features=features))
        expected.append(reply)
    plain = greedy(requests[0].ids[:4], max_tokens=65, want=(0,))
    alone = [ours.engine.generate([request])[0].ids for request in (*requests, plain)]
    together = ours.engine.generate([*requests, plain])
    for reply, own in zip(together, alone, strict=True):
        np.testing.assert_array_equal(reply.ids, own)
    for reply, own in zip(together[:3], expected, strict=True):
        end = list(reply.ids).index(2) if 2 in reply.ids else len(reply.ids)  # eos may be likelier than any text
        np.testing.assert_array_equal(reply.ids[:end], own[:end])
    assert max(len(reply.ids) for reply in together) > 8


def test_what_was_read_of_a_picture_is_no_others(both):
    """In one slot, prompts that differ in a picture alone are each answered as in a batch of its own; of the same
    picture, what was read is not read again."""
    ours = both("janus")[1]
    (ids, first), (_, second) = seen_prompt(ours, 0, 1), seen_prompt(ours, 5, 1)
    features = [ours.processor.see(parts).reshape(-1, WIDTH) for parts in (first, second)]
    requests = [greedy(ids, max_tokens=20, want=(0,), features=each) for each in features]
    expected = [ours.engine.generate([request])[0].ids for request in requests]
    assert not np.array_equal(*expected)
    slots, read = ours.engine.open(1, capacity=96), []
    for which in (0, 1, 1):
        slots.add(requests[which])
        before, reply = ours.engine.counts["read"], None
        while reply is None:
            reply = next((each.reply for each in slots.step() if each.reply), None)
        read.append(ours.engine.counts["read"] - before)
        np.testing.assert_array_equal(reply.ids, expected[which])
    assert read[1] == len(ids) - 5 and read[2] == 1


def test_guidance_keeps_pictures(both):
    """A prompt with a picture under guidance of text: the shadow without text sees it, the one of padding does not."""
    ours = both("janus")[1]
    ids, parts = seen_prompt(ours, 0, 1)
    features = ours.processor.see(parts).reshape(-1, WIDTH)
    media = np.concatenate([ids[:1], ids[4:22]])
    weights_of = [np.float32([-1, 0]), np.float32([-0.5, 0])]
    shadows = (Shadow(ours.grammar.padded(ids), weights_of[0]), Shadow(media, weights_of[1], features))
    reply = ours.engine.generate([greedy(ids, max_tokens=4, want=(0,), features=features, shadows=shadows)])[0].ids
    own = ours.logits(ids[None], features)[0, -1]
    nothing, seen = ours.logits(ours.grammar.padded(ids)[None])[0, -1], ours.logits(media[None], features)[0, -1]
    guided = own - 1.0 * (nothing - own) - 0.5 * (seen - own)
    admitted = np.full(len(own), -np.inf)
    admitted[ours.vocabulary.block("text")] = 0
    plausible = np.where(own >= (own + admitted).max() + np.log(loop.PLAUSIBLE), 0, -np.inf)
    assert reply[0] == (guided + admitted + plausible).argmax()


# Files


@pytest.mark.parametrize("name", NAMES)
def test_an_export_draws_and_sees_in_transformers(name, both, tmp_path):
    """Every key known and none missing; text, codes and pictures as before in transformers, and here again."""
    theirs, ours, _ = both(name)
    ours.export(tmp_path / "theirs")
    again, unknown = loaded(tmp_path / "theirs")
    assert unknown == [] and again.config.model_type == "janus"
    written, before = again.config.to_dict(), theirs.config.to_dict()
    for part in ("vision_config", "vq_config"):
        assert {key: written[part].get(key) for key in before[part]} == before[part]
    codes = np.random.default_rng(0).integers(0, CODES, (1, PLACES))
    np.testing.assert_array_equal(
        *(model.decode_image_tokens(torch.tensor(codes)).detach().numpy() for model in (theirs, again))
    )
    scaled = values(ours, pictures(2))
    assert largest_error(their_features(again, scaled), their_features(theirs, scaled)) < TOLERANCE
    assert max(errors_of(theirs, omni.load(tmp_path / "theirs")).values()) < TOLERANCE
    ours.save(tmp_path / "ours")
    assert max(errors_of(theirs, omni.load(tmp_path / "ours")).values()) < TOLERANCE


def test_import_verifies_what_it_sees(both, tmp_path, monkeypatch):
    """Logits, pixels and features of a picture are theirs, and where one differs the check says so."""
    directory = both("janus")[2]
    source = tmp_path / "source"
    source.mkdir()
    for file in directory.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    JanusImageProcessorPil(size={"height": 8, "width": 8}, min_size=2).save_pretrained(source)
    ours = omni.load(source)

    def found() -> dict:
        return {check.name: check.passed for check in verify(ours, source)}

    usual = {"logits": True, "text": None, "pixels of a picture": True, "codes of a picture": None}
    assert found() == usual | {"features of a picture": True}
    see = ours.processor._see
    monkeypatch.setattr(ours.processor, "_see", lambda scaled: see(scaled) * 1.001)
    assert found()["features of a picture"] is False


def test_a_chat_is_written_as_their_processor_does(tmp_path):
    """Ids of a prompt with pictures are those of JanusProcessor, placeholders and all, and of one that is drawn but for
    the beginning of the picture, with which the reply begins."""
    names = write_janus(tmp_path, TEMPLATES["entries"].replace("<image>", "<image_placeholder>"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    scaling = JanusImageProcessorPil(size={"height": 8, "width": 8}, min_size=2)
    processor = transformers.JanusProcessor(scaling, tokenizer, num_image_tokens=16)
    model, picture = omni.load(tmp_path), pictures(1)[0].pixels
    text, image = ({"type": "text", "text": "What is\n"}, {"type": "image", "image": picture})
    for content in ([text, image, text, image], [text]):
        messages = [{"role": "user", "content": content}]
        settings = {"chat_template": model.chat_template.source, "add_generation_prompt": True, "tokenize": True}
        theirs = processor.apply_chat_template(messages, return_dict=True, return_tensors="np", **settings)
        ids = model.prepare([omni.Request(messages, max_tokens=1)])[0].ids
        assert ids.tolist() == np.asarray(theirs["input_ids"]).ravel().tolist()
        assert (ids == names["<image_placeholder>"]).sum() == 16 * (len(content) // 2)
    assert json.loads((tmp_path / "config.json").read_text())["image_token_id"] == names["<image_placeholder>"]
