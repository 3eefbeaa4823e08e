"""The small image recipe: 64 x 64 pixels of the bundled photos as 16 x 16 codes of 512, which are 0.5625 bits a pixel.

    omni tokenizer train experiments/tokenizers/photos.py
    python -m omni.recipes.photos_evaluation runs/photos docs/results/tokenizers/photos.json

No adversary: the squared error alone is trained, because PSNR is what is measured. The second command fits k-means over
raw patches of 4 x 4 pixels with as many codes, the best of four starts on 200,000 training patches, and shows WebP at
its nearest rate. Measured on 142 held-out crops: 27.65 dB PSNR with 98.0 % of the codes in use, k-means 24.46 dB, WebP
30.57 dB; the 3,000 steps took 11.5 minutes on two CPU cores that had other work beside them.
"""

from omni.recipes.photos_recipe import photos_training

config = photos_training("runs/photos")
