"""The quickstart's image tokenizer by itself: 32 x 32 pictures of digits as 4 x 4 codes of 512.

    omni quickstart                                             # makes the dataset, among other things
    omni tokenizer train experiments/tokenizers/digits_image.py

The data is the quickstart's; `--task.data.directory DIR` names another run's. What comes of these settings is in the
quickstart's own results (`tokenizers.image` in docs/results/quickstart.json): it trains the same net for as many steps.
"""

from omni.recipes.digits import DigitsRecipe
from omni.recipes.digits_examples import DigitScans
from omni.train.tokenizers import ImageTokenizerTask

recipe = DigitsRecipe()
config = recipe.image_training.config(
    "runs/digits_image",
    ImageTokenizerTask(DigitScans("runs/quickstart/data"), recipe.image),
    recipe.seed,
    recipe.checkpoint_every,
)
