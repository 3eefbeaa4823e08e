"""The model in the box: the quickstart's recipe with more steps.

    omni train experiments/digits.py
    python -m omni.recipes.ship runs/digits omni/recipes/models/digits

On two CPU cores the training took 39 minutes. Measured on the shipped files, of which made.json beside them tells more
(1,000 generated targets a direction, in brackets the judge's accuracy on real held-out examples):

    from / to    text            picture         sound
    text                          100 % (98.9)    99.4 % (99.7)
    picture       98.3 % (100)                    95.8 % (99.7)
    sound         98.0 % (100)    95.1 % (98.9)

Requests in words bring the asked parts in order in all of 300, all of the asked digit in 99.7 %. What is missing to
what this model is for: the two directions without text are 4 points below their ceilings (3 were wanted), 98.7 % of
unconstrained replies are well-formed (99 were), and 2.2 % of 1,000 sounds repeat the codes of a training example (1 at
most was): the loss on training sounds ended at 1.3 nats a token, that on held-out ones at 3.6, so it has learned its
voices by heart.
"""

import dataclasses

from omni.recipes.digits import DigitsRecipe

quickstart = DigitsRecipe()
config = dataclasses.replace(
    quickstart,
    output="runs/digits",
    image_training=dataclasses.replace(quickstart.image_training, steps=1000),
    audio_training=dataclasses.replace(quickstart.audio_training, steps=1200),
    image_variants=48,
    audio_variants=11,
    documents=200_000,
    transformer_training=dataclasses.replace(quickstart.transformer_training, steps=12000, ema_decay=0.998),
)
