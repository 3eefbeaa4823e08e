"""What is measured on tokens: bits per token, and the tokenizers on held-out data."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from omni.bundle import Model
from omni.evaluate.data import EvaluationData, draw_inputs, seed_of
from omni.evaluate.replies import Progress
from omni.evaluate.settings import EvaluationSettings
from omni.grammar import ROLES, Tokens
from omni.parts import Part, Text


def measure_bits(
    model: Model, data: EvaluationData, direction: tuple[str, str], settings: EvaluationSettings, progress: Progress
) -> dict:
    """Bits (-log2 probability) of the true codes, or text tokens, of held-out targets, and the number of these tokens.

    Each target follows a held-out input of its class. Teacher-forced, without temperature, guidance or constraint;
    boundaries and the end do not count.
    """
    documents = _documents(model, data, direction, settings)
    tables, wanted = model.grammar.tables, ROLES.index("text" if direction[1] == "text" else "code")
    total, count = 0.0, 0
    for document, nats in zip(documents, model.token_losses(documents), strict=True):
        counted = document.target & (tables.role[document.states] == wanted)
        total += float(nats[counted].sum())
        count += int(counted.sum())
    progress(len(documents))
    return {"bits": total / np.log(2), "tokens": count}


def measure_image_tokenizer(model: Model, data: EvaluationData, settings: EvaluationSettings) -> dict:
    """PSNR (dB) and SSIM of decode(encode(x)), usage and perplexity of the codebook, over held-out pictures."""
    from omni_tokenizers import image_metrics
    from omni_tokenizers.codes import codebook_use

    tokenizer = model.tokenizers["image"]
    size = tokenizer.image_size
    pixels = np.stack([part.resize_crop(size, size).pixels for part in data.test["image"].parts])
    codes = tokenizer.encode(pixels)
    decoded = tokenizer.decode(codes)
    use = codebook_use(np.asarray(codes), tokenizer.codebook_sizes[0])
    return {
        "psnr": float(image_metrics.psnr(pixels, decoded)),
        "ssim": float(image_metrics.ssim(pixels, decoded)),
        **use,
        "n": len(pixels),
    }


def measure_audio_tokenizer(model: Model, data: EvaluationData, settings: EvaluationSettings) -> dict:
    """Use of the codebooks over all held-out sounds; mel distance and STOI (on clips joined to 3 s) of some of them."""
    from omni_tokenizers import audio_metrics

    tokenizer = model.tokenizers["audio"]
    spans = model.processor.spans([[part] for part in data.test["audio"].parts])
    frames = np.array([own[0].codes.shape[2] for own in spans])
    codes = np.zeros((len(spans), len(tokenizer.codebook_sizes), frames.max()), np.int32)
    for row, own in zip(codes, spans, strict=True):
        row[:, : own[0].codes.shape[2]] = own[0].codes[:, 0]
    use = audio_metrics.codebook_usage(codes, tuple(tokenizer.codebook_sizes), frames)

    chosen = np.random.default_rng(settings.seed).permutation(len(spans))[: settings.heard]
    originals = [data.test["audio"].parts[i].mono().resample(tokenizer.sample_rate) for i in chosen]
    decoded = [own[0] for own in model.processor.parts([spans[i] for i in chosen])]
    lengths = np.array([part.samples.shape[1] for part in originals])
    reference, estimate = _padded(originals, lengths), _padded(decoded, lengths)
    return {
        "mel_distance": audio_metrics.mel_distance(reference, estimate, tokenizer.sample_rate, lengths),
        "stoi": audio_metrics.stoi(reference, estimate, tokenizer.sample_rate, lengths),
        "usage": [book["usage"] for book in use],
        "perplexity": [book["perplexity"] for book in use],
        "n": len(chosen),
    }


def _padded(parts: list[Part], lengths: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n samples"]:
    batch = np.zeros((len(parts), lengths.max()), np.float32)
    for row, part, length in zip(batch, parts, lengths, strict=True):
        row[:length] = part.samples[0, :length]
    return batch


def _documents(
    model: Model, data: EvaluationData, direction: tuple[str, str], settings: EvaluationSettings
) -> list[Tokens]:
    """Prompt and target of one class as documents.

    Text comes in many phrasings as a prompt, but the right reply, which models are taught, is the bare word of a class.
    """
    source, target = direction
    name = f"bits {source}->{target}"
    targets, labels = draw_inputs(data, target, settings.documents, seed_of(settings.seed, name))
    if target == "text":
        targets = [Text(data.words[label]) for label in labels]
    examples = data.test[source]
    rng = np.random.default_rng(seed_of(settings.seed, name, source))
    prompts = [examples.parts[rng.choice(np.flatnonzero(examples.labels == label))] for label in labels]
    spans = model.processor.spans([[*pair] for pair in zip(prompts, targets, strict=True)])
    return [model.grammar.pack([dataclasses.replace(prompt, context=True), target]) for prompt, target in spans]
