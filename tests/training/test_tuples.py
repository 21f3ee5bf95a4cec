import random
from collections import Counter

import pytest
import torch
from some_tuples import KINDS, random_tuples

from pml_adversarial import PlanError
from pml_adversarial.training.tuples import ROLES, keep_tuples, parse_roles, rank_in_group, shift_partners


class TestKeepTuples:
    @pytest.mark.parametrize("k", [1, 2, 100])
    @pytest.mark.parametrize("kind", KINDS)
    def test_keeps_so_many_per_anchor_and_kind(self, kind, k):
        tuples = random_tuples(kind)
        kept = keep_tuples(tuples, k)
        assert len(kept) == len(tuples)
        halves = [slice(0, 3)] if len(tuples) == 3 else [slice(0, 2), slice(2, 4)]
        for half in halves:
            before = list(zip(*(member.tolist() for member in tuples[half]), strict=True))
            after = list(zip(*(member.tolist() for member in kept[half]), strict=True))
            assert not Counter(after) - Counter(before)
            wanted = {anchor: min(k, count) for anchor, count in Counter(t[0] for t in before).items()}
            assert Counter(t[0] for t in after) == wanted

    def test_chooses_at_random(self):
        tuples = torch.zeros(4, dtype=torch.long), torch.arange(4), torch.arange(4)
        chosen = {keep_tuples(tuples, 1)[1].item() for _ in range(100)}
        assert chosen == {0, 1, 2, 3}

    def test_keeps_the_order(self):
        tuples = torch.zeros(50, dtype=torch.long), torch.arange(50), torch.arange(50)
        kept = keep_tuples(tuples, 20)[1].tolist()
        assert kept == sorted(kept)


@pytest.mark.parametrize("values", [[], [4], [7, 3, 7, 7], [1, 1, 1], random.Random(0).choices(range(5), k=200)])
def test_rank_in_group_counts_equal_values_before(values):
    expected = [values[:i].count(value) for i, value in enumerate(values)]
    assert rank_in_group(torch.tensor(values, dtype=torch.long)).tolist() == expected


def test_shift_partners_leaves_anchors():
    triplets = tuple(torch.tensor([i]) for i in (1, 2, 3))
    pairs = (*triplets, torch.tensor([4]))
    assert [m.item() for m in shift_partners(triplets, 10)] == [1, 12, 13]
    assert [m.item() for m in shift_partners(pairs, -1)] == [1, 1, 3, 3]


class TestParseRoles:
    @pytest.mark.parametrize(
        ("perturb", "roles"),
        [
            ("anchor", ("anchor",)),
            (["negative"], ("negative",)),
            (("negative", "anchor"), ("anchor", "negative")),
            ({"positive", "negative", "anchor"}, ROLES),
            (["positive", "positive"], ("positive",)),
            ("all", ROLES),
            (["anchor", "all"], ROLES),
            ((role for role in ("positive", "anchor")), ("anchor", "positive")),
        ],
    )
    def test_gives_roles_in_a_fixed_order(self, perturb, roles):
        assert parse_roles(perturb) == roles

    @pytest.mark.parametrize(
        ("perturb", "found"),
        [("positives", "positives"), (["anchor", "query"], "query"), ([], "no role"), ("", "''"), ([3], "'3'")],
    )
    def test_refuses_what_is_no_role(self, perturb, found):
        with pytest.raises(PlanError, match=found) as caught:
            parse_roles(perturb)
        assert "'anchor', 'positive', 'negative'" in str(caught.value)
