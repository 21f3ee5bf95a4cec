"""Trains on rows that an adversary moved off themselves: EST (arXiv 2002.11293), as a plugin for pml_adversarial."""

import torch
from torch.nn.functional import normalize

from pml_adversarial import hookimpl
from pml_adversarial.training.plan import replace_rows


class EmbeddingShift:
    """Moves every row away from its own clean embedding."""

    @hookimpl
    def pml_adversarial_plan(self, batch):
        """Every row whose image is known gets a copy, which takes its place."""
        rows = torch.arange(batch.num_attackable, device=batch.inputs.device)
        return replace_rows(rows, len(batch), batch.indices_tuple).split(batch.num_queries)

    @hookimpl
    def pml_adversarial_score(self, batch, plan):
        """The squared distance to the clean embedding, on the unit sphere."""
        origin = normalize(batch.context[plan.rows])
        return lambda embeddings: (normalize(embeddings) - origin).square().sum(1)

    @hookimpl
    def pml_adversarial_record(self, adversarial):
        """How far the rows were moved, in the score's own unit."""
        return {"score_gain": (adversarial.score_after - adversarial.score_before).mean()}
