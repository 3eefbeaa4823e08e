"""Small whole models with random weights, for tests of what meets in `omni.bundle`; how commands are run."""

import gc
import os
import signal
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

# Before jax is imported, here and in the processes that tests start. Their nets are tiny, and most of the time would go
# into LLVM's optimisations of programs that run a few times; many tests compile the same program, which is kept.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# A program as one module of LLVM instead of up to 32, by the older emitters of loops, compiles in a third of the time
# (jaxlib 0.11 has the newer ones alone, and does not start with an option that it does not know).
if version("jaxlib").startswith("0.10."):
    QUICK = ["--xla_cpu_parallel_codegen_split_count=1", "--xla_cpu_use_fusion_emitters=false"]
else:
    QUICK = ["--xla_cpu_parallel_codegen_split_count=1"]
os.environ["XLA_FLAGS"] = " ".join([*QUICK, os.environ.get("XLA_FLAGS", "")]).strip()
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="compiled-")  # removed with the process
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# A shell's background jobs ignore Ctrl-C, and so would the programs whose Ctrl-C tests are about.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis
import jax
import numpy as np
import pytest
from flax import nnx

from omni.bundle import Model
from omni.cli import main
from omni.grammar import Grammar
from omni.model import Transformer, TransformerConfig
from omni.vocabulary import Vocabulary
from omni_tokenizers import AudioTokenizer, ImageTokenizer, TextTokenizer
from omni_tokenizers.audio import AudioTokenizerConfig, SpectralCodec
from omni_tokenizers.image import ImageTokenizerConfig, ImageVQ

sys.path.insert(0, str(Path(__file__).parent / "fixtures"))

# An example that compiles, or that a busy machine holds up, is no failure.
hypothesis.settings.register_profile("omni", deadline=None)
hypothesis.settings.load_profile("omni")

SPECIAL = ("<bos>", "<turn>", "<eos>", "<pad>", "<image>", "</image>", "<audio>", "</audio>")


def pytest_collection_finish() -> None:
    """What was imported stays: the collector of cycles leaves it out, and comes less often to what jax traces."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 10)


@pytest.fixture(scope="module")
def optimised_processes():
    """Processes that a module's tests start compile with optimisations, as a user's do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS")
        others = [option for option in os.environ["XLA_FLAGS"].split() if option not in QUICK]
        patch.setenv("XLA_FLAGS", " ".join(others))
        yield


@pytest.fixture
def optimised():
    """What this process compiles is optimised, as for users: for programs that run long."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


class Compilations:
    """Counts what XLA compiles."""

    def __init__(self):
        self.count = 0

    def __enter__(self):
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration: float, **_) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compilations():
    with Compilations() as found:
        yield found


@pytest.fixture(scope="session")
def tiny_tokenizers() -> dict:
    """Text, image (8 x 8 pixels in 2 x 2 codes) and audio (two books, 40 ms a frame) tokenizers, untrained."""
    image = ImageTokenizerConfig(image_size=8, patch_size=2, channels=8, codebook_size=16, code_dim=4)
    audio = AudioTokenizerConfig(
        hop=320, window=640, mels=16, dim=8, encoder_blocks=1, decoder_blocks=1, codebook_size=8, code_dim=4
    )
    return {
        "text": TextTokenizer.train(["draw seven", "say seven, then draw it", "zero one two"], 300),
        "image": ImageTokenizer(image, ImageVQ(image, rngs=nnx.Rngs(0))),
        "audio": AudioTokenizer(audio, SpectralCodec(audio, rngs=nnx.Rngs(1))),
    }


@pytest.fixture(scope="session")
def tiny_model(tiny_tokenizers) -> Model:
    """A transformer with random weights over these tokenizers: the hardest case for well-formed replies."""
    text = tiny_tokenizers["text"]
    blocks = {"text": text.vocabulary_size, "image": 16, "audio0": 8, "audio1": 8}
    vocabulary = Vocabulary.build(blocks, SPECIAL)
    grammar = Grammar(
        {
            "format": 1,
            "control": {"bos": "<bos>", "turn": "<turn>", "eos": "<eos>", "pad": "<pad>"},
            "modalities": {
                "text": {"block": "text"},
                "image": {
                    "codebooks": ["image"],
                    "open": ["<image>"],
                    "close": ["</image>"],
                    "shapes": [{"rows": 2, "columns": 2}],
                },
                "audio": {
                    "codebooks": ["audio0", "audio1"],
                    "open": ["<audio>"],
                    "close": ["</audio>"],
                    "shapes": [{"columns": {"min": 1, "max": 6}}],
                },
            },
        },
        vocabulary,
    )
    config = TransformerConfig(
        vocabulary_size=vocabulary.size, depth=2, dim=32, heads=2, key_value_heads=1, head_dim=16, mlp_dim=64
    )
    transformer = Transformer(config, rngs=nnx.Rngs(2))
    generation = {"guidance": {"image": 2.0}, "temperature": {"text": 0.7}}
    return Model(transformer, vocabulary, grammar, tiny_tokenizers, context_length=128, generation=generation)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model, tmp_path_factory):
    """The directory of the tiny model."""
    directory = tmp_path_factory.mktemp("bundle")
    tiny_model.save(directory)
    return directory


@pytest.fixture
def run(capsys):
    """Runs a command in this process; returns (exit code, stdout, stderr)."""

    def call(*arguments) -> tuple[int, str, str]:
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def tone() -> np.ndarray:
    """200 ms of 440 Hz at 16 kHz."""
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(3200) / 16000)).astype(np.float32)
