"""The spectral codec at 24 kHz and 3 kbit/s beside EnCodec's SEANet at equal bits, losses and training time, and Opus.

    omni tokenizer train experiments/tokenizers/speech.py

It runs unattended and goes on where it was interrupted. It makes the speech (whole sentences in espeak-ng's voices, a
fifth of them held out), times a step of each net in turn, trains each for equally long, measures held-out voices at
eight points of each training, and leaves runs/speech/results.json, which belongs into
docs/results/tokenizers/audio.json. There, on two cores, mel distance and STOI are 1.55 and 0.893 after 17 minutes of
the spectral codec, 2.08 and 0.838 of the better SEANet; Opus at 6.4 kbit/s has 3.46 and 0.894.
"""

from omni.recipes.speech_comparison import SpeechComparison

config = SpeechComparison()
