"""The small image recipe with each quantiser of 9 bits a code, side by side.

    omni tokenizer train experiments/tokenizers/compare_quantizers.py

It runs unattended, goes on where it was interrupted, and leaves runs/photos_quantizers/results.json, which belongs into
docs/results/tokenizers/quantizers.json. Not measured yet.
"""

from omni.recipes.photos_recipe import QuantizerComparison

config = QuantizerComparison()
