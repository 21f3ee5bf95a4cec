"""Published ways to train robust embeddings, one module each, as plugins.

``AdversarialLoss(loss, model, plugins=["hm", "ics"])``, or with options as values,
``plugins=[HM(destination="semihard"), ICS(weight=0.5)]``. Each answers only the questions in which it differs from the
package's own method, and leaves the attack and its budget to the caller.
"""
