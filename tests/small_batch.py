"""One small batch, and a few steps with a loss."""

import logging
from functools import partial

import torch
import torchattacks
from torch import nn

from pml_adversarial import AdversarialLoss, Batch

LABELS = torch.arange(8) // 2


def batch_of(labels=LABELS, tuples=None, num_queries=8):
    embeddings = torch.randn(8, 4)
    return Batch(torch.rand(8, 1), embeddings, embeddings, labels, tuples, num_queries)


def steps(loss, count=2, attack=None, **options):
    """Values of the loss over some steps of one small model, and what was said."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    images, labels = torch.rand(16, 1, 6, 6), torch.arange(16) // 4
    attack = attack or partial(torchattacks.PGD, eps=0.1, alpha=0.05, steps=2)
    loss_func = AdversarialLoss(loss, model, attack=attack, seed=0, warmup=0, guard=False, **options)
    return [loss_func(model(images), labels).item() for _ in range(count)]


def said_aloud(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
