"""Fine-tunes an ImageNet backbone adversarially on CUB-200-2011, and evaluates it on classes it has not seen.

python finetune_cub.py --root data/cub --download

The model is trained on classes 1-100 and tested on 101-200, as is usual for this data set. The script writes model.pt,
robustness.json and robustness.html to the folder --output. Its settings are usual ones and were not tuned. There are no
results of this script yet. It needs a GPU, and `pip install "pml-adversarial[cli]" "pytorch-metric-learning>=2.9"`:
this version of pytorch-metric-learning has the data set.
"""

import argparse
from pathlib import Path

import torch
import torchvision
from pytorch_metric_learning.datasets import CUB
from pytorch_metric_learning.losses import MultiSimilarityLoss
from pytorch_metric_learning.samplers import MPerClassSampler
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2 as transforms

from pml_adversarial import AdversarialLoss, evaluate_robustness

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
TO_PIXELS = [transforms.PILToTensor(), transforms.ToDtype(torch.float32, scale=True)]  # in [0, 1], not normalised


def make_model(backbone, weights, dimensions=512):
    """Pixels in [0, 1] -> embeddings. The model normalises, so eps is in pixels in training and in evaluation."""
    network = getattr(torchvision.models, backbone)(weights=weights)
    network.fc = nn.Linear(network.fc.in_features, dimensions)
    return nn.Sequential(torchvision.transforms.Normalize(MEAN, STD), network)


def load(args):
    crop, flip = transforms.RandomResizedCrop(args.size), transforms.RandomHorizontalFlip()
    augment = transforms.Compose([transforms.RGB(), crop, flip, *TO_PIXELS])  # a few images are grey
    resize, centre = transforms.Resize(args.size * 8 // 7), transforms.CenterCrop(args.size)
    plain = transforms.Compose([transforms.RGB(), resize, centre, *TO_PIXELS])
    train_set = CUB(args.root, split="train", transform=augment, download=args.download)
    return train_set, CUB(args.root, split="test", transform=plain)


def set_to_train(model):
    """Train mode, except for BatchNorm, which keeps the statistics of ImageNet."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def train(model, train_set, args, device):
    sampler = MPerClassSampler(train_set.labels, 4, args.batch_size, length_before_new_iter=len(train_set))
    loader = DataLoader(train_set, args.batch_size, sampler=sampler, num_workers=args.workers, drop_last=True)
    loss_func = AdversarialLoss(
        MultiSimilarityLoss(alpha=2, beta=40, base=0.5),
        model,
        eps=args.eps / 255,
        warmup=args.epochs * len(loader) // 2,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=1e-4)
    set_to_train(model)
    for epoch in range(1, args.epochs + 1):
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                loss = loss_func(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        before, after, recall = loss_func.loss_before, loss_func.loss_after, loss_func.batch_recall
        print(f"epoch {epoch}: loss {before:.3f}, under attack {after:.3f}, R@1 in the batch {recall:.1%}", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--root", default="data/cub", help="folder in which CUB_200_2011 lies")
    parser.add_argument("--download", action="store_true", help="fetch the images if the folder is empty (1.1 GB)")
    parser.add_argument("--backbone", choices=["resnet18", "resnet50"], default="resnet50")
    parser.add_argument("--weights", choices=["imagenet", "none"], default="imagenet")
    parser.add_argument("--eps", type=float, default=8, help="of training and the largest of evaluation, in 255ths")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=112)
    parser.add_argument("--lr", type=float, default=3e-5)
    parser.add_argument("--size", type=int, default=224, help="pixels of a side")
    parser.add_argument("--amp", action="store_true", help="bfloat16 in training")
    parser.add_argument("--workers", type=int, default=8, help="processes that read images for training")
    parser.add_argument("--queries", type=int, default=500, help="test images to attack; all others are searched")
    parser.add_argument("--attacks", choices=["quick", "standard"], default="standard")
    parser.add_argument("--output", type=Path, default="finetune_cub_run")
    args = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_set, test_set = load(args)
    print(f"{len(train_set)} images to train on, {len(test_set)} of other classes to search, on {device}")
    model = make_model(args.backbone, "IMAGENET1K_V1" if args.weights == "imagenet" else None).to(device)
    train(model, train_set, args, device)
    args.output.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), args.output / "model.pt")

    drawn = torch.randperm(len(test_set))[: args.queries].sort().values
    radii = [args.eps / 4 / 255, args.eps / 2 / 255, args.eps / 255]
    report = evaluate_robustness(model, test_set, eps=radii, attacks=args.attacks, subset=drawn, batch_size=32)
    print(report)
    report.save_json(args.output / "robustness.json")
    report.save_html(args.output / "robustness.html")
    print(f"written to {args.output}: model.pt, robustness.json, robustness.html")


if __name__ == "__main__":
    main()
