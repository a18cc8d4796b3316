"""Who reads the record of a run while it grows: the terminal, wandb, TensorBoard, messages."""
