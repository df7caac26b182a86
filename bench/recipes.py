"""Private steps (DP-LoRA, A and B) by the recipes of two papers whose packages are in no index that we know of.

Written from the papers, in plain PyTorch, on PEFT's model; they are ours and not those packages, whose own code may be
faster or slower. Neither asks autograd for the gradient of a parameter: hooks see what one is made of, the input x
(N, T, n) and the output's gradient dy (N, T, m) of every linear layer that trains. Noise is ``torch.randn`` in the
parameter's dtype.
"""

import math

import torch
from contender import BACKWARD, Contender, peft_model
from torch import Tensor, nn
from torch.profiler import record_function
from zoo import Spec, loss_of


class Recipe(Contender):
    """Hooks on the linear layers that train; ``record`` is called in each one's backward."""

    def __init__(self, spec: Spec, noise: float = 1.0, clip: float = 1.0):
        super().__init__(spec, peft_model(spec))
        self.noise, self.clip, self.tensors = noise, clip, 0
        for name, layer in self.model.named_modules():
            trained = [p for p in layer._parameters.values() if p is not None and p.requires_grad]
            if not trained:
                continue
            if not isinstance(layer, nn.Linear) or len(trained) != len(list(layer.parameters())):
                raise TypeError(f"{name}: the recipes know of whole linear layers only")
            self.tensors += len(trained)
            layer.requires_grad_(False)  # so that autograd forms no gradient of it; SGD has it already
            layer.register_forward_hook(self._watch)

    def _watch(self, layer: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:  # the first of the model: backward goes as far as it, and no further
            output.requires_grad_()
        x, N = inputs[0].detach(), self.spec.batch  # N: for Swin all windows of one image
        output.register_hook(
            lambda dy: self.record(layer, x.reshape(N, -1, x.shape[-1]), dy.reshape(N, -1, dy.shape[-1]))
        )

    def record(self, layer: nn.Linear, x: Tensor, dy: Tensor) -> None:
        raise NotImplementedError

    def backward(self) -> None:
        x, y = next(self.batches)
        loss = loss_of(self.model(x).logits, y)  # a mean: a record's own gradient is N times what dy holds
        with record_function(BACKWARD):
            loss.backward()

    def release(self, p: nn.Parameter, total: Tensor) -> None:
        """``total``: the clipped sum of records' own gradients."""
        std = self.noise * self.clip
        p.grad = (total.to(p.dtype) + std * torch.randn_like(p)) / self.spec.batch

    def step(self) -> None:
        self.backward()
        self.sgd.step()
        self.sgd.zero_grad()


class BookKeeping(Recipe):
    """fastDP's recipe: book-keeping (Bu et al., arXiv 2210.00038) in its mixed form.

    One backward. A layer's norms come from Gram matrices (T x T) or, where that takes fewer operations, from per-sample
    gradients. x and dy, or those gradients, are kept until all norms are known; one weighted product a layer then gives
    the clipped sum, without a second backward.
    """

    def __init__(self, spec: Spec, noise: float = 1.0, clip: float = 1.0):
        super().__init__(spec, noise, clip)
        self.books: list[tuple] = []
        self.squares: list[Tensor] = []

    def record(self, layer: nn.Linear, x: Tensor, dy: Tensor) -> None:
        T = x.shape[1]
        if 2 * T * T <= layer.weight.numel():
            self.squares.append((torch.bmm(x, x.mT) * torch.bmm(dy, dy.mT)).sum((1, 2)))
            self.books.append((layer, x, dy, None))
        else:
            G = torch.bmm(dy.mT, x)
            self.squares.append(torch.linalg.vector_norm(G, dim=(1, 2)).square())
            self.books.append((layer, None, dy if layer.bias is not None else None, G))
        if layer.bias is not None:
            self.squares.append(dy.sum(1).square().sum(1))

    def backward(self) -> None:
        super().backward()
        N = self.spec.batch
        weights = N * (self.clip / (N * torch.stack(self.squares).sum(0).sqrt())).clamp(max=1.0)
        for layer, x, dy, G in self.books:
            if dy is not None:
                dy = weights.to(dy.dtype).view(-1, 1, 1) * dy
            if G is None:
                total = dy.flatten(0, 1).t() @ x.flatten(0, 1)
            else:
                total = (weights.to(G.dtype) @ G.flatten(1)).view(layer.weight.shape)
            self.release(layer.weight, total)
            if layer.bias is not None:
                self.release(layer.bias, dy.sum((0, 1)))
        self.books, self.squares = [], []


class LayerByLayer(Recipe):
    """FlashDP's recipe (arXiv 2507.01154): a layer's gradient, norm, clipping, sum and noise in one go in its backward.

    Each tensor is clipped by itself, here to C / sqrt(tensors), so that the whole keeps the bound C. Per-sample
    gradients live for a block of records at a time; the paper's kernel holds them in a multiprocessor's memory.
    """

    clipping = "per_layer"
    BLOCK = 1 << 24  # values of the gradients that are held at once

    def record(self, layer: nn.Linear, x: Tensor, dy: Tensor) -> None:
        records, total = max(1, self.BLOCK // layer.weight.numel()), torch.zeros_like(layer.weight)
        for x_block, dy_block in zip(x.split(records), dy.split(records)):
            G = torch.bmm(dy_block.mT, x_block)
            total += (self._weights(G.flatten(1)) @ G.flatten(1)).view_as(total)
        self.release(layer.weight, total)
        if layer.bias is not None:
            G = dy.sum(1)
            self.release(layer.bias, self._weights(G) @ G)

    def _weights(self, G: Tensor) -> Tensor:
        """Of per-sample gradients (N, values), as dy holds them."""
        N, bound = self.spec.batch, self.clip / math.sqrt(self.tensors)
        return N * (bound / (N * torch.linalg.vector_norm(G, dim=1))).clamp(max=1.0)
