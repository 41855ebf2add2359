"""How a model is trained: recipes, losses, stages, the gatekeeper."""
