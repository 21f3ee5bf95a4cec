"""Adversarial metric learning with accelerate: gradient accumulation, and mixed precision if asked for.

python accelerate_loop.py
python accelerate_loop.py --mixed-precision bf16

Handwritten digits: the model is trained on 0-4 and tested on 5-9, which it never sees in training. The script is for
one process; train_torchrun.py is for several. It needs `pip install "pml-adversarial[cli]" accelerate`.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from pytorch_metric_learning.losses import MultiSimilarityLoss
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pml_adversarial import AdversarialLoss, evaluate_robustness
from pml_adversarial.cli.images import digits

EPOCHS, BATCH_SIZE, ACCUMULATED = 25, 56, 2
CHECKPOINT = "accelerate_loop.pt"


def make_model():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 64),
    )


def train(accelerator, images, labels):
    model = make_model()
    loader = DataLoader(TensorDataset(images, labels), BATCH_SIZE, shuffle=True, drop_last=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    loss_func = AdversarialLoss(
        MultiSimilarityLoss(alpha=2, beta=40, base=0.5),
        model,  # the model that prepare returned
        eps=0.2,
        warmup=EPOCHS * len(loader) // 2,  # counts calls of the loss; each call is one attack
    )
    loss_func = accelerator.prepare(loss_func)

    for epoch in range(1, EPOCHS + 1):
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                embeddings = model(inputs)
                with accelerator.autocast():
                    loss = loss_func(embeddings, targets)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        if epoch % 5 == 0:
            before, after = loss_func.loss_before, loss_func.loss_after
            accelerator.print(f"epoch {epoch}: loss {before:.3f}, under attack {after:.3f} ({loss_func.strength:.0%})")
    accelerator.save(accelerator.unwrap_model(model).state_dict(), CHECKPOINT)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="no")
    precision = parser.parse_args().mixed_precision

    set_seed(0)
    data = digits()
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATED, mixed_precision=precision)
    train(accelerator, data.train_images, data.train_labels)

    model = make_model().to(accelerator.device)  # evaluated in full precision
    model.load_state_dict(torch.load(CHECKPOINT, map_location=accelerator.device, weights_only=True))
    report = evaluate_robustness(
        model, (data.test_images, data.test_labels), eps=0.1, attacks="quick", checks=False, batch_size=512
    )
    clean, attacked = report.clean["recall_at_1"], report.worst_case(0.1)
    accelerator.print(f"unseen classes: R@1 {clean:.1%}, at most {attacked:.1%} under attack at eps 0.1")


if __name__ == "__main__":
    main()
