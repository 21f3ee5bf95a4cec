import pytest
import torch
import torchattacks
from pytorch_metric_learning.losses import ContrastiveLoss
from torch import nn
from torch.nn.functional import cross_entropy

from pml_adversarial import AdversarialLoss, AttackError
from pml_adversarial.attacks.objective import Objective, _is_retained

SCORES = torch.cat([-torch.logspace(6, -6, 400), torch.zeros(1), torch.logspace(-6, 6, 400)])


def objective_of_score(clean, score=lambda embeddings: embeddings.flatten()):
    """Inputs are embeddings are scores."""
    return Objective(lambda inputs, rows=None: inputs, score, clean)


def losses_of(scores, clean_score=0.0):
    objective = objective_of_score(torch.full((len(scores), 1), clean_score))
    logits = objective(scores.reshape(-1, 1))
    return logits, cross_entropy(logits, objective.labels, reduction="none")


class TestCrossEntropy:
    def test_never_falls_while_the_score_grows(self):
        _, losses = losses_of(SCORES)
        assert (losses.diff() >= 0).all()

    def test_grows_strictly_where_scores_differ_by_more_than_rounding(self):
        decades = torch.logspace(-5, 6, 34)
        _, losses = losses_of(torch.cat([-decades.flip(0), torch.zeros(1), decades]))
        assert (losses.diff() > 0).all()

    def test_has_gradient_everywhere(self):
        scores = SCORES.requires_grad_()
        assert 0 in scores
        _, losses = losses_of(scores)
        (gradient,) = torch.autograd.grad(losses.sum(), scores)
        assert (gradient > 0).all()
        assert gradient.isfinite().all()

    def test_has_its_slope_at_zero_from_both_sides(self):
        scores = torch.tensor([-1e-3, 0.0, 1e-3], requires_grad=True)
        _, losses = losses_of(scores)
        (gradient,) = torch.autograd.grad(losses.sum(), scores)
        torch.testing.assert_close(gradient, gradient[1].expand(3), rtol=0.01, atol=0)

    def test_the_mean_over_a_large_batch_has_gradient_too(self):
        scores = torch.tensor([-1e6, 0.0, 1e6]).repeat(1000).requires_grad_()
        _, losses = losses_of(scores)
        (gradient,) = torch.autograd.grad(losses.mean(), scores)
        assert (gradient > 0).all()

    def test_label_zero_is_always_on_top(self):
        logits, losses = losses_of(torch.cat([SCORES, torch.tensor([-1e30, 1e30])]))
        assert (logits[:, 0] > logits[:, 1]).all()
        assert (losses < torch.tensor(2.0).log()).all()

    def test_counts_from_the_clean_score(self):
        scores = torch.tensor([4.0, 5.0, 6.0])
        logits, _ = losses_of(scores, clean_score=5.0)
        expected, _ = losses_of(scores - 5)
        assert torch.equal(logits, expected)

    def test_one_row_does_not_move_another(self):
        scores = torch.zeros(3, requires_grad=True)
        _, losses = losses_of(scores)
        (gradient,) = torch.autograd.grad(losses[1], scores)
        assert [value != 0 for value in gradient.tolist()] == [False, True, False]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
    def test_in_other_precisions(self, dtype):
        scores = torch.tensor([-3.0, 0.0, 3.0], dtype=dtype, requires_grad=True)
        objective = objective_of_score(torch.zeros(3, 1, dtype=dtype))
        losses = cross_entropy(objective(scores.reshape(-1, 1)), objective.labels, reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), scores)
        assert (losses.diff() > 0).all()
        assert (gradient > 0).all()
        assert gradient.dtype == dtype


class TestRows:
    @pytest.mark.parametrize("rows", [[0], [0, 1], [0, 1, 2, 3, 0]])
    def test_another_number_of_rows_is_refused(self, rows):
        objective = objective_of_score(torch.zeros(4, 1))
        with pytest.raises(AttackError, match=f"asked about {len(rows)} of 4 perturbed rows"):
            objective(torch.rand(4, 1)[rows])

    @pytest.mark.parametrize("shape", [(1,), (3,), (4, 1), (1, 4), (4, 4)])
    def test_other_shapes_of_scores_are_refused(self, shape):
        with pytest.raises(AttackError, match=r"expected one per perturbed row, \(4,\), or a scalar"):
            objective_of_score(torch.zeros(4, 1), score=lambda embeddings: torch.zeros(shape)).clean_score  # noqa: B018

    def test_a_shape_that_changes_is_refused(self):
        shapes = iter([(4,), (4, 1)])
        objective = objective_of_score(torch.zeros(4, 1), score=lambda embeddings: embeddings.reshape(next(shapes)))
        with pytest.raises(AttackError, match=r"shape \(4, 1\)"):
            objective(torch.rand(4, 1))

    def test_a_scalar_is_every_rows_score(self):
        clean, inputs = torch.ones(4, 1), torch.arange(4.0).reshape(4, 1).requires_grad_()
        objective = objective_of_score(clean, score=lambda embeddings: embeddings.sum())
        assert objective.clean_score.tolist() == [4, 4, 4, 4]
        logits = objective(inputs)
        assert logits.shape == (4, 2)
        assert torch.equal(logits, logits[:1].expand(4, 2))
        cross_entropy(logits, objective.labels).backward()
        assert (inputs.grad > 0).all()

    def test_labels_are_zeros(self):
        labels = objective_of_score(torch.zeros(4, 1)).labels
        assert labels.tolist() == [0, 0, 0, 0]
        assert labels.dtype == torch.long

    def test_is_a_runtime_error(self):
        with pytest.raises(RuntimeError):
            objective_of_score(torch.zeros(4, 1))(torch.zeros(3, 1))


class TestSomeRows:
    """``score(inputs, rows)``: the other rows keep the embeddings that they had."""

    def test_the_others_keep_the_embeddings_of_the_last_call(self):
        objective = objective_of_score(torch.zeros(3, 1), lambda embeddings: embeddings.sum() + embeddings.flatten())
        assert objective.score(torch.tensor([[1.0], [10.0]]), torch.tensor([2, 0])).tolist() == [12, 21]
        assert objective.score(torch.tensor([[100.0]]), torch.tensor([1])).tolist() == [211]
        assert objective.score(torch.tensor([[5.0]]), torch.tensor([2])).tolist() == [120]

    def test_gradient_reaches_these_rows_alone(self):
        objective = objective_of_score(torch.ones(3, 1))
        inputs = torch.tensor([[4.0]], requires_grad=True)
        objective.score(inputs, torch.tensor([1])).square().sum().backward()
        assert inputs.grad.tolist() == [[8]]
        assert objective.zero_gradient.tolist() == [True, False, True]


def ask_for_gradient(objective, inputs):
    inputs = inputs.clone().requires_grad_()
    cross_entropy(objective(inputs), objective.labels).backward()


class TestZeroGradient:
    hinge = staticmethod(lambda embeddings: embeddings.flatten().clamp(min=0))

    def test_is_false_while_no_gradient_was_asked_for(self):
        objective = objective_of_score(torch.zeros(3, 1), self.hinge)
        with torch.no_grad():
            objective(torch.rand(3, 1))
        assert objective.zero_gradient.tolist() == [False, False, False]

    def test_names_the_rows_without(self):
        objective = objective_of_score(torch.zeros(3, 1), self.hinge)
        ask_for_gradient(objective, torch.tensor([[-1.0], [1.0], [-2.0]]))
        assert objective.zero_gradient.tolist() == [True, False, True]

    def test_one_pass_with_gradient_is_enough(self):
        objective = objective_of_score(torch.zeros(3, 1), self.hinge)
        ask_for_gradient(objective, torch.tensor([[-1.0], [1.0], [-2.0]]))
        ask_for_gradient(objective, torch.tensor([[1.0], [-1.0], [-2.0]]))
        assert objective.zero_gradient.tolist() == [False, False, True]

    def test_looks_at_every_value_of_an_image(self):
        objective = objective_of_score(torch.zeros(2, 1, 2, 2), lambda images: images[:, 0, 1, 1])
        inputs = torch.rand(2, 1, 2, 2, requires_grad=True)
        (objective(inputs)[0, 0] + 0 * objective(inputs)[1, 0]).backward()
        assert objective.zero_gradient.tolist() == [False, True]

    def test_sees_what_autograd_grad_asks_for(self):
        objective = objective_of_score(torch.zeros(3, 1), self.hinge)
        inputs = torch.tensor([[-1.0], [1.0], [-2.0]], requires_grad=True)
        torch.autograd.grad(objective(inputs).sum(), inputs)
        assert objective.zero_gradient.tolist() == [True, False, True]


class TestModule:
    def test_offers_the_modules_parameters_and_a_device(self):
        layer = nn.Linear(2, 3)
        objective = Objective(layer, lambda e: e.sum(1), torch.zeros(4, 3), [layer])
        assert {id(p) for p in layer.parameters()} < {id(p) for p in objective.parameters()}
        assert next(objective.parameters()).device.type == "cpu"

    def test_has_a_device_without_parameters(self):
        assert next(objective_of_score(torch.zeros(4, 1)).parameters()).numel() == 0

    def test_the_clean_score_carries_no_gradient(self):
        clean = torch.zeros(4, 2, requires_grad=True)
        assert not objective_of_score(clean, lambda e: e.sum(1)).clean_score.requires_grad

    def test_modes_reach_the_modules(self):
        layer = nn.Dropout()
        objective = Objective(layer, lambda e: e.sum(1), torch.zeros(4, 3), [layer])
        objective.eval()
        assert not layer.training

    def test_modes_do_not_reach_those_that_are_kept_in_theirs(self):
        kept, frozen = nn.Dropout(), nn.Dropout().eval()
        model = nn.Sequential(kept, frozen, nn.Dropout())
        objective = Objective(model, lambda e: e.sum(1), torch.zeros(4, 3), [model], kept_in_mode=[kept, frozen])
        objective.eval()
        assert [layer.training for layer in model] == [True, False, False]


class TestMode:
    def test_torchattacks_leaves_eval_mode_alone(self, model, images):
        model.eval()
        objective = Objective(model, lambda embeddings: embeddings.sum(1), model(images).detach(), [model])
        torchattacks.PGD(objective, steps=1)(images, objective.labels)
        assert not any(module.training for module in model.modules())


class TestMemory:
    """An attack step keeps what a gradient to the inputs needs, and nothing for the weights."""

    HIDDEN, ROWS = 37, 8

    @pytest.fixture
    def chain(self):
        """Without a nonlinearity: only a gradient to the weights needs what goes into the second layer."""
        return nn.Sequential(nn.Flatten(), nn.Linear(9, self.HIDDEN), nn.Linear(self.HIDDEN, 4))

    def kept_in_a_pass(self, forward, inputs):
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
            output = forward(inputs.clone().requires_grad_())
        nodes, leaves = [output.grad_fn], []
        for node in nodes:
            nodes += [parent for parent, _ in node.next_functions if parent is not None and parent not in nodes]
            leaves += [node.variable] if hasattr(node, "variable") else []
        return shapes, leaves

    def test_keeps_no_activations_and_no_graph_of_the_weights(self, chain):
        images, labels, seen = torch.rand(self.ROWS, 1, 3, 3), torch.arange(self.ROWS) // 2, []

        def watched(objective):
            def attack(inputs, labels):
                seen.append(self.kept_in_a_pass(objective, inputs))
                return 1 - inputs

            return attack

        loss_func = AdversarialLoss(ContrastiveLoss(), chain, attack=watched, warmup=0)
        loss_func(chain(images), labels).backward()
        ((shapes, leaves),) = seen
        assert (self.ROWS, self.HIDDEN) not in shapes
        assert [tuple(leaf.shape) for leaf in leaves] == [(self.ROWS, 1, 3, 3)]

    def test_a_trainable_pass_would_be_noticed(self, chain):
        shapes, leaves = self.kept_in_a_pass(chain, torch.rand(self.ROWS, 1, 3, 3))
        assert (self.ROWS, self.HIDDEN) in shapes
        assert len(leaves) == 5


class TestOtherLeaves:
    """An attack may call ``backward``; what the loop made beside the inputs gets no gradient of it."""

    @pytest.mark.parametrize("ask", ["logits", "score"])
    def test_get_no_gradient(self, ask):
        scale, model = torch.tensor(2.0, requires_grad=True), nn.Linear(3, 4)
        inputs, clean = torch.rand(5, 3), torch.rand(5, 4)
        objective = Objective(lambda x: model(x) * scale, lambda e: e.square().sum(1), clean)
        found = inputs.clone().requires_grad_()
        (objective(found)[:, 0] if ask == "logits" else objective.score(found)).sum().backward()
        assert scale.grad is None
        assert all(weight.grad is None for weight in model.parameters())
        by_hand = inputs.clone().requires_grad_()
        score = (model(by_hand) * scale).square().sum(1)
        if ask == "score":
            score.sum().backward()
            torch.testing.assert_close(found.grad, by_hand.grad)
        assert found.grad.abs().sum() > 0
        assert not objective.zero_gradient.any()

    def test_two_backward_passes_of_a_retained_graph(self):
        model = nn.Linear(3, 4)
        objective = Objective(model, lambda e: e.square().sum(1), torch.rand(5, 4))
        found = torch.rand(5, 3, requires_grad=True)
        score = objective.score(found).sum()
        score.backward(retain_graph=True)
        once = found.grad.clone()
        score.backward()
        torch.testing.assert_close(found.grad, 2 * once)

    def test_the_graph_is_kept_where_it_is_retained_alone(self):
        asked = []

        class Watched(torch.autograd.Function):
            @staticmethod
            def forward(ctx, inputs):
                return inputs.clone()

            @staticmethod
            def backward(ctx, gradient):
                asked.append(_is_retained())
                return gradient

        objective = Objective(Watched.apply, lambda e: e.square().sum(1), torch.rand(5, 3))
        for retain in (True, False):
            objective.score(torch.rand(5, 3, requires_grad=True)).sum().backward(retain_graph=retain)
        assert asked == [True, not hasattr(torch._C._autograd, "_get_current_graph_task_keep_graph")]

    def test_where_no_gradient_reaches_the_inputs(self):
        objective = Objective(lambda x: x.detach() * 2, lambda e: e.sum(1), torch.zeros(5, 3))
        found = torch.rand(5, 3, requires_grad=True)
        objective.score(found).sum().backward()
        assert found.grad is None
