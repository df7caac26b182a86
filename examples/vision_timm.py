"""Private image classification with a timm model and a decaying learning rate.

    python examples/vision_timm.py                                              # offline: digits, random weights
    python examples/vision_timm.py --data cifar100.npz --weights vit_tiny.safetensors --image-size 64
"""

import argparse

import torch
from torch.utils.data import DataLoader, TensorDataset

import lalora_kernels as lk
from lalora_kernels.data import load_data
from lalora_kernels.models import torchvision_beside_cpu_torch

torchvision_beside_cpu_torch()  # PyPI's torchvision does not import beside a CPU build of torch
import timm  # noqa: E402

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="vit_tiny_patch16_224")
parser.add_argument("--weights", help="a file that timm reads; without it they are random")
parser.add_argument("--data", default="digits", help="digits, mnist or FILE.npz (x_train, y_train)")
parser.add_argument("--image-size", type=int, default=16)
parser.add_argument("--patch-size", type=int, default=4)
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--epsilon", type=float, default=3.0)
args = parser.parse_args()

data = load_data(args.data)
overlay = {"pretrained_cfg_overlay": {"file": args.weights}} if args.weights else {}
model = timm.create_model(
    args.model, pretrained=bool(args.weights), num_classes=len(data.classes),
    img_size=args.image_size, patch_size=args.patch_size, in_chans=data.train.inputs.shape[1], **overlay)


def prepare(records):
    x = records.inputs.float() / (255 if records.inputs.dtype == torch.uint8 else 1)
    x = torch.nn.functional.interpolate(x, args.image_size, mode="bilinear", antialias=True)
    return TensorDataset((x - 0.5) / 0.5, records.labels)  # timm's mean and deviation for its ViTs


train, test = prepare(data.train), prepare(data.test)
lk.adapt(model, r=8, target_modules="qv", modules_to_save=["head"])  # timm's fused qkv is adapted whole
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
optimizer, loader = lk.make_private(
    model, optimizer, DataLoader(train, batch_size=min(256, len(train) // 4)), physical_batch_size=64,
    max_grad_norm=0.5, target_epsilon=args.epsilon, target_delta=1e-5, steps=args.steps)
model.train()
for x, y in loader.steps(args.steps):
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    if optimizer.stepped:  # once for each logical batch
        decay.step()
with torch.no_grad():
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in DataLoader(test, 256))
print(f"accuracy {right / len(test):.3f} on {len(test)} test images, ε = {optimizer.get_epsilon():.2f}")
