"""What tests of the spectral codec share."""

from omni_tokenizers.waveform import whole_frames


def loss_of(codec, batch, key, *, training):
    """(total, weight, metrics) of a batch, as the trainer has them."""
    audio, mask = whole_frames(batch["audio"], batch["length"], codec.config.samples_per_frame)
    estimate, quantized = codec.autoencode(audio, batch["length"], key, training=training)
    return codec.config.losses(estimate, audio, mask, quantized, codec.config.sample_rate)
