"""Faults in what holds a loop to its batch, a file to its owner, a server to its place."""

from planted.fault import ENGINE, fault

LOOPS = (
    fault(
        "a step that failed may be made once more",
        ENGINE,
        "            self._forget()\n            raise\n",
        "            raise\n",
        "loops",
    ),
    fault(
        "a graph of another batch is backpropagated",
        "lalora_kernels/autograd_tools.py",
        "    if ctx.batch != ctx.recorder.engine.serial:\n",
        "    if False:\n",
        "loops",
    ),
    fault(
        "a batch fetched ahead goes unnoticed",
        ENGINE,
        "        self._passed = same or self._passed and not batch.first\n",
        "",
        "loops",
    ),
    fault(
        "a layer put in before the forward is not looked at",
        ENGINE,
        "        self._factors()  # or what was put in since the batch came would go unseen\n",
        "",
        "loops",
    ),
    fault(
        "the number of records decides how all are computed",
        "lalora_kernels/autograd.py",
        "    if recorder is None:\n        rows = x.numel() / n\n",
        "    if True:\n        rows = x.numel() / n\n",
        "merged_products",
    ),
    fault(
        "records with gaps are not asked",
        "lalora_kernels/privacy/first_batch.py",
        "lambda t: torch.ones_like(t, dtype=torch.bool)):",
        "lambda t: torch.zeros_like(t, dtype=torch.bool)):",
        "gaps",
    ),
    fault(
        "a compiled model is not asked whether it mixes records",
        "lalora_kernels/privacy/recorders.py",
        "            engine.check_input(engine.model, args, kwargs, within_graph=True)\n",
        "            engine.check_rows(len(tensors[0]))\n",
        "compiled_checks",
    ),
    fault(
        "the gradients of a compiled model's outputs are not looked at",
        "lalora_kernels/privacy/reduction.py",
        "            return compiled.looked(output, self.token, self.handle)\n",
        "            return None\n",
        "compiled_checks",
    ),
    fault(
        "second derivatives across records are passed over",
        "lalora_kernels/privacy/loop_loss.py",
        "        if tied:\n",
        "        if False:\n",
        "loop_loss",
    ),
    fault(
        "what trains beside the model is passed over",
        "lalora_kernels/privacy/loop_loss.py",
        "            self._refuse_trained(above)\n",
        "            pass\n",
        "loop_loss",
    ),
    fault(
        "rows that collate_fn makes of several records are passed over",
        "lalora_kernels/privacy/collated.py",
        "            if mixed is not None:\n",
        "            if False:\n",
        "collated",
    ),
    fault(
        "a sum that the model returns is taken for a mean",
        "lalora_kernels/privacy/own_loss_watch.py",
        "        if weight == 1.0 or len(seen) == ALIKE and alike:\n",
        "        if False:\n",
        "own_loss_loop",
    ),
    fault(
        "without the draws of eval mode, records are not compared",
        "lalora_kernels/privacy/own_mode.py",
        "    with Stilled() if drawn else nullcontext():\n",
        "    if drawn:\n        return\n    with nullcontext():\n",
        "still",
    ),
    fault(
        "two tensors over one memory train",
        "lalora_kernels/privacy/trained.py",
        "    _refuse_views(model, [use for _, _, uses in found for use in uses])\n",
        "",
        "views",
    ),
)
