"""Tiny codecs of transformers with noise in every tensor, and their codebooks, level by level.

transformers starts codebooks at zero: whatever is compared then agrees, so they are filled with what the encoder gives.
"""

import copy
import dataclasses
from collections.abc import Callable

import near_ties
import numpy as np
import torch
import transformers
from audio_codecs import gain_of, scaled_noise

ENCODEC_24K = {
    "sampling_rate": 2400,
    "upsampling_ratios": [4, 3, 2],
    "num_filters": 4,
    "hidden_size": 8,
    "codebook_size": 16,
    "target_bandwidths": [0.4, 0.8, 1.6],
    "num_residual_layers": 2,
}
ENCODEC_32K = ENCODEC_24K | {"use_causal_conv": False, "use_conv_shortcut": False, "num_residual_layers": 1}
ENCODEC_48K = ENCODEC_24K | {
    "use_causal_conv": False,
    "audio_channels": 2,
    "norm_type": "time_group_norm",
    "normalize": True,
    "chunk_length_s": 0.25,
    "overlap": 0.04,
    "num_residual_layers": 1,
}
DAC = {
    "sampling_rate": 2400,
    "downsampling_ratios": [2, 3, 4],
    "encoder_hidden_size": 4,
    "decoder_hidden_size": 32,
    "n_codebooks": 3,
    "codebook_size": 16,
    "codebook_dim": 4,
}
MIMI = {
    "sampling_rate": 2400,
    "upsampling_ratios": [4, 3],
    "num_filters": 4,
    "hidden_size": 16,
    "upsample_groups": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "sliding_window": 30,
    "rope_parameters": {"rope_type": "default", "rope_theta": 200.0},
    "norm_eps": 1e-3,
    "codebook_size": 16,
    "codebook_dim": 8,
    "vector_quantization_hidden_dimension": 8,
    "num_quantizers": 5,
    "num_semantic_quantizers": 2,
}
CONFIGS = {
    "encodec 24k": lambda: transformers.EncodecConfig(**ENCODEC_24K),
    "encodec 32k": lambda: transformers.EncodecConfig(**ENCODEC_32K),
    "encodec 48k": lambda: transformers.EncodecConfig(**ENCODEC_48K),
    "dac odd": lambda: transformers.DacConfig(**DAC),
    "dac even": lambda: transformers.DacConfig(**DAC | {"downsampling_ratios": [2, 4, 4]}),
    "mimi": lambda: transformers.MimiConfig(**MIMI),
}

# As published; what is not said is transformers' default, which is the codec at 24 kHz for EnCodec.
RELEASED = {
    "encodec 24 kHz": transformers.EncodecConfig,
    "encodec 32 kHz": lambda: transformers.EncodecConfig(
        sampling_rate=32000,
        upsampling_ratios=[8, 5, 4, 4],
        num_filters=64,
        codebook_size=2048,
        target_bandwidths=[2.2],
        use_causal_conv=False,
        use_conv_shortcut=False,
    ),
    "encodec 48 kHz": lambda: transformers.EncodecConfig(
        sampling_rate=48000,
        audio_channels=2,
        target_bandwidths=[3.0, 6.0, 12.0, 24.0],
        use_causal_conv=False,
        norm_type="time_group_norm",
        normalize=True,
        chunk_length_s=1.0,
        overlap=0.01,
    ),
    "dac default": transformers.DacConfig,
    "dac 16 kHz": lambda: transformers.DacConfig(downsampling_ratios=[2, 4, 5, 8], n_codebooks=12),
    "mimi": transformers.MimiConfig,
}


def random_codec(config, seconds: float = 1.0):
    """A model with every parameter and buffer random, codebooks spread over what its encoder gives for noise."""
    generator = torch.Generator().manual_seed(0)
    model = transformers.AutoModel.from_config(config).eval()
    tensors = dict(model.named_parameters()) | {name: x for name, x in model.named_buffers() if x.is_floating_point()}
    persistent = model.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name in persistent:
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(scaled_noise(name, noise, gain_of(config.model_type)))
    finish(model, torch.tensor(sound(config, 4, int(seconds * config.sampling_rate))), generator)
    return model


@torch.no_grad()
def finish(model, audio: torch.Tensor, generator: torch.Generator) -> None:
    """Sets what follows from the other tensors: codebooks amid the latents of `audio`, and an output not clipped."""
    fill_codebooks(model, audio, generator)
    if model.config.model_type == "dac":
        _keep_from_saturating(model, audio)


def _keep_from_saturating(model, audio: torch.Tensor) -> None:
    """Centres what DAC's last tanh gets, and brings it to a level of about 0.7."""
    last, seen = model.decoder.conv2, []
    hook = last.register_forward_hook(lambda module, inputs, output: seen.append(output - last.bias))
    model.decode(audio_codes=model.encode(audio).audio_codes)
    hook.remove()
    last.weight.mul_(0.7 / seen[0].std())
    last.bias.copy_(-0.7 * seen[0].mean() / seen[0].std() + 0.1)


def sound(config, batch: int, samples: int, seed: int = 0) -> np.ndarray:
    """Noise over chirps, float32 [batch, channels, samples]."""
    random = np.random.default_rng(seed)
    channels = getattr(config, "audio_channels", 1)
    time = np.arange(samples) / config.sampling_rate
    chirps = np.sin(random.uniform(20, 400, (batch, channels, 1)) * time * (1 + time))
    return (random.uniform(0.1, 0.6, (batch, 1, 1)) * (chirps + random.normal(size=chirps.shape))).astype(np.float32)


@dataclasses.dataclass
class Level:
    """One codebook."""

    compared: Callable[[torch.Tensor], torch.Tensor]
    """Residuals [n, dim] as they are compared with the vectors."""
    vectors: Callable[[], torch.Tensor]
    """Vectors [codes, code_dim] as they are compared."""
    lookup: Callable[[torch.Tensor], torch.Tensor]
    """What codes [n] stand for, [n, dim]."""
    fill: Callable[[torch.Tensor], None]
    """Sets the vectors."""
    distances: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = near_ties.squared_distances
    """Squared ones, as the model computes them."""


def branches(model) -> list[tuple[Callable[[torch.Tensor], torch.Tensor], list[Level]]]:
    """What each branch makes of latents [n, dim], and the levels over it."""

    if model.config.model_type == "dac":
        return [(lambda x: x, [_by_direction(quantizer) for quantizer in model.quantizer.quantizers])]
    if model.config.model_type == "mimi":
        parts = model.quantizer.semantic_residual_vector_quantizer, model.quantizer.acoustic_residual_vector_quantizer
        return [(_projection(part), [_by_count(layer.codebook) for layer in part.layers]) for part in parts]
    return [(lambda x: x, [_by_distance(layer.codebook) for layer in model.quantizer.layers])]


def _projection(branch):
    return lambda x: branch.input_proj(x.T[None])[0].T


def _by_distance(codebook) -> Level:
    return Level(lambda x: x, lambda: codebook.embed, lambda codes: codebook.embed[codes], codebook.embed.copy_)


def _by_count(codebook) -> Level:
    def vectors():
        return codebook.embed_sum / codebook.cluster_usage.clamp(min=1e-5)[:, None]

    def fill(vectors):
        codebook.cluster_usage[3] = 1e-7  # a code that training has all but forgotten: the sum is divided by 1e-5
        codebook.embed_sum.copy_(vectors * codebook.cluster_usage.clamp(min=1e-5)[:, None])
        codebook._embed = None  # what it may have divided before

    return Level(lambda x: x, vectors, lambda codes: vectors()[codes], fill, near_ties.squared_by_cdist)


def _by_direction(quantizer) -> Level:
    normalize, book = torch.nn.functional.normalize, quantizer.codebook.weight
    return Level(
        lambda x: normalize(quantizer.in_proj(x.T[None])[0].T),
        lambda: normalize(book),
        lambda codes: quantizer.out_proj(book[codes].T[None])[0].T,
        lambda vectors: book.copy_(vectors * torch.linspace(0.5, 2, len(vectors))[:, None]),
    )


def latents(model, piece: torch.Tensor) -> torch.Tensor:
    """What is quantised of a piece [batch, channels, samples] that is encoded at once, as [batch * frames, dim]."""
    if getattr(model.config, "normalize", False):
        piece = piece / (piece.mean(1, keepdim=True).square().mean(2, keepdim=True).sqrt() + 1e-8)
    found = model.encoder(piece)
    found = found.latents if model.config.model_type == "mimi" else found
    return found.transpose(1, 2).reshape(-1, found.shape[1])


def fill_codebooks(model, audio: torch.Tensor, generator: torch.Generator) -> None:
    """Gives each level vectors near what it is to quantise."""
    rows = latents(model, audio)
    for project, levels in branches(model):
        residual = project(rows)
        for level in levels:
            seen = level.compared(residual)
            codes = len(level.vectors())
            chosen = torch.randperm(max(len(seen), codes), generator=generator)[:codes] % len(seen)
            # Where few latents are had, vectors that lie on them would leave the next levels nothing to quantise.
            spread = 0.2 if len(seen) > 4 * codes else 0.8
            noise = torch.randn(codes, seen.shape[1], generator=generator)
            level.fill(seen[chosen] + spread * seen.std(0) * noise)
            residual = residual - level.lookup(torch.cdist(level.compared(residual), level.vectors()).argmin(1))


def is_near_tie(model, piece: np.ndarray, theirs: np.ndarray, ours: np.ndarray) -> bool:
    """Whether codes [codebooks, frames] of a piece are equal but for near-ties, as `near_ties` has them."""
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        values = latents(exact, torch.tensor(piece, dtype=torch.float64))
        return are_near_ties(model, exact, latents(model, torch.tensor(piece)), values, theirs, ours)


@torch.no_grad()
def are_near_ties(
    model, exact, rounded: torch.Tensor, values: torch.Tensor, theirs: np.ndarray, ours: np.ndarray
) -> bool:
    """Whether each frame's first disagreement [codebooks, frames] is a near-tie, as `near_ties` has them.

    What follows a disagreement within a branch quantises another residual, and is not compared.

    Args:
        rounded, values: latents [frames, dim] of the model in float32, and of `exact`, the same in float64.
    """
    theirs, ours = torch.tensor(theirs, dtype=torch.long), torch.tensor(ours, dtype=torch.long)
    first = 0
    for (project, levels), (project_rounded, levels_rounded) in zip(branches(exact), branches(model), strict=True):
        residual, rough = project(values), project_rounded(rounded)
        agreed = torch.ones(len(values), dtype=torch.bool)
        codes = theirs[first : first + len(levels)], ours[first : first + len(levels)]
        first += len(levels)
        for level, level_rounded, one, other in zip(levels, levels_rounded, *codes, strict=False):
            seen, vectors = level.compared(residual), level.vectors()
            if (one != other).any():
                theirs_rounded = level_rounded.compared(rough), level_rounded.vectors()
                bound = near_ties.rounding(seen, vectors, *theirs_rounded, level.distances)
                distances = [(seen - vectors[each]).square().sum(1) for each in (one, other)]
                if (agreed & ((distances[0] - distances[1]).abs() > bound)).any():
                    return False
            agreed &= one == other
            residual, rough = residual - level.lookup(one), rough - level_rounded.lookup(one)
    return True


@torch.no_grad()
def quantised(model, values: torch.Tensor) -> np.ndarray:
    """transformers' codes [codebooks, frames] of latents [frames, dim]."""
    values = values.T[None]
    if model.config.model_type == "dac":
        return model.quantizer(values)[1][0].numpy()
    if model.config.model_type == "mimi":
        return model.quantizer.encode(values)[:, 0].numpy()
    return model.quantizer.encode(values, bandwidth=model.config.target_bandwidths[-1])[:, 0].numpy()
