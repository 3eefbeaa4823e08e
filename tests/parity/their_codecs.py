"""Codes and sound as transformers' EnCodec, DAC and Mimi give them, in the form that ours have."""

import numpy as np
import torch

from omni_tokenizers.codes import Codes


def their_codes(model, x: np.ndarray, codebooks: int | None = None, mask: np.ndarray | None = None) -> Codes:
    """What transformers makes of sound, as our codes."""
    if model.config.model_type == "encodec":
        return their_encodec_codes(model, x, codebooks, mask)
    with torch.no_grad():
        if model.config.model_type == "mimi":
            found = model.encode(torch.tensor(x), num_quantizers=codebooks)
        else:
            # Its convolutions drop what does not fill a frame: DAC's feature extractor completes it with silence.
            x = np.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % model.config.hop_length)))
            found = model.encode(torch.tensor(x), n_quantizers=codebooks)
    return Codes(found.audio_codes.numpy().astype(np.int32))


def their_encodec_codes(model, x, codebooks: int | None, mask=None) -> Codes:
    """Chunks in a row, without the padding after the last one."""
    config = model.config
    number = config.num_quantizers if codebooks is None else codebooks
    bandwidth = next(rate for rate in config.target_bandwidths if codebooks_of(model, rate) == number)
    with torch.no_grad():
        found = model.encode(torch.tensor(x), None if mask is None else torch.tensor(mask), bandwidth=bandwidth)
    chunks = found.audio_codes.numpy()
    ids = np.concatenate(list(chunks), -1)[..., : chunks.shape[0] * chunks.shape[-1] - found.last_frame_pad_length]
    scales = np.concatenate([scale.numpy() for scale in found.audio_scales], 1) if config.normalize else None
    return Codes(ids.astype(np.int32), None, scales)


def codebooks_of(model, bandwidth: float) -> int:
    """Codebooks that transformers takes for a bandwidth."""
    return model.quantizer.get_num_quantizers_for_bandwidth(bandwidth)


def their_sound(model, codes: Codes) -> np.ndarray:
    """What transformers makes of our codes."""
    ids = torch.tensor(codes.ids, dtype=torch.long)
    with torch.no_grad():
        if model.config.model_type == "encodec":
            return their_encodec_sound(model, ids, codes.scales)
        return model.decode(audio_codes=ids).audio_values.numpy().reshape(len(ids), 1, -1)


def their_encodec_sound(model, ids, scales: np.ndarray | None) -> np.ndarray:
    """As transformers wants it: chunks of equal length, and the padding of the last one told."""
    config = model.config
    each = -(-config.chunk_length // config.hop_length) if config.chunk_length else ids.shape[2]
    missing = -ids.shape[2] % each
    chunks = torch.split(torch.nn.functional.pad(ids, (0, missing)), each, -1)
    scales = [None] * len(chunks) if scales is None else list(torch.tensor(scales).T[..., None])
    return model.decode(torch.stack(chunks), scales, last_frame_pad_length=missing).audio_values.numpy()


def pieces(tokenizer, x: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
    """First and last frame of what is encoded at once, and its sound."""
    step = tokenizer.samples_per_frame
    if tokenizer.type != "encodec":
        missing = -x.shape[2] % step if tokenizer.type == "dac" else 0
        return [(0, -(-x.shape[2] // step), np.pad(x, ((0, 0), (0, 0), (0, missing))))]
    each, spans = tokenizer.config.chunk_frames, enumerate(tokenizer.config.spans(x.shape[2]))
    return [(i * each, i * each - (-size // step), x[..., start : start + size]) for i, (start, size) in spans]
