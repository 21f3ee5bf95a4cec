"""What is evaluated: a model, and queries that search a gallery by a distance."""
