"""A slow transposed convolution."""

import numpy as np


def slow_conv_transpose1d(x, kernel, stride: int, groups: int = 1) -> np.ndarray:
    """What `slow_conv1d` turned around gives: each frame adds its kernel to the samples from frame * stride on."""
    width, within, outputs = kernel.shape
    y = np.zeros(((len(x) - 1) * stride + width, outputs))
    for frame in range(len(x)):
        for output in range(outputs):
            first = output // (outputs // groups) * within
            for k in range(width):
                y[frame * stride + k, output] += x[frame, first : first + within] @ kernel[k, :, output]
    return y
