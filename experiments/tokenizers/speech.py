"""The spectral codec at 24 kHz and 3 kbit/s beside EnCodec's SEANet at equal bits, losses and training time, and Opus.

    omni tokenizer train experiments/tokenizers/speech.py

It runs unattended and goes on where it was interrupted. It makes the speech (whole sentences in espeak-ng's voices, a
fifth of them held out), times a step of each net in turn, trains each for equally long, measures held-out voices at
eight points of each training, and leaves runs/speech/results.json, which belongs into
docs/results/tokenizers/audio.json. Not measured yet.
"""

from omni.recipes.speech_comparison import SpeechComparison

config = SpeechComparison()
