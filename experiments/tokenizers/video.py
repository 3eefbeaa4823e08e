"""The small video recipe: camera moves over the bundled photos, 128 x 128 pixels, at 10 bits for 4 frames of 8 x 8.

    omni tokenizer train experiments/tokenizers/video.py
    python -m omni.recipes.videos_evaluation runs/videos docs/results/tokenizers/videos.json

No adversary: the squared error alone is trained, because PSNR is what is measured. The second command measures it on
moves over held-out photos, beside k-means over raw boxes of 4 frames of 8 x 8 pixels with as many codes.
"""

from omni.recipes.videos_recipe import videos_training

config = videos_training("runs/videos")
