"""edgemm recipes"""

from __future__ import annotations

from edgemm.cli._files import group
from edgemm.recipe import load_recipe

app = group("recipes", load_recipe)
