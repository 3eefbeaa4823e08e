"""x"""

from omni.recipes.photos_recipe import photos_training

config = photos_training("runs/photos")
