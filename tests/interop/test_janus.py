"""Janus: its documents, codes with nets of their own, pictures that are seen, and what is refused."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from chat_templates import write_janus
from flax import nnx
from host_devices import host_devices
from public_models import golden

import omni
from omni.generate import PreparedRequest
from omni.generate.programs import Programs
from omni.grammar import Grammar, GrammarError, Span
from omni.interop import janus
from omni.interop.family import ADDED_TOKENS
from omni.layout import SpanLayout
from omni.model import CodeNetsConfig, Transformer, TransformerConfig, VisionConfig, make_decoder
from omni.model.presets import active_parameter_count, parameter_count
from omni.vocabulary import Vocabulary
from omni_tokenizers.checkpoints.family import Settings

RELEASE = {
    "text_config": {
        "vocab_size": 102_400,
        "hidden_size": 2048,
        "bos_token_id": 100_000,
        "eos_token_id": 100_001,
        "pad_token_id": 100_002,
    },
    "image_token_id": 100_581,
    ADDED_TOKENS: {"<begin_of_image>": 100_016, "<end_of_image>": 100_593, "<image_placeholder>": 100_581},
}
PUBLISHED, CODES = 96, 40


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return golden("janus").write(tmp_path_factory.mktemp("janus"))


@pytest.fixture(scope="module")
def model(directory):
    return omni.load(directory)


def picture(seed: int = 0) -> omni.Image:
    return omni.Image(np.random.default_rng(seed).integers(0, 256, (9, 5, 3), dtype=np.uint8))


# Documents


def test_the_release_is_written_as_published():
    """At its ids: codes behind the published ids, 576 of them between begin and end; a picture that is seen is as many
    placeholders, whose states are followed in documents and chats."""
    settings = Settings(RELEASE, "config.json")
    config = janus.read(settings)
    assert (config.embedded, config.vision.tokens, config.code_nets) == (102_400, 576, CodeNetsConfig(16_384, 8))
    preset = janus.preset(settings, config, None)
    grammar = Grammar(preset.declaration, preset.vocabulary)
    assert grammar.control == {"bos": 100_000, "turn": 102_400, "eos": 100_001, "pad": 100_002}
    assert preset.vocabulary.size == 102_528 + 16_384 and preset.vocabulary.block("image")[0] == 102_528
    codes = np.random.default_rng(0).integers(0, 16_384, (1, 24, 24))
    ids = grammar.span_ids(Span("image", codes))
    assert ids[[0, -1]].tolist() == [100_016, 100_593]
    np.testing.assert_array_equal(ids[1:-1], codes.ravel() + 102_528)
    seen = Span("image", np.zeros((1, 0, 0), int), True, np.zeros((576, 2048), np.float32))
    prompt = grammar.prompt([Span("text", np.array([7])), seen, Span("text", np.array([8]))])
    assert prompt.tolist() == [100_000, 7, 100_016, *[100_581] * 576, 100_593, 8, 102_400]
    assert len(grammar.annotate(prompt)) == len(grammar.annotate_chat(prompt)) == len(prompt)
    assert grammar.feature_places(prompt).tolist() == list(range(3, 579))
    with pytest.raises(GrammarError, match="token 3"):
        grammar.annotate(np.delete(prompt, 5))
    with pytest.raises(omni.OmniError, match="575 features of image; the grammar has places for 576"):
        grammar.span_ids(dataclasses.replace(seen, features=seen.features[1:]))


def test_features_are_declared_by_a_token_and_a_count():
    """A declaration that lacks one of them, or has none of them, is refused."""
    vocabulary = Vocabulary.build({"image": 4}, ["<a>", "<b>", "<c>"])
    usual = {"codebooks": ["image"], "open": ["<a>"], "close": ["<b>"], "shapes": [{"columns": 4}]}
    layout = SpanLayout("image", usual | {"features": {"token": "<c>", "count": 2}}, vocabulary)
    assert layout.seen == (0, 2, 2, 1)
    wrong = ({"token": "<c>"}, {"token": "<c>", "count": 0}, {"token": "<d>", "count": 2})
    for features in (*wrong, {"token": "<c>", "count": 1 << 40}):
        with pytest.raises(omni.OmniError, match=r"grammar|vocabulary"):
            SpanLayout("image", usual | {"features": features}, vocabulary)


def test_what_nothing_is_stands_in_the_declaration():
    """Of a padded prompt only bos is left; a declaration of any other kind is refused."""
    vocabulary = small(64, 40)[1].vocabulary
    grammar = Grammar(janus.grammar(3), vocabulary)
    assert grammar.padded(np.array([0, 9, 4, 6, 6, 5, 1])).tolist() == [0, 3, 3, 3, 3, 3, 3]
    assert Grammar({**janus.grammar(3), "unconditional": "empty"}, vocabulary).unconditional == "empty"
    with pytest.raises(omni.OmniError, match="unconditional is 'never'"):
        Grammar({**janus.grammar(3), "unconditional": "never"}, vocabulary)


def test_tokens_without_a_name_are_new(directory, tmp_path):
    """Where no tokenizer names what stands around a picture, both get ids behind the published ones."""
    dataclasses.replace(golden("janus"), files={}).write(tmp_path)
    special = omni.load(tmp_path).vocabulary.special
    assert special["<begin_of_image>"] >= PUBLISHED and special["<end_of_image>"] >= PUBLISHED
    assert omni.load(directory).vocabulary.special["<begin_of_image>"] == 91


def test_the_head_is_the_embedding_where_files_have_no_head(tmp_path):
    """config.json of the release does not say; where it does, that counts."""
    stored = golden("janus")
    config = {key: value for key, value in stored.config.items() if key != "tie_word_embeddings"}
    dataclasses.replace(stored, config=config).write(tmp_path / "two")
    assert not omni.load(tmp_path / "two").config.tied_embeddings
    tensors = {key: value for key, value in stored.tensors.items() if key != "lm_head.weight"}
    dataclasses.replace(stored, config=config, tensors=tensors).write(tmp_path / "one")
    assert omni.load(tmp_path / "one").config.tied_embeddings
    dataclasses.replace(stored, config=config | {"tie_word_embeddings": True}).write(tmp_path / "neither")
    with pytest.raises(omni.OmniError, match="set tie_word_embeddings to false"):
        omni.load(tmp_path / "neither")


# Codes with nets of their own


def small(text: int, codes: int, **more) -> tuple[Transformer, Grammar]:
    """A random model of this kind, every parameter noise, and a grammar of 3 x 3 codes."""
    special = {"<bos>": 0, "<turn>": 1, "<eos>": 2, "<pad>": 3, janus.BEGIN: 4, janus.END: 5, janus.PLACEHOLDER: 6}
    blocks = {"text": np.arange(7, text, dtype=np.int32), "image": np.arange(text, text + codes, dtype=np.int32)}
    shape = {"dim": 16, "depth": 2, "heads": 2, "key_value_heads": 1, "head_dim": 8, "mlp_dim": 16}
    nets = CodeNetsConfig(codes, 5, depth=3)
    config = TransformerConfig(vocabulary_size=text + codes, **shape, qk_norm="none", code_nets=nets, **more)
    transformer, random = Transformer(config, rngs=nnx.Rngs(0)), np.random.default_rng(0)
    for _, parameter in nnx.to_flat_state(nnx.state(transformer, nnx.Param)):
        parameter[...] = parameter[...] + 0.3 * random.normal(size=parameter.shape).astype(np.float32)
    return transformer, Grammar(janus.grammar(3), Vocabulary(text + codes, blocks, special))


@pytest.mark.parametrize("tied", [False, True])
def test_a_sliced_head_draws_what_the_whole_one_does(tied):
    """Inside of a picture the head of its codes alone is at work, beside the row of what ends it: the likeliest codes
    are those of all logits."""
    transformer, grammar = small(2500, 700, tied_embeddings=tied)
    model = omni.Model(transformer, grammar.vocabulary, grammar, {}, context_length=64)
    ids, zero, one = grammar.prompt([]), np.zeros(2, np.float32), np.ones(2, np.float32)
    request = PreparedRequest(ids, 12, zero, np.zeros(2, np.int32), one, zero, one, want=(1,), log_probabilities=True)
    (block,) = model.engine.programs._blocks
    assert len(block.ids) == 701 and block.head.shape == (1, 16) and block.codes.rows.shape == (700, 16)
    shapes = jax.eval_shape(lambda decoder: decoder, model.engine.decoder)
    (of_shapes,) = Programs(shapes, grammar)._blocks
    assert jax.tree.map(np.shape, of_shapes) == jax.tree.map(np.shape, block)
    reply = model.engine.generate([request])[0]
    with jax.default_matmul_precision("highest"):
        logits = model.logits(np.concatenate([ids, reply.ids])[None])[0, len(ids) : len(ids) + 9]
    np.testing.assert_array_equal(logits[:, 2500:].argmax(-1), reply.ids[1:10] - 2500)
    assert len(np.unique(reply.ids[1:10])) > 1


def test_in_other_types_a_decoder_is_near():
    """bfloat16 and int8 hold the nets of codes, too, and change logits a little."""
    pytest.importorskip("qwix", reason="needs qwix: pip install 'omni-any-to-any[int8]'")
    transformer, _ = small(64, 40, tied_embeddings=False)
    x = np.random.default_rng(0).normal(size=(1, 5, 16)).astype(np.float32)
    whole = np.asarray(transformer.code_head().logits(x))
    for dtype, most in (("bfloat16", 0.05), ("int8", 0.05)):
        decoder = make_decoder(transformer, dtype)
        assert jax.tree.leaves(decoder.codes.rows)[0].dtype == dtype and decoder.head.shape == (64, 16)
        error = np.abs(np.asarray(decoder.codes.logits(x)) - whole).max() / np.abs(whole).max()
        assert 1e-5 < error < most
    assert make_decoder(transformer).embedding.shape == (104, 16)


def test_losses_are_those_of_the_logits(model):
    """Documents with codes cost what the softmax over all ids says, text and codes."""
    random = np.random.default_rng(0)
    spans = [Span("text", random.integers(0, 80, 5), context=True), Span("image", random.integers(0, CODES, (1, 4, 4)))]
    document = model.grammar.pack(spans)
    (nats,) = model.token_losses([document])
    logits = model.logits(document.ids[None])[0]
    expected = jax.nn.logsumexp(logits, -1)[:-1] - logits[np.arange(len(logits) - 1), document.ids[1:]]
    np.testing.assert_allclose(nats[1:], expected, atol=2e-4)


MESH = """
import sys, numpy as np, jax, omni
from omni.model.transformer import Transformer
from omni.sharding import MeshConfig, ShardingRules, activations_on
from omni.train.cross_entropy import token_losses
from omni.parts import Image
from flax import nnx
alone, spread = omni.load(sys.argv[1]), omni.load(sys.argv[1], mesh=MeshConfig(data=1, tensor=2, fsdp=2))
vision, codes = spread.transformer.vision, spread.transformer.codes
held = lambda x: x.addressable_shards[0].data.size / x.size
assert held(vision.layers.query[...]) == held(codes.head[...]) == 0.25, held(vision.layers.query[...])
ids = np.random.default_rng(0).integers(0, alone.vocabulary.size, (4, 12)).astype(np.int32)
close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4)
with jax.default_matmul_precision("highest"):
    close(spread.logits(ids), alone.logits(ids))
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    close(spread.processor.see([Image(pixels)]), alone.processor.see([Image(pixels)]))
    requests = alone.prepare([omni.Request([Image(pixels)], ["image"], seed=seed) for seed in range(3)])
    for one, other in zip(alone.engine.generate(requests), spread.engine.generate(requests)):
        assert one.ids.tolist() == other.ids.tolist()

    def loss(transformer, ids):
        positions = np.broadcast_to(np.arange(12)[None, :, None], (4, 12, 3))
        stream = transformer.features(ids, positions, np.ones((4, 12), np.int32)).stream
        heads = transformer.output_weights(), ids, transformer.code_head()
        return token_losses(stream, *heads, chunk=5).cross_entropy.mean()

    step = nnx.jit(nnx.value_and_grad(loss))
    expected = step(alone.transformer, ids)
    with activations_on(spread.mesh, ShardingRules()):
        found = step(spread.transformer, ids)
    for (path, one), (_, other) in zip(*(nnx.to_flat_state(each[1]) for each in (expected, found))):
        if path[0] != "vision":
            close(one.get_value(), other.get_value())
            assert np.abs(one.get_value()).max() > 1e-6, path
    close(expected[0], found[0])
"""


def test_on_a_mesh_it_is_the_same_model(directory):
    """Four devices hold a quarter of the tower and of the head of codes; logits, features, drawn codes, losses and
    gradients are those of one."""
    command, environment = [sys.executable, "-c", MESH, str(directory)], host_devices(4)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def test_parameters_are_counted(model):
    """`parameter_count` is the number of parameters that there are; those that work on a token are without the tower
    and tables of which a row is read."""
    sizes = {path: each.size for path, each in nnx.to_flat_state(nnx.state(model.transformer, nnx.Param))}
    assert parameter_count(model.config) == sum(sizes.values())
    idle = (size for path, size in sizes.items() if path[0] in ("vision", "embedding") or path == ("codes", "vectors"))
    assert active_parameter_count(model.config) == sum(sizes.values()) - sum(idle)


# Pictures that are seen


def test_a_prompt_has_features_of_its_pictures(model):
    """A picture of a prompt becomes placeholders and the tower's features, one that is drawn, codes; documents have
    codes, whoever made the picture."""
    span = model.processor.spans([[picture()]], prompts=True)[0][0]
    assert span.codes.size == 0 and span.features.shape == (16, 16)
    np.testing.assert_array_equal(span.features, model.processor.see([picture()])[0])
    (request,) = model.prepare([omni.Request([picture(0), picture(1)], max_tokens=3)])
    np.testing.assert_array_equal(request.features, model.processor.see([picture(0), picture(1)]).reshape(32, 16))
    assert len(model.engine.generate([request])[0].ids) <= 3
    document = model.processor.tokens([dataclasses.replace(picture(), context=True), picture()])
    assert not len(model.grammar.feature_places(document.ids))
    assert [each.codes.shape for each in model.grammar.parse(document.ids)] == [(1, 4, 4)] * 2


def test_many_pictures_are_seen_in_batches_of_few_sizes(model):
    """Each has the features that it has alone."""
    pictures = [picture(seed) for seed in range(19)]
    together = model.processor.see(pictures)
    assert together.shape == (19, 16, 16)
    for place in (0, 15, 16, 18):
        np.testing.assert_allclose(together[place], model.processor.see([pictures[place]])[0], atol=2e-5)


def test_a_warm_batch_compiles_nothing_for_pictures(model, compilations):
    """Programs that read features are among those of a warm-up with a prompt that has some."""
    (request,) = model.prepare([omni.Request([picture()], max_tokens=3)])
    slots = model.engine.open(2, capacity=64)
    slots.warm_up([request])
    before = compilations.count
    slots.add(request)
    assert any(each.reply for each in slots.step())
    assert compilations.count == before


@pytest.mark.parametrize(
    "change",
    [
        {"preprocessing": None},
        {"preprocessing": {"size": {"height": 10, "width": 10}}},
        {"features": {"token": janus.PLACEHOLDER, "count": 4}},
        {"features": {"token": janus.END, "count": 16}},
    ],
)
def test_the_grammar_has_pictures_that_the_tower_sees(model, change):
    """A grammar.json with features of pictures of another size, or of another number, is refused with the model."""
    declaration = json.loads(json.dumps(model.grammar.to_json()))
    image = declaration["modalities"]["image"]
    for key, value in change.items():
        image[key] = value and image[key] | value
    with pytest.raises(omni.OmniError, match=r"grammar: images have .* the tower makes 16 of 8"):
        grammar = Grammar(declaration, model.vocabulary)
        omni.Model(model.transformer, model.vocabulary, grammar, model.tokenizers, context_length=64)


def test_features_and_places_must_agree(model, tiny_model):
    """Fewer or more than there are places for are refused, as are pictures by a model that sees none."""
    (request,) = model.prepare([omni.Request([picture()], max_tokens=3)])
    with pytest.raises(omni.UsageError, match=r"a prompt has places for features \[16, 16\], not \[0, 16\]"):
        model.engine.generate([dataclasses.replace(request, features=None)])
    for wrong in (request.features[:, :3], request.features[:, 0]):
        with pytest.raises(omni.UsageError, match=r"places for features \[16, 16\], not \[16"):
            model.engine.generate([dataclasses.replace(request, features=wrong)])
    with pytest.raises(omni.UsageError, match=r"logits has places for features \[16, 16\], not \[15, 16\]"):
        model.logits(request.ids[None], request.features[1:].tolist())
    with pytest.raises(omni.OmniError, match="no features of pictures: it reads their codes"):
        tiny_model.processor.see([picture()])


def test_it_goes_on_from_documents_with_pictures(tmp_path, monkeypatch, run):
    """Imported, trained on JSON lines with pictures and exported: nets of codes and text have learned, what is seen is
    seen as before."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").symlink_to(Path(__file__).parents[2] / "experiments")
    write_janus(tmp_path / "published")
    for name in ("train", "held_out"):
        folder = Path("my", name)
        folder.mkdir(parents=True)
        picture().save(folder / "one.png")
        parts = [{"text": "a kite", "context": True}, {"image": "one.png"}]
        (folder / "documents.jsonl").write_text(3 * (json.dumps({"parts": parts}) + "\n"))
    commands = (
        "import published models/imported",
        "tokenize experiments/imported/tokens.py",
        "tokenize experiments/imported/tokens.py --source.path my/held_out --output runs/imported/held_out",
        "train experiments/imported/model.py --batch-size 2 --task.row-length 64 --steps 3 "
        "--optimizer.warmup-steps 0 --optimizer.learning-rate 1e-2 --optimizer.weight-decay 0.1",
        "export runs/imported/model theirs --format transformers",
    )
    for command in commands:
        code, _, err = run(*command.split())
        assert code == 0, err
    before, after = omni.load("published"), omni.load("theirs")
    np.testing.assert_array_equal(after.processor.see([picture()]), before.processor.see([picture()]))
    for name in ("vectors", "head", "head_bias", "hidden"):
        one, other = (np.asarray(getattr(each.transformer.codes, name)[...]) for each in (before, after))
        assert np.abs(one - other).max() > 1e-3, name


def test_training_leaves_the_tower(model):
    """What shards do not reach is neither moved nor decayed."""
    from omni.train.language import TransformerTask

    names = TransformerTask("random", model=model.config).trained()
    assert set(names) == {"embedding", "norm", "blocks.*", "head", "codes.*"}
    tied = dataclasses.replace(model.config, tied_embeddings=True)
    assert "head" not in TransformerTask("random", model=tied).trained()
    assert TransformerTask("random").trained() == ("*",)


# What is refused


def part(name: str, **changes) -> dict:
    return {name: golden("janus").config[name] | changes}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (part("vision_config", use_qk_norm=True), "use_qk_norm"),
        (part("vision_config", hidden_act="relu"), "hidden_act"),
        (part("vision_config", projection_dim=8), "vision_config: projection_dim is 8; .* language model, 16"),
        (part("vq_config", image_token_embed_dim=8), "vq_config: image_token_embed_dim is 8"),
        (part("vision_config", num_image_tokens=9), "num_image_tokens is 9; pictures have 16 patches"),
        (part("vision_config", patch_size=3), "patch must divide image_size"),
        (part("vision_config", num_attention_heads=5), "heads dim"),
        (part("vision_config", layer_norm_eps=0.0), "norm_epsilon"),
        (part("vision_config", mlp_ratio=float("inf")), "mlp_ratio=inf.* is no tower"),
        (part("vision_config", mlp_ratio=float("nan")), "mlp_ratio=nan.* is no tower"),
        (part("vision_config", num_hidden_layers=10**12), "encoder.layers.*is missing"),
        (part("vision_config", depth=10**12), "aligner.hidden_layers.*is missing"),
        (part("vq_config", num_hidden_layers=10**12), "generation_aligner.hidden_layers.*is missing"),
        (part("vq_config", num_hidden_layers=0), "no net of codes"),
        (part("vq_config", num_hidden_layers=3), "generation_aligner.hidden_layers.1.bias' is missing"),
        (part("vision_config", num_hidden_layers=1), "layers.1.layer_norm1.bias"),
        (
            part("vision_config", mlp_ratio=2.0),
            r"mlp.fc2.weight' has the shape \[24, 36\], config.json needs \[24, 48\]",
        ),
        (part("vq_config", embed_dim=4), r"generation_aligner.fc1.weight' has the shape \[16, 6\]"),
        ({"image_token_id": 96}, "image_token_id = 96 is no id below 96"),
    ],
)
def test_what_does_not_fit_is_named(change, said, directory, tmp_path):
    """Settings that are not computed here, and sizes that tensors do not have, in one line that names them."""
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(golden("janus").config | change))
    with pytest.raises(omni.OmniError, match=said) as caught:
        omni.load(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_other_families_lack_what_it_has(model, tmp_path):
    """A model with a tower but without the tokenizer that Janus has is none that transformers knows."""
    bare = omni.Model(model.transformer, model.vocabulary, model.grammar, {}, context_length=64)
    with pytest.raises(omni.OmniError, match=r"llama has no (code_nets|vision)"):
        bare.export(tmp_path)
    assert VisionConfig().tokens == 576
