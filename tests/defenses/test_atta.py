import pytest
import torch
from few_passes import EPS, ROWS, counted_model, four_labels, score_of, signs_by_hand, twelve_images, wrapped  # noqa: F401
from pytorch_metric_learning.losses import TripletMarginLoss

from pml_adversarial import InputError, PluginError
from pml_adversarial.defenses import ATTA, HardRows


class TestATTA:
    def test_starts_where_the_image_was_left(self, model, images, labels):
        reuse = ATTA(eps=EPS, alpha=0.0)  # it stays where it starts
        loss_func, watch = wrapped(model, reuse)
        reuse.next(torch.arange(ROWS) + 5)
        loss_func(model(images), labels)
        first = watch.adversarial.inputs
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
        reuse.next(order + 5)
        loss_func(model(images[order]), labels[order])
        assert torch.allclose(watch.adversarial.inputs, first[order], atol=1e-6)
        reuse.next(torch.arange(ROWS) + 100)
        loss_func(model(images), labels)
        assert (watch.adversarial.inputs - first).abs().max() > 0.01
        assert reuse.known.nonzero().flatten().tolist() == [*range(5, 5 + ROWS), *range(100, 100 + ROWS)]

    def test_steps_add_up_over_epochs(self, model, images, labels):
        reuse = ATTA(eps=EPS, alpha=0.01)
        loss_func, watch = wrapped(model, reuse)
        context, scores = model(images).detach(), []
        for _ in range(8):
            reuse.next(torch.arange(ROWS))
            loss_func(model(images), labels)
            scores.append(watch.adversarial.score_after.mean().item())
        assert scores[-1] > scores[0]
        before = watch.adversarial.inputs
        expected = before + 0.01 * signs_by_hand(model, before, context, labels)
        reuse.next(torch.arange(ROWS))
        loss_func(model(images), labels)
        expected = (images + (expected - images).clamp(-EPS, EPS)).clamp(0, 1)
        assert torch.allclose(watch.adversarial.inputs, expected, atol=1e-5)

    def test_goes_on_from_a_saved_state(self, model, images, labels, tmp_path):
        reuse = ATTA(eps=EPS)
        loss_func, _ = wrapped(model, reuse)
        reuse.next(torch.arange(ROWS))
        loss_func(model(images), labels)
        torch.save(loss_func.state_dict(), tmp_path / "loss.pt")
        found = []
        for plugin, func in ((reuse, loss_func), (ATTA(eps=EPS), None)):
            if func is None:
                func, _ = wrapped(model, plugin)
                func.load_state_dict(torch.load(tmp_path / "loss.pt", weights_only=True))
            plugin.next(torch.arange(ROWS))
            found.append(func(model(images), labels).item())
        assert found[0] == found[1]

    def test_has_to_be_told_each_time(self, model, images, labels):
        reuse = ATTA(eps=EPS)
        loss_func, _ = wrapped(model, reuse)
        with pytest.raises(PluginError, match="told nothing"):
            loss_func(model(images), labels)
        reuse.next(torch.arange(3))
        with pytest.raises(PluginError, match="told 3 places before a call with 12 inputs"):
            loss_func(model(images), labels)
        reuse.next(torch.arange(ROWS))
        loss_func(model(images), labels)
        with pytest.raises(PluginError, match="told nothing"):
            loss_func(model(images), labels)

    @pytest.mark.parametrize("index", [torch.tensor([-1]), torch.tensor([0.5]), torch.tensor([[1]]), [1, 2], None])
    def test_refuses_what_is_no_index(self, index):
        with pytest.raises(InputError, match="index is"):
            ATTA().next(index)

    @pytest.mark.parametrize("options", [{"eps": 0}, {"eps": 8}, {"eps": None}, {"steps": 0}, {"steps": 1.5}])
    def test_refuses_nonsense(self, options):
        with pytest.raises(InputError, match="expected eps"):
            ATTA(**options)


class TestTheyCombine:
    def test_hard_rows_with_reuse(self, model, images, labels):
        reuse = ATTA(eps=EPS, alpha=0.0)
        loss_func, watch = wrapped(model, HardRows(0.5), reuse, loss=TripletMarginLoss())
        reuse.next(torch.arange(ROWS))
        loss_func(model(images), labels)
        assert reuse.known.nonzero().flatten().tolist() == watch.plan.rows.tolist()
