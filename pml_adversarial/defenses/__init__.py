"""Published ways to train robust embeddings, one module each, as plugins: ``AdversarialLoss(loss, model, plugins=["hm", "ics"])``.

Each answers only the questions in which it differs from the package's own method, and leaves the attack to the caller.
Options are values: ``plugins=[HM(destination="semihard"), ICS(weight=0.5)]``.
"""
