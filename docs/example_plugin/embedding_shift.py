"""A plugin for pml_adversarial: trains on images whose embeddings an attack moved far from the clean ones (EST)."""

from torch.nn.functional import normalize

from pml_adversarial import hookimpl
from pml_adversarial.training.plan import attackable_rows, replace_rows


class EmbeddingShift:
    """Moves the embedding of every row away from its clean embedding, as EST does (arXiv 2002.11293)."""

    @hookimpl
    def pml_adversarial_plan(self, batch):
        """Every row whose image is known gets a perturbed copy, and the copy takes the place of the row."""
        return replace_rows(attackable_rows(batch), len(batch), batch.indices_tuple).split(batch.num_queries)

    @hookimpl
    def pml_adversarial_score(self, batch, plan):
        """The squared distance from the clean embedding, both at unit length."""
        origin = normalize(batch.context[plan.rows])
        return lambda embeddings: (normalize(embeddings) - origin).square().sum(1)

    @hookimpl
    def pml_adversarial_record(self, adversarial):
        """The mean increase of the score."""
        return {"score_gain": (adversarial.score_after - adversarial.score_before).mean()}
