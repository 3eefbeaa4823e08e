"""The model in the box: the quickstart's recipe with more steps.

    omni train experiments/digits.py
    omni export runs/digits omni/recipes/models/digits --dtype float16
    omni eval runs/digits --model omni/recipes/models/digits --output runs/digits/shipped

Not finished yet, so there is no result and no model in the box. At these sizes the weights take 4.4 MB in float16; the
package has room for 4.5 MB.
"""

import dataclasses

from omni.recipes.digits import DigitsRecipe

quickstart = DigitsRecipe()
config = dataclasses.replace(
    quickstart,
    output="runs/digits",
    image_training=dataclasses.replace(quickstart.image_training, steps=1000),
    audio_training=dataclasses.replace(quickstart.audio_training, steps=1200),
    image_variants=24,
    documents=200_000,
    transformer_training=dataclasses.replace(quickstart.transformer_training, steps=9000, ema_decay=0.998),
)
