"""Faults in convolutions and embeddings, tied tensors, what the loop's clipping and loss are told, adaptive runs."""

from planted.fault import ENGINE, FEDERATED, RECORDERS, RULES, fault

AUTOGRAD, TIES, REDUCTION, OPTIMIZER = (
    f"lalora_kernels/{name}.py" for name in ("autograd", "privacy/ties", "privacy/reduction", "privacy/optimizer")
)

LAYERS = (
    fault(
        "pixels and channels of a convolution's gradient confused",
        AUTOGRAD,
        "    return t.flatten(2).transpose(1, 2)\n",
        "    return t.flatten(2).transpose(1, 2) if t.shape[1] == 1 else t.reshape(len(t), -1, t.shape[1])\n",
        "conv_embedding",
    ),
    fault(
        "patches of a convolution one pixel aside",
        AUTOGRAD,
        "F.unfold(xl, lora_A.shape[2:], padding=ctx.padding, stride=ctx.stride)",
        "F.unfold(xl.roll(1, 3), lora_A.shape[2:], padding=ctx.padding, stride=ctx.stride)",
        "conv_embedding",
    ),
    fault(
        "equal tokens of several records taken for one record's",
        RECORDERS,
        "torch.arange(N, device=ids.device).view(-1, 1) * vocabulary + ids",
        "0 * torch.arange(N, device=ids.device).view(-1, 1) * vocabulary + ids",
        "conv_embedding",
        "per_sample",
    ),
    fault(
        "norm without an adapted table's A",
        RECORDERS,
        "return sq.index_add_(0, sample, sums.double().square().sum(1))",
        "return sq",
        "conv_embedding",
    ),
    fault(
        "a table's padding has a gradient",
        RECORDERS,
        "if padding_idx is not None:",
        "if False:",
        "conv_embedding",
        "per_sample",
    ),
    fault(
        "a table that a batch rewrites is let through",
        RULES,
        "(m.max_norm is not None or m.weight.requires_grad)",
        "False",
        "conv_embedding",
    ),
    fault(
        "norm of a tied weight from its first use",
        TIES,
        "            for r in used:\n                r.add_sample(i, G)\n",
        "            for r in used[:1]:\n                r.add_sample(i, G)\n",
        "tied",
    ),
    fault(
        "a shared factor clipped in each layer",
        RECORDERS,
        "and e.grad_scaler is None and not shared:",
        "and e.grad_scaler is None:",
        "tied",
    ),
    fault(
        "a second use untied after make_private goes unnoticed",
        RECORDERS,
        "for name, module, key in self.places:",
        "for name, module, key in self.places[:1]:",
        "tied",
    ),
    fault(
        "a tensor that the optimizer holds twice is stepped on twice",
        OPTIMIZER,
        "if len(held) > len(inside):",
        "if False:",
        "tied",
    ),
    fault(
        "the loop clips before the step and nobody says so",
        ENGINE,
        "            stand_in(self.active)\n",
        "",
        "refusals",
    ),
    fault(
        "a sum taken for a mean",
        REDUCTION,
        "if found != e.loss_reduction:",
        "if False:",
        "reduction",
    ),
    fault(
        "a mean over all tokens of the batch is let through",
        REDUCTION,
        'if found == "shares":',
        "if False:",
        "reduction",
    ),
    fault(
        "the first batch alone shows the loss",
        REDUCTION,
        "TRIES = 4  #",
        "TRIES = 1  #",
        "reduction",
    ),
    fault(
        "the sum's noise does not pay for the count",
        "lalora_kernels/privacy/adaptive.py",
        "self.sum_multiplier = (z**-2 - (2 * self.std) ** -2) ** -0.5 if z else 0.0",
        "self.sum_multiplier = z",
        "adaptive",
    ),
    fault(
        "a run's C starts anew in every round",
        f"{FEDERATED}/client.py",
        "                self.max_grad_norm = optimizer.max_grad_norm\n",
        "                pass\n",
        "adaptive",
    ),
    fault(
        "LLM.int8's outliers of the whole batch let through",
        RULES,
        " or bits(m) == 8",
        "",
        "quantized",
    ),
    fault(
        "a quantized layer's adapter recorded without its scaling",
        "lalora_kernels/quantized.py",
        "ctx.recorder.record_lora(g, B, ctx.scaling, h, x, need_x, need_bias)",
        "ctx.recorder.record_lora(g, B, 1.0, h, x, need_x, need_bias)",
        "quantized",
    ),
)  # fmt: skip
