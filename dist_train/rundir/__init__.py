"""What lies on the disk of a run: lease, record, status, checkpoints, and how a run goes on from them."""
