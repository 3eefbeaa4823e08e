"""Small random documents of text, pictures and sound."""

import numpy as np

from omni.grammar import Grammar, Span, Tokens
from omni.vocabulary import Vocabulary

SPECIAL = ("<pad>", "<bos>", "<turn>", "<eos>", "<image>", "</image>", "<audio>", "</audio>")


def make_grammar(text: int = 20) -> Grammar:
    """Text, pictures of 2 x 3 codes and sound of two codebooks and 1 to 5 frames."""
    blocks = {"text": text, "image": 12, "audio0": 8, "audio1": 8}
    declaration = {
        "format": 1,
        "control": {"bos": "<bos>", "turn": "<turn>", "eos": "<eos>", "pad": "<pad>"},
        "modalities": {
            "text": {"block": "text"},
            "image": {
                "codebooks": ["image"],
                "open": ["<image>"],
                "close": ["</image>"],
                "shapes": [{"rows": 2, "columns": 3}],
            },
            "audio": {
                "codebooks": ["audio0", "audio1"],
                "open": ["<audio>"],
                "close": ["</audio>"],
                "shapes": [{"rows": 1, "columns": {"min": 1, "max": 5}}],
            },
        },
    }
    return Grammar(declaration, Vocabulary.build(blocks, SPECIAL))


def make_documents(grammar: Grammar, count: int, seed: int = 0) -> list[Tokens]:
    """Documents of a word, then a picture and sound that repeat its last code, so that there is something to learn."""
    random = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        word = random.integers(0, 8, random.integers(1, 6))
        frames = random.integers(1, 6)
        image = Span("image", np.full((1, 2, 3), word[-1], np.int32))
        audio = Span("audio", np.full((2, 1, frames), word[-1], np.int32))
        targets = [[image], [audio], [image, audio]][random.integers(3)]
        documents.append(grammar.pack([Span("text", word.astype(np.int32), context=True), *targets]))
    return documents
