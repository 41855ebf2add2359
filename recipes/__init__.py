"""The YAML that fills `equipoise.train.recipe`; Hydra finds it as pkg://equipoise.recipes."""
