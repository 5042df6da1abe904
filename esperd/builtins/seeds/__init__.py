"""The modules behind the built-in blueprints. They import torch: only workers load them."""
