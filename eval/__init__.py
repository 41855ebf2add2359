"""How a model is judged: generation, judges, suites, statistics, gate, report."""
