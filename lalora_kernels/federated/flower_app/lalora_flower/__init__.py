"""The Flower app: messages in and out, nothing else."""
