"""`log_every`: one line of the log in so many steps, shown whatever the program did with `logging`."""

import logging

import pytest
import torch
from pytorch_metric_learning.losses import TripletMarginLoss
from torch import nn

from pml_adversarial import AdversarialLoss, InputError
from pml_adversarial.training import distributed
from pml_adversarial.training.progress import line, logger
from pml_adversarial.training.records import LossRecords


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 4))


def lines(model, caplog, steps=6, **options):
    images, labels = torch.rand(16, 1, 4, 4), torch.arange(16) // 2
    loss_func = AdversarialLoss(TripletMarginLoss(margin=0.2), model, **options)
    caplog.clear()
    with caplog.at_level(logging.INFO, "pml_adversarial"):
        for _ in range(steps):
            loss_func(model(images), labels)
    return loss_func, [record.getMessage() for record in caplog.records]


def test_one_line_in_so_many_steps(model, caplog):
    loss_func, found = lines(model, caplog, log_every=2, warmup=8)
    assert [text.partition(":")[0] for text in found] == ["step 2", "step 4", "step 6"]
    assert found[-1] == line(6, loss_func.records)
    assert "eps at 62 %" in found[-1]
    assert lines(model, caplog, warmup=0)[1] == []


def test_says_what_the_records_say(model, caplog):
    loss_func, (text,) = lines(model, caplog, steps=1, log_every=1, eps=8 / 255, warmup=0)
    now = loss_func.records
    assert text == (
        f"step 1: loss {now.loss_before:.4g} clean, {now.loss_after:.4g} attacked; eps at 100 %, changes up to 8/255; "
        f"R@1 in the batch {100 * now.batch_recall:.0f} % clean, {100 * now.batch_recall_attacked:.0f} % attacked"
    )


def test_a_step_without_attack_and_numbers_that_are_not_known_yet():
    assert line(3, LossRecords(strength=0.0, num_perturbed=0)) == "step 3: nothing was perturbed; eps at 0 %"


def test_goes_on_counting_after_a_checkpoint(model, caplog):
    loss_func, _ = lines(model, caplog, steps=5, log_every=100)
    images, labels = torch.rand(16, 1, 4, 4), torch.arange(16) // 2
    again = AdversarialLoss(TripletMarginLoss(margin=0.2), model, log_every=6)
    again.load_state_dict(loss_func.state_dict())
    caplog.clear()
    with caplog.at_level(logging.INFO, "pml_adversarial"):
        again(model(images), labels)
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["step 6"]


def test_only_the_first_process_writes(model, caplog, monkeypatch):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert lines(model, caplog, log_every=1)[1] == []


def test_a_program_without_logging_sees_the_lines_too(model, monkeypatch, capsys):
    images, labels = torch.rand(16, 1, 4, 4), torch.arange(16) // 2
    loss_func = AdversarialLoss(TripletMarginLoss(margin=0.2), model, log_every=1, warmup=0)
    with monkeypatch.context() as patch:
        for where in (logging.getLogger(), logger):
            patch.setattr(where, "handlers", [])
        patch.setattr(logger, "level", logging.NOTSET)
        patch.setattr(logging.getLogger(), "level", logging.WARNING)
        logger.manager._clear_cache()
        loss_func(model(images), labels)
        loss_func(model(images), labels)
    logger.manager._clear_cache()
    shown = capsys.readouterr().err.splitlines()
    assert [text.partition(":")[0] for text in shown] == ["step 1", "step 2"]


@pytest.mark.parametrize("every", [0, -1, 2.5, True, "10"])
def test_what_is_refused(every):
    with pytest.raises(InputError, match=r"log_every=.*; expected a whole number from 1 on, as the number of steps"):
        AdversarialLoss(TripletMarginLoss(), log_every=every)
