"""Records: their schema, their categories, and where they come from."""
