"""Private text classification with PEFT and transformers: a PEFT model, two calls more.

    python examples/text_peft.py --model roberta-base --data train.tsv --steps 500

Without arguments, offline: a small BERT with random weights reads numpy's and torch's documentation, without success.
"""

import argparse
import inspect

import numpy
import torch
from torch.utils.data import DataLoader

import lalora_kernels as lk
from lalora_kernels.data import load_data
from lalora_kernels.models import torchvision_beside_cpu_torch

torchvision_beside_cpu_torch()  # PyPI's torchvision does not import beside a CPU build of torch
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForSequenceClassification as Auto  # noqa: E402
from transformers import AutoTokenizer, BertConfig, ByT5Tokenizer  # noqa: E402

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="name or folder of a transformers model")
parser.add_argument("--data", help="FILE.tsv or .csv with a column label and one of text")
parser.add_argument("--steps", type=int, default=40)
args = parser.parse_args()

if args.data:
    train, test = map(list, (load_data(args.data).train, load_data(args.data).test))
else:
    docs = [(inspect.getdoc(f), i) for i, lib in enumerate((numpy, torch)) for f in vars(lib).values() if callable(f)]
    train, test = ([(doc[:60], i) for doc, i in part if doc] for part in (docs[::2] + docs[1::4], docs[3::4]))
if args.model:
    tokenizer, model = AutoTokenizer.from_pretrained(args.model), Auto.from_pretrained(args.model, num_labels=2)
else:
    tokenizer = ByT5Tokenizer(model_max_length=64)  # a vocabulary of bytes is public; one made from the records is not
    model = Auto.from_config(BertConfig(vocab_size=384, hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=8, target_modules="all-linear"))
lk.patch_peft(model)

def collate(rows):
    inputs = tokenizer([text for text, _ in rows], padding=True, truncation=True, max_length=128, return_tensors="pt")
    return {**inputs, "labels": torch.tensor([label for _, label in rows])}

optimizer, loader = lk.make_private(
    model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3),
    DataLoader(train, batch_size=min(128, len(train) // 4), collate_fn=collate), physical_batch_size=64,
    max_grad_norm=0.5, target_epsilon=3.0, target_delta=1e-5, steps=args.steps)
model.train()
for batch in loader.steps(args.steps):
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.eval()
right = sum(int((model(**b).logits.argmax(1) == b["labels"]).sum()) for b in DataLoader(test, 64, collate_fn=collate))
print(f"accuracy {right / len(test):.3f} on {len(test)} test records, ε = {optimizer.get_epsilon():.2f}")
model.save_pretrained("text-adapter")
