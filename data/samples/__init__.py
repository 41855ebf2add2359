"""The shipped records; `equipoise.data.sources.load_samples` reads them."""
