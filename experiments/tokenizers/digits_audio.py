"""The quickstart's audio codec by itself: spoken digits at 50 tokens a second.

    omni quickstart                                             # makes the dataset, among other things
    omni tokenizer train experiments/tokenizers/digits_audio.py

The data is the quickstart's; `--task.data.directory DIR` names another run's. What comes of these settings is in the
quickstart's own results (`tokenizers.audio` in docs/results/quickstart.json): it trains the same net for as many steps.
"""

from omni.recipes.digits import DigitsRecipe
from omni.recipes.digits_examples import SpokenDigits
from omni.train.tokenizers import AudioTokenizerTask

recipe = DigitsRecipe()
config = recipe.audio_training.config(
    "runs/digits_audio",
    AudioTokenizerTask(SpokenDigits("runs/quickstart/data"), recipe.audio),
    recipe.seed,
    recipe.checkpoint_every,
)
