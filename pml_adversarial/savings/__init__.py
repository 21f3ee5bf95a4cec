"""Adversarial training for fewer passes: each module is one way to spare some, and says what is given up for it.

Factories go in as ``attack=``, plugins as ``plugins=[...]``, of `AdversarialLoss`.
"""
