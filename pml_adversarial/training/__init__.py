"""One adversarial training step, and what it is made of."""

__all__: list[str] = []
