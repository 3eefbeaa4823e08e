"""Public models without torch: what transformers recorded, the way in and out, what is refused."""

import dataclasses
import gc
import itertools
import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
import text_pieces
from chat_templates import ENTRIES, write_chameleon, write_llama
from flax import nnx
from host_devices import host_devices
from public_models import NAMES, golden, greedy_with_cache, largest_error

import omni
import omni_tokenizers
from omni.interop.family import control_ids
from omni.model import RopeScaling
from omni.sharding import MeshConfig
from omni.tokenizer_tools import is_tokenizer
from omni_tokenizers import weights
from omni_tokenizers.checkpoints.family import Settings
from omni_tokenizers.tensor_files import INDEX, MODEL, TensorFiles, open_directory, write_directory
from omni_tokenizers.vqgan import VQGAN, VQGANTokenizer

TOLERANCE = 1e-4
TINY = "qwen3"


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Golden models by name, as transformers wrote them."""
    root = tmp_path_factory.mktemp("public")
    return {name: golden(name).write(root / name) for name in NAMES}


@pytest.fixture(scope="module")
def models(directories):
    """These models, loaded."""
    return {name: omni.load(directory) for name, directory in directories.items()}


def logits(model, ids):
    with jax.default_matmul_precision("highest"):
        return model.logits(ids)


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_greedy_tokens_are_the_recorded_ones(name, models):
    """What transformers said of ids, and the likeliest replies, with and without our cache."""
    model, stored = models[name], golden(name)
    assert largest_error(logits(model, stored.ids), stored.logits) < TOLERANCE
    published = stored.logits.shape[-1]
    np.testing.assert_array_equal(greedy_with_cache(model, stored.ids, 64, published), stored.greedy)
    whole = logits(model, np.concatenate([stored.ids, stored.greedy], axis=1))
    np.testing.assert_array_equal(whole[:, stored.ids.shape[1] - 1 : -1, :published].argmax(-1), stored.greedy)


@pytest.mark.parametrize("name", NAMES)
def test_exported_and_read_again_it_is_the_same_model(name, models, directories, tmp_path):
    """An export keeps every published tensor, bit for bit, and comes back as the model that it was."""
    model = models[name]
    model.export(tmp_path)
    again = omni.load(tmp_path)
    assert (again.vocabulary.hash, again.grammar.hash) == (model.vocabulary.hash, model.grammar.hash)
    assert again.config == model.config and again.context_length == model.context_length == 160
    np.testing.assert_array_equal(again.logits(golden(name).ids), model.logits(golden(name).ids))
    theirs, written = open_directory(directories[name]), open_directory(tmp_path)
    assert set(theirs) == set(written)
    for key, value in theirs.items():
        if not key.endswith("num_batches_tracked"):  # which nothing reads
            np.testing.assert_array_equal(written[key][: len(value)], value)


def test_new_tokens_stand_behind_the_published_ones(models):
    """Turn and padding get new ids; their rows are the mean of the published ones; one id may be bos and eos."""
    model, tensors = models[TINY], golden(TINY).tensors
    assert model.vocabulary.special == {"<eos>": 1, "<turn>": 96, "<pad>": 97} and model.vocabulary.size == 128
    table = np.asarray(model.transformer.embedding[...])
    published = tensors["model.embed_tokens.weight"]
    np.testing.assert_array_equal(table[:96], published)
    np.testing.assert_allclose(table[96:], np.tile(published.mean(0), (32, 1)), atol=1e-6)
    assert not set(model.vocabulary.block("text")) & {1, *range(96, 128)}
    assert models["llama 3"].vocabulary.special == {"<bos>": 1, "<turn>": 96, "<eos>": 2, "<pad>": 97}


def test_slowed_rotation_is_read_from_either_version_of_transformers(models, directories, tmp_path):
    """transformers 4 keeps rope_theta and rope_scaling where 5 has rope_parameters."""
    config = models["llama 3"].config
    assert config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 64) and config.rope_theta == 500
    values = dict(golden("llama 3").config)
    rope = values.pop("rope_parameters")
    values |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    dataclasses.replace(golden("llama 3"), config=values).write(tmp_path)
    assert omni.load(tmp_path).config == config
    models["llama 3"].save(tmp_path / "ours")
    assert omni.load(tmp_path / "ours").config == config


def test_several_files_with_an_index_are_one_model(models, tmp_path):
    """Files of at most so many bytes hold the same tensors, and an export's index names them all."""
    stored = golden(TINY)
    shapes = {name: value.shape for name, value in stored.tensors.items()}
    write_directory(tmp_path, shapes, stored.tensors.items(), "float32", shard_bytes=6000)
    (tmp_path / "config.json").write_text(json.dumps(stored.config))
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 4 and files[0].startswith("model-00001-of-0")
    assert all((tmp_path / file).stat().st_size < 9000 for file in files)
    np.testing.assert_array_equal(omni.load(tmp_path).logits(stored.ids), models[TINY].logits(stored.ids))


def test_tensors_are_held_one_at_a_time(directories, monkeypatch):
    """Whatever the size of a checkpoint, the host holds a few of its tensors, each read once."""
    read, alive, most, names = TensorFiles.__getitem__, [], [0], []

    def watched(self, name):
        gc.collect()
        most[0] = max(most[0], sum(reference() is not None for reference in alive))
        value = read(self, name)
        alive.append(weakref.ref(value if value.base is None else value.base))
        names.append(name)
        return value

    monkeypatch.setattr(TensorFiles, "__getitem__", watched)
    gc.freeze()  # what is there already is no garbage of the load's, and takes long to look through
    try:
        omni.load(directories[TINY])
    finally:
        gc.unfreeze()
    assert sorted(names) == sorted(golden(TINY).tensors) and most[0] <= 3


def test_bfloat16_halves_the_weights(directories, models, tmp_path):
    """Matrices are kept in bfloat16, norms in float32; logits are near; such a model is saved and exported, too."""
    stored, model = golden(TINY), omni.load(directories[TINY], dtype="bfloat16")
    kinds = {name: value.dtype for name, value in model.transformer.blocks.weights().items()}
    assert {name for name, kind in kinds.items() if kind == "float32"} == {name for name in kinds if "norm" in name}
    error = largest_error(model.logits(stored.ids), stored.logits)
    assert 1e-4 < error < 0.1
    model.save(tmp_path / "ours", dtype="bfloat16")
    model.export(tmp_path / "theirs", dtype="bfloat16")
    for directory in ("ours", "theirs"):
        again = omni.load(tmp_path / directory)
        np.testing.assert_array_equal(
            again.transformer.blocks.gate[...], np.float32(model.transformer.blocks.gate[...])
        )
    with pytest.raises(omni.UsageError, match="float8"):
        omni.load(directories[TINY], dtype="float8")
    with pytest.raises(omni.UsageError, match="dtype is for public checkpoints"):
        omni.load(tmp_path / "ours", dtype="bfloat16")


MESHES = """
import sys, numpy as np, omni
from omni.sharding import MeshConfig
model = omni.load(sys.argv[1], mesh=MeshConfig(data=1, tensor=2, fsdp=2))
held = lambda x: x.addressable_shards[0].data.size / x.size
blocks = model.transformer.blocks
assert held(blocks.gate[...]) == 0.25 and held(blocks.query[...]) == 0.25, held(blocks.gate[...])
assert held(model.transformer.embedding[...]) == 0.25 and held(model.transformer.head[...]) == 0.25
np.save(sys.argv[3], model.logits(np.load(sys.argv[2])))
"""


def test_on_a_mesh_each_device_is_given_its_part(directories, models, tmp_path):
    """Four devices hold a quarter of each matrix, and logits are those of one."""
    stored = golden(TINY)
    np.save(tmp_path / "ids.npy", stored.ids)
    arguments = [str(directories[TINY]), str(tmp_path / "ids.npy"), str(tmp_path / "logits.npy")]
    command = [sys.executable, "-c", MESHES, *arguments]
    done = subprocess.run(command, env=host_devices(4), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert largest_error(np.load(tmp_path / "logits.npy"), stored.logits) < TOLERANCE
    assert omni.load(directories[TINY], mesh=MeshConfig()).logits(stored.ids).shape == (3, 12, 128)


def test_without_a_text_tokenizer_it_says_which_file_to_add(models):
    """Logits need no tokenizer; text does."""
    with pytest.raises(omni.OmniError, match=r"tokenizers/text, or the tokenizer\.json"):
        models[TINY].generate(["seven"])


def test_a_model_made_here_is_written_for_transformers(tiny_model, tmp_path):
    """Its transformer is Qwen3's; what else it has lies beside it, and is read again."""
    tiny_model.export(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qwen3"
    again = omni.load(tmp_path)
    reply, other = (model.generate(["seven"], want=["image"], seed=1) for model in (tiny_model, again))
    np.testing.assert_array_equal(reply.images[0].pixels, other.images[0].pixels)
    assert again.generation == tiny_model.generation


def test_what_transformers_lacks_is_named(tiny_model, tmp_path):
    """A model that no family holds is refused before anything is written, by what each family lacks."""
    config = dataclasses.replace(tiny_model.config, rope="time_row_column")
    model = omni.Model(
        type(tiny_model.transformer)(config, rngs=omni.bundle.nnx.Rngs(0)),
        tiny_model.vocabulary,
        tiny_model.grammar,
        tiny_model.tokenizers,
        context_length=128,
    )
    with pytest.raises(omni.OmniError, match="qwen3 has no rope 'time_row_column'"):
        model.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_takes_a_model_in_and_out(run, directories, models, tmp_path):
    """omni import writes this package's directory, omni export gives transformers' tensors back."""
    code, out, err = run("import", directories[TINY], tmp_path / "ours")
    assert (code, err) == (0, "") and "wrote" in out
    assert (tmp_path / "ours" / "model.json").exists()
    assert run("export", tmp_path / "ours", tmp_path / "theirs", "--format", "transformers")[0] == 0
    theirs = open_directory(tmp_path / "theirs")
    for key, value in golden(TINY).tensors.items():
        np.testing.assert_array_equal(theirs[key][: len(value)], value)
    code, _, err = run("import", directories[TINY], tmp_path / "again", "--image-size", "8")
    assert code == 2 and "whole model" in err and not (tmp_path / "again").exists()


def change_config(**changes):
    def change(directory: Path) -> None:
        values = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(values | changes))

    return change


def change_tensors(change):
    def changed(directory: Path) -> None:
        tensors = weights.read(directory / MODEL)
        change(tensors)
        weights.write(directory / MODEL, tensors)

    return changed


def change_index(change):
    def changed(directory: Path) -> None:
        tensors = weights.read(directory / MODEL)
        (directory / MODEL).unlink()
        shapes = {name: value.shape for name, value in tensors.items()}
        write_directory(directory, shapes, tensors.items(), "float32", shard_bytes=6000)
        index = json.loads((directory / INDEX).read_text())
        change(directory, index["weight_map"])
        (directory / INDEX).write_text(json.dumps(index))

    return changed


def change_header(**changes):
    def changed(directory: Path) -> None:
        content = (directory / MODEL).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        header[NORM] |= changes
        new = json.dumps(header).encode()
        (directory / MODEL).write_bytes(len(new).to_bytes(8, "little") + new + content[8 + length :])

    return changed


def both(*damages):
    def changed(directory: Path) -> None:
        for damage in damages:
            damage(directory)

    return changed


NORM = "model.layers.1.self_attn.q_norm.weight"
ELSEWHERE = {
    "format": 1,
    "control": {"bos": "<eos>", "turn": "<turn>", "eos": "<eos>", "pad": "<pad>"},
    "modalities": {"text": {"block": "text"}, "../../elsewhere": {}},
}


def nan(tensors):
    tensors[NORM] = np.full_like(tensors[NORM], np.nan)


def cut(directory):
    (directory / MODEL).write_bytes((directory / MODEL).read_bytes()[:-4])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            change_config(model_type="bloom"),
            "'bloom' can be read; supported are chameleon, emu3, Emu3, janus, llama, qwen3",
        ),
        (change_config(model_type=["llama"]), "no model of type"),
        (lambda d: (d / "config.json").write_text("{"), "not valid JSON"),
        (change_config(attention_bias=True), "attention_bias = True is not supported"),
        (change_config(mlp_bias=True), "mlp_bias = True is not supported"),
        (change_config(hidden_act="gelu"), "hidden_act = 'gelu' is not supported"),
        (change_config(use_sliding_window=True), "use_sliding_window = True is not supported"),
        (change_config(layer_types=["sliding_attention", "full_attention"]), "layer_types other than"),
        (change_config(quantization_config={"bits": 4}), "quantization_config"),
        (change_config(rope_parameters={"rope_type": "yarn"}), "rope_type = 'yarn' is not supported"),
        (change_config(rope_parameters={"rope_type": "llama3"}), "scales no rotary frequencies"),
        (change_config(rope_parameters=[1]), "must be a JSON object"),
        (change_config(hidden_size="wide"), "hidden_size = 'wide' is not of the type"),
        (change_config(num_attention_heads=0), "heads is 0"),
        (change_config(bos_token_id=96), "bos_token_id = 96 is no id below 96"),
        (change_config(eos_token_id=[[2], 3]), r"eos_token_id = \[2\] is no id below 96"),
        (change_config(eos_token_id=[True]), "eos_token_id = True is no id"),
        (change_config(num_hidden_layers=3), r"'model.layers.2.\S+' is missing; config.json has 3 layers"),
        (change_config(num_hidden_layers=10**12), "config.json has 1000000000000 layers"),
        (change_config(vocab_size=10**12), "vocab_size 1000000000000 is more than"),
        (change_config(hidden_size=10**9), r"has the shape \[16\], config.json needs \[1000000000\]"),
        (change_config(num_hidden_layers=1), "'model.layers.1.input_layernorm.weight' belongs to no parameter"),
        (
            change_config(intermediate_size=25),
            r"has the shape \[\d+, \d+\], config.json needs \[\d+, \d+\]",
        ),
        (change_tensors(lambda t: t.pop(NORM)), f"tensor '{NORM}' is missing"),
        (change_tensors(lambda t: t.update(more=t[NORM])), "tensor 'more' belongs to no parameter"),
        (change_tensors(nan), f"tensor '{NORM}' holds values that are not finite"),
        (lambda d: (d / MODEL).unlink(), "model.safetensors: there is no such file of weights"),
        (cut, "not a whole safetensors file"),
        (lambda d: (d / MODEL).write_bytes(b"\xff" * 64), "not a whole safetensors file"),
        (
            change_index(lambda d, m: (d / m[NORM]).unlink()),
            r"of-\d+.safetensors: there is no such file",
        ),
        (change_index(lambda d, m: m.update({NORM: "../model.safetensors"})), "must give the name of a file beside it"),
        (change_index(lambda d, m: m.update({NORM: ".."})), "must give the name of a file beside it"),
        (change_index(lambda d, m: m.update({"more": m[NORM]})), "has no tensor 'more', which"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), r"tokenizer\.json: not a tokenizer\.json"),
        (lambda d: (d / "tokenizer.json").write_text('{"added_tokens": 1}'), r"tokenizer\.json: not a tokenizer\.json"),
        (lambda d: (d / "tokenizer.json").write_text('{"added_tokens": [{"id": -1}]}'), "None has -1, which is no id"),
        (lambda d: (d / "added_tokens.json").write_text('{"a": "b"}'), "added token 'a' has 'b', which is no id"),
        (lambda d: (d / "added_tokens.json").write_text('{"a": -1}'), "added token 'a' has -1, which is no id"),
        (
            both(
                change_tensors(lambda t: t.update({"model.layers.199999.input_layernorm.weight": t[NORM]})),
                change_config(num_hidden_layers=200_000),
            ),
            "tensors of layers; config.json has 200000 layers",
        ),
        (change_config(vocab_size=16_000_000), r"has the shape \[96, 16\], config.json needs 16000000 rows"),
        (change_config(max_position_embeddings=2**40), "max_position_embeddings is 1099511627776"),
        (change_config(max_position_embeddings=0), "max_position_embeddings is 0"),
        (change_config(rms_norm_eps=float("nan")), "norm_epsilon is nan"),
        (change_config(rope_parameters={"rope_type": "default", "rope_theta": 0}), "rope_theta is 0"),
        (change_config(rope_parameters={"rope_type": "default", "rope_theta": 10**400}), "larger than any number"),
        (change_header(shape=None), "not a whole safetensors file"),
        (change_header(shape=[32.0]), "not a whole safetensors file"),
        (change_header(dtype=["F32"]), "not a whole safetensors file"),
        (change_header(data_offsets=[0.0, 64.0]), "not a whole safetensors file"),
        (change_config(tie_word_embeddings=True), "to which config.json ties it"),
        (
            lambda d: (d / "grammar.json").write_text(json.dumps(ELSEWHERE)),
            "modality '../../elsewhere': a name is letters",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(directories, tmp_path, damage, message):
    """Each mistake in a checkpoint names its file, and the tensor or the key."""
    directory = golden(TINY).write(tmp_path / "damaged")
    damage(directory)
    with pytest.raises(omni.OmniError, match=message) as caught:
        omni.load(directory)
    assert "\n" not in str(caught.value) and str(directory) in str(caught.value)


def test_a_head_that_is_the_embedding_may_be_there_twice(models, tmp_path):
    """Where config.json ties the two and both are in the file, alike, one of them is enough."""
    stored = golden("llama tied")
    twice = stored.tensors | {"lm_head.weight": stored.tensors["model.embed_tokens.weight"]}
    dataclasses.replace(stored, tensors=twice).write(tmp_path)
    np.testing.assert_array_equal(omni.load(tmp_path).logits(stored.ids), models["llama tied"].logits(stored.ids))


def test_of_several_ends_the_first_counts(tmp_path, caplog):
    """The others are no text, the log says so, and an export has them all."""
    stored = golden(TINY)
    values = stored.config | {"eos_token_id": [1, 5, 7]}
    dataclasses.replace(stored, config=values).write(tmp_path / "model")
    model = omni.load(tmp_path / "model")
    assert "of several eos_token_id one, 1, ends replies" in caplog.text
    assert model.grammar.control["eos"] == 1 and not {1, 5, 7} & set(model.vocabulary.block("text").tolist())
    model.export(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["eos_token_id"] == [1, 5, 7]


@pytest.mark.parametrize("none", [None, -1])
def test_ends_that_are_none_count_for_nothing(none):
    """Nor those that are there twice."""
    found = control_ids(Settings({"eos_token_id": [none, 3, 3, 5]}, "config.json"), 96)
    assert found == {"eos": 3, "eos 2": 5}


def test_an_export_into_an_older_one_is_the_new_one(models, tmp_path):
    """An index that lies there from before does not bring back the files that it names."""
    stored = golden(TINY)
    shapes = {name: value.shape for name, value in stored.tensors.items()}
    write_directory(
        tmp_path, shapes, ((name, value + 1) for name, value in stored.tensors.items()), "float32", shard_bytes=6000
    )
    models[TINY].export(tmp_path)
    np.testing.assert_array_equal(omni.load(tmp_path).logits(stored.ids), models[TINY].logits(stored.ids))


def test_weights_in_several_files_are_not_beside_an_older_one(tmp_path):
    """transformers would read model.safetensors before the files of an index."""
    stored = golden(TINY)
    shapes = {name: value.shape for name, value in stored.tensors.items()}
    for size in (1 << 30, 6000):
        write_directory(tmp_path, shapes, stored.tensors.items(), "float32", shard_bytes=size)
    assert not (tmp_path / "model.safetensors").exists() and (tmp_path / "model.safetensors.index.json").exists()


def test_an_export_of_another_model_takes_nothing_of_the_older_one(tmp_path):
    """Neither text nor template, settings nor tokenizers of what was exported there before; what else lies there stays.

    A Chameleon with all of these, one with none, and a text model with a tokenizer.model.
    """
    write_chameleon(tmp_path / "full", ENTRIES)
    full, bare = omni.load(tmp_path / "full"), omni.load(golden("chameleon").write(tmp_path / "bare"))
    config = dataclasses.replace(full.tokenizers["image"].config, has_decoder=True)
    full.tokenizers["image"] = VQGANTokenizer(config, VQGAN(config, rngs=nnx.Rngs(0)))
    full.generation["top_k"] = {"image": 3}
    stored, random = golden("llama tied"), np.random.default_rng(0)
    rows = {"model.embed_tokens.weight": random.normal(size=(400, 16)).astype(np.float32)}
    stored = dataclasses.replace(stored, config=stored.config | {"vocab_size": 400}, tensors=stored.tensors | rows)
    (stored.write(tmp_path / "text") / "tokenizer.model").write_bytes(text_pieces.trained(400))
    models = {"full": full, "bare": bare, "text": omni.load(tmp_path / "text")}
    kept = ("notes.md", "tokenizers/audio/mine")
    for first, second in itertools.permutations(models, 2):
        directory, alone = tmp_path / f"{first}, {second}", tmp_path / f"{second} alone"
        models[first].export(directory)
        for name in kept:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text("mine")
        for path in (directory, alone):
            models[second].export(path)
        found, expected = omni.load(directory), omni.load(alone)
        assert {name: each.hash for name, each in found.tokenizers.items()} == {
            name: each.hash for name, each in expected.tokenizers.items()
        }
        assert (found.generation, found.chat_template) == (expected.generation, expected.chat_template)
        for name in ("preprocessor_config.json", "generation.json", "chat_template.jinja", "tokenizer.json"):
            assert (directory / name).exists() == (alone / name).exists()
        assert all((directory / name).read_text() == "mine" for name in kept)


def test_an_export_leaves_what_it_goes_before(tmp_path):
    """A tokenizer.model beside the tokenizer.json that is written, as Llama 2 has both, is nobody's but the user's."""
    directory = write_llama(tmp_path)
    (directory / "tokenizer.model").write_bytes(b"mine")
    omni.load(directory).export(directory)
    assert (directory / "tokenizer.model").read_bytes() == b"mine"


def test_a_run_is_no_public_checkpoint(tiny_bundle, tiny_tokenizers, tmp_path):
    """A run's own config.json changes nothing for what lies beside it; without a model it is called what it is."""
    (tmp_path / "config.json").write_text('{"steps": 3}')
    with pytest.raises(omni.OmniError, match="not a run or a model"):
        omni.load(tmp_path)
    tiny_tokenizers["text"].save(tmp_path)
    assert omni_tokenizers.load(tmp_path).hash == tiny_tokenizers["text"].hash
    assert is_tokenizer(str(tmp_path))
    shutil.copytree(tiny_bundle, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text('{"steps": 3}')
    assert omni.load(tmp_path / "run").context_length == 128
