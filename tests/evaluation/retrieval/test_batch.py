"""A batch of queries: its parts, its objective, and the model as a classifier over its gallery."""

import by_loops
import pytest
import torch
from query_batches import bench_of, embedded, images_of, network


@pytest.fixture
def batch():
    return bench_of(network(), images_of()).batch(torch.arange(24))


class TestQueryBatch:
    def test_a_part_of_it_holds_the_same_of_fewer_queries(self, batch):
        rows = torch.tensor([7, 0, 19])
        part = batch[rows]
        assert (len(batch), len(part)) == (24, 3)
        for i, row in enumerate(rows.tolist()):
            assert torch.equal(part.images[i], batch.images[row])
            assert torch.equal(part.clean[i], batch.clean[row])
            assert part.targets.labels[i] == batch.targets.labels[row]
            assert part.targets.own[i] == row
        assert part.gallery is batch.gallery
        assert (part.norm, part.modules) == (batch.norm, batch.modules)

    def test_an_objective_starts_at_the_clean_queries_or_at_what_is_given(self, batch):
        def score(queries):
            return queries.square().sum(1)

        objective, origin = batch.objective(score), torch.randn(24, 6)
        torch.testing.assert_close(objective.clean_score, score(batch.clean))
        torch.testing.assert_close(batch.objective(score, origin).clean_score, score(origin))
        moved = (batch.images + 0.1).clamp(0, 1)
        torch.testing.assert_close(objective.score(moved), score(embedded(batch.embed.modules[0], moved)))

    def test_its_classifier_is_right_where_the_nearest_item_is(self, batch):
        model = batch.classifier()
        right = model(batch.images).argmax(1) == model.labels
        labels = batch.gallery.labels
        stands = [by_loops.stands(batch.clean[i], labels[i], i, batch.gallery.embeddings, labels) for i in range(24)]
        assert right.tolist() == stands
        assert 0 < sum(stands) < 24
