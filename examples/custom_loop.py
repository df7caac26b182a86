"""A loop of your own: your model, your schedule, a checkpoint in the middle, and a budget that ends the training.

    python examples/custom_loop.py --data mnist --epsilon 1    # without --data scikit-learn's digits; both offline
"""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lalora_kernels as lk
from lalora_kernels.data import load_data

parser = argparse.ArgumentParser()
parser.add_argument("--data", default="digits", help="digits, mnist or FILE.npz")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--epsilon", type=float, default=3.0)
args = parser.parse_args()

data = load_data(args.data)
scale = 255 if data.train.inputs.dtype == torch.uint8 else 1
x = data.train.inputs.flatten(1) / scale
loader = DataLoader(TensorDataset(x, data.train.labels), batch_size=128)


def network():
    # Of these records: written before every release, and continued where it is there.
    ledger = lk.Ledger.at("custom-loop.json", target_epsilon=args.epsilon, target_delta=1e-5)
    torch.manual_seed(0)  # the start of A is public
    model = nn.Sequential(nn.Linear(x.shape[1], 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, len(data.classes)))
    lk.adapt(model, r=8, target_modules=["0"], modules_to_save=["2", "3"], verbose=False)  # "2": scale and bias train
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    b_twice = lk.Schedule("b-twice", lambda round, step: "A" if step % 3 == 0 else "B")
    return model, *lk.make_private(
        model, optimizer, loader, method=b_twice, clipping="automatic", max_grad_norm=1.0,
        target_epsilon=args.epsilon, target_delta=1e-5, ledger=ledger, steps=args.steps - ledger.steps)


def train(model, optimizer, private, steps):
    for inputs, targets in private.steps(steps):
        nn.functional.cross_entropy(model(inputs), targets, label_smoothing=0.1).backward()
        optimizer.step()  # raises BudgetExceeded, before anything is released, where ε would be exceeded
        optimizer.zero_grad()


model, optimizer, private = network()
train(model, optimizer, private, args.steps // 2)
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "custom-loop.pt")  # no key

model, optimizer, private = network()  # as after a crash: what was spent stays spent, the key is a fresh one
for part, state in torch.load("custom-loop.pt").items():
    {"model": model, "optimizer": optimizer}[part].load_state_dict(state)
train(model, optimizer, private, args.steps - args.steps // 2)
optimizer.detach()
lk.merge_and_unload(model.eval())
with torch.no_grad():
    right = (model(data.test.inputs.flatten(1) / scale).argmax(1) == data.test.labels).float().mean()
print(f"accuracy {right:.3f} after {optimizer.ledger.steps} steps, ε = {optimizer.get_epsilon():.2f}")
