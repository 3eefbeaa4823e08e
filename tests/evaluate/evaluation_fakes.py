"""A world of five classes that needs no training, and models of it whose faults are known.

A class is a pattern of 4 x 4 grey blocks, and a tune of four tones. The tokenizers are exact on it, and the fake
models answer through the real grammar and processor: what evaluation sees is a `Model` in all but the transformer.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from omni.data.sources import Samples, Source
from omni.evaluate import EvaluationData, EvaluationSettings, Examples, WordRequest
from omni.generate import Generated
from omni.grammar import Grammar, Span
from omni.model import TransformerConfig
from omni.parts import Audio, Image, Text
from omni.processor import Processor
from omni.reply import make_replies
from omni.vocabulary import Vocabulary
from omni_tokenizers.codes import Codes

WORDS = ("ant", "bee", "cat", "dog", "eel")
RATE, FRAME, TONES = 16000, 1200, 16
SMALL = EvaluationSettings(
    per_direction=100, shuffled=100, requests=40, unconstrained=60, documents=20, heard=8, batch=50, shown=2
)
SPECIAL = ("<bos>", "<turn>", "<eos>", "<pad>", "<image>", "</image>", "<audio>", "</audio>")
ORDERS = {
    "draw {0}": ("image",),
    "say {0} then draw it": ("audio", "image"),
    "write {0} draw it and say it": ("text", "image", "audio"),
}


class Letters:
    """A code for each letter; 0 is the space."""

    modality, codebook_sizes, hash = "text", (27,), "letters"

    def encode(self, text):
        return np.array([0 if c == " " else ord(c) - 96 for c in text], np.int32)

    def decode(self, codes):
        return "".join(" " if code == 0 else chr(96 + code) for code in np.asarray(codes).tolist())


class Blocks:
    """Sixteen greys for each block of 8 x 8 pixels."""

    modality, codebook_sizes, hash, image_size = "image", (16,), "blocks", 32

    def encode(self, pixels):
        return Codes((pixels[:, 4::8, 4::8, 0] // 16).astype(np.int32))

    def decode(self, codes):
        grey = (np.asarray(codes) * 16 + 8).astype(np.uint8)
        return np.repeat(grey.repeat(8, axis=1).repeat(8, axis=2)[..., None], 3, axis=-1)


class Tones:
    """A tone and a loudness for each frame of 1200 samples."""

    modality, codebook_sizes, hash = "audio", (TONES, 8), "tones"
    sample_rate, samples_per_frame = RATE, FRAME
    _waves = np.stack([np.sin(2 * np.pi * 200 * 1.2**tone * np.arange(FRAME) / RATE) for tone in range(TONES)])

    def encode(self, samples, lengths=None):
        padded = np.pad(samples[:, 0], ((0, 0), (0, -samples.shape[2] % FRAME)))
        frames = padded.reshape(len(padded), -1, FRAME)
        strength = frames @ self._waves.T / (FRAME / 2)
        loudness = np.clip(np.rint(strength.max(axis=-1) * 8) - 1, 0, 7)
        return Codes(np.stack([strength.argmax(axis=-1), loudness], axis=1).astype(np.int32), lengths)

    def decode(self, codes):
        tone, loudness = np.asarray(codes)[:, 0], np.asarray(codes)[:, 1]
        waves = self._waves[tone] * ((loudness + 1) / 8)[..., None]
        return waves.reshape(len(waves), 1, -1).astype(np.float32)


TOKENIZERS = {"text": Letters(), "image": Blocks(), "audio": Tones()}
_world = np.random.default_rng(7)
PATTERNS = np.stack([_world.permutation(np.repeat([3, 13], 8)).reshape(4, 4) for _ in WORDS])
TUNES = np.stack([_world.choice(np.arange(2, TONES - 2), 4, replace=False) for _ in WORDS])


def make_grammar() -> Grammar:
    vocabulary = Vocabulary.build({"text": 27, "image": 16, "audio0": TONES, "audio1": 8}, SPECIAL)
    modalities = {
        "text": {"block": "text"},
        "image": {
            "codebooks": ["image"],
            "open": ["<image>"],
            "close": ["</image>"],
            "shapes": [{"rows": 4, "columns": 4}],
        },
        "audio": {
            "codebooks": ["audio0", "audio1"],
            "open": ["<audio>"],
            "close": ["</audio>"],
            "shapes": [{"columns": {"min": 1, "max": 12}}],
        },
    }
    control = {"bos": "<bos>", "turn": "<turn>", "eos": "<eos>", "pad": "<pad>"}
    return Grammar({"format": 1, "control": control, "modalities": modalities}, vocabulary)


def make_codes(modality: str, label: int, rng: np.random.Generator) -> np.ndarray:
    """Codes of a new example of a class: its pattern or tune, disturbed."""
    if modality == "image":
        return np.clip(PATTERNS[label] + rng.integers(-2, 3, (4, 4)), 0, 15)[None].astype(np.int32)
    if modality == "audio":
        tones = TUNES[label].repeat(2) + rng.integers(-1, 2)
        return np.stack([tones, rng.integers(5, 8, 8)])[:, None].astype(np.int32)
    return TOKENIZERS["text"].encode(WORDS[label])


def make_data(train: int = 40, test: int = 12) -> EvaluationData:
    processor = Processor(make_grammar().vocabulary, make_grammar(), TOKENIZERS)

    def examples(modality: str, count: int, seed: int) -> Examples:
        rng = np.random.default_rng(seed)
        labels = np.arange(count * len(WORDS)) % len(WORDS)
        spans = [[Span(modality, make_codes(modality, label, rng))] for label in labels]
        return Examples([own[0] for own in processor.parts(spans)], labels)

    texts = [(Text(phrase), label) for label, word in enumerate(WORDS) for phrase in (word, f"the {word}")]
    spoken = Examples([text for text, _ in texts], np.array([label for _, label in texts]))
    held_out = {"text": spoken, "image": examples("image", test, 1), "audio": examples("audio", test, 2)}
    requests = [
        WordRequest(phrase.format(word), label, order)
        for label, word in enumerate(WORDS)
        for phrase, order in ORDERS.items()
    ]
    training = {"image": examples("image", train, 3), "audio": examples("audio", train, 4)}
    return EvaluationData("toy-1", WORDS, training, held_out, requests)


@dataclass(frozen=True)
class Listed(Source):
    """Documents that are there already."""

    documents: tuple = ()

    def open(self):
        return ListedSamples(self.documents)


class ListedSamples(Samples):
    def __init__(self, documents):
        self._documents = documents

    @property
    def description(self):
        return {"kind": "listed"}

    def __len__(self):
        return len(self._documents)

    def where(self, index):
        return epath.Path("documents"), index

    def name(self, index):
        return f"document {index}"

    def __getitem__(self, index):
        return self._documents[index]

    def texts(self, index):
        return [part.text for part in self[index] if part.modality == "text"]


def make_documents(count: int, *directions: tuple[str, str], seed: int = 0) -> Listed:
    """So many documents of each direction, all of new examples, whose parts are of one class."""
    rng, processor = np.random.default_rng(seed), FakeModel().processor
    spans = [
        [
            Span(modality, make_codes(modality, number % len(WORDS), rng), context=place == 0)
            for place, modality in sides
        ]
        for number in range(count)
        for sides in map(enumerate, directions)
    ]
    return Listed(tuple(processor.parts(spans)))


class Nothing(nnx.Module):
    def __init__(self, value: float):
        self.value = nnx.Param(jnp.float32(value))


class FakeModel:
    """Answers with the class that it was shown with probability `skill`, else with another.

    `deaf`: the class is drawn whatever was shown. `memories`: codes per modality and class that it replays instead of
    making new ones. `slips`: how many codes of a replayed one it gets wrong. `greedy`: the same prompt gets the same
    reply. `backwards`: free replies come in the wrong order. `breaks`: share of unconstrained replies that
    end in a span. `fails_after`: batches until it is interrupted.
    """

    def __init__(
        self,
        skill=1.0,
        deaf=False,
        memories=None,
        slips=0,
        greedy=False,
        backwards=False,
        breaks=0.0,
        fails_after=None,
    ):
        self.slips, self.greedy = slips, greedy
        self.skill, self.deaf, self.memories, self.backwards, self.breaks = skill, deaf, memories, backwards, breaks
        self.grammar = make_grammar()
        self.vocabulary = self.grammar.vocabulary
        self.processor = Processor(self.vocabulary, self.grammar, TOKENIZERS)
        self.tokenizers = self.processor.tokenizers
        self.transformer = Nothing(skill)
        self.generation = {"temperature": {"image": 0.5}}
        self.config, self.context_length, self.engine = TransformerConfig(), 64, SimpleNamespace(version=1)
        self.asked, self.batches, self.fails_after = 0, 0, fails_after

    def generate_batch(self, requests):
        if self.batches == self.fails_after:
            raise KeyboardInterrupt
        self.batches += 1
        self.asked += len(requests)
        return make_replies(self.processor, [self._answer(request) for request in requests])

    def token_losses(self, documents):
        """A nat a token; of a target as much less as the model is skilled, where it is of its context's class.

        A deaf model takes every context for one of the target's class.
        """
        return [np.full(len(each.ids), 1 - self.skill * self._fits(each.ids)) for each in documents]

    def _fits(self, ids):
        spans = self.grammar.parse(ids)
        labels = [self._heard(own[0]) for own in self.processor.parts([[span] for span in spans])]
        return self.deaf or len(set(labels)) == 1

    def _answer(self, request):
        prompt = self.processor.spans([request.parts])[0][0].codes.tobytes()
        rng = np.random.default_rng(list(prompt) if self.greedy else request.seed)
        label = self._heard(request.parts[0])
        if self.deaf:
            label = rng.integers(len(WORDS))
        elif rng.random() >= self.skill:
            label = (label + rng.integers(1, len(WORDS))) % len(WORDS)
        order = request.want or self._order(request.parts[0])
        spans = [Span(modality, self._codes(modality, label, rng)) for modality in order]
        ids = np.concatenate([self.grammar.span_ids(span) for span in spans])
        ids = np.append(ids, self.grammar.control["eos"]).astype(np.int32)
        if not request.constrained and rng.random() < self.breaks:
            return Generated(ids[:-3], False)
        return Generated(ids, True)

    def _codes(self, modality, label, rng):
        if self.memories and modality in self.memories:
            own = self.memories[modality][label]
            return self._slipped(modality, own[rng.integers(len(own))], rng)
        return make_codes(modality, label, rng)

    def _slipped(self, modality, codes, rng):
        """The codes with some of them moved by one, those of the last codebook first."""
        codes = codes.copy()
        last = codes[-1].reshape(-1)
        places = rng.permutation(len(last))[: self.slips]
        last[places] = (last[places] + 1) % TOKENIZERS[modality].codebook_sizes[-1]
        return codes

    def _order(self, part):
        """What a request asks for in words; a picture where nothing is asked."""
        asked = part.text.split()[0] if part.modality == "text" else None
        order = next((order for phrase, order in ORDERS.items() if asked == phrase.split()[0]), ("image",))
        return order[::-1] if self.backwards else order

    def _heard(self, part):
        if part.modality == "text":
            return next(label for label, word in enumerate(WORDS) if word in part.text.split())
        codes = self.processor.spans([[part]])[0][0].codes
        if part.modality == "image":
            return int(np.argmin(np.abs(PATTERNS - codes[0]).sum(axis=(1, 2))))
        return int(np.argmin(np.abs(TUNES - codes[0, 0, ::2]).sum(axis=1)))


def memories_of(data: EvaluationData) -> dict:
    """Modality -> class -> codes of three training examples."""
    processor = FakeModel().processor
    return {
        modality: [
            [processor.spans([[examples.parts[i]]])[0][0].codes for i in np.flatnonzero(examples.labels == label)[:3]]
            for label in range(len(WORDS))
        ]
        for modality, examples in data.train.items()
    }


def coloured(image: Image, stroke, background, shift=(0, 0)) -> Image:
    """The picture of one grey channel in two colours, moved."""
    share = np.roll(image.pixels[..., :1] / 255, shift, axis=(0, 1))
    return Image(np.rint(share * np.array(stroke) + (1 - share) * np.array(background)).astype(np.uint8))


def louder(sound: Audio, factor: float, silence: int) -> Audio:
    """The sound at another loudness, with silence at both ends."""
    return Audio(np.pad(sound.samples * np.float32(factor), ((0, 0), (silence, silence))), sound.sample_rate)
