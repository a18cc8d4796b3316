"""Readers of the record of a run while it grows: terminal, wandb, TensorBoard, messages."""
