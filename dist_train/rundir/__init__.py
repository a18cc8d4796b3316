"""The files of a run (lease, record, status, checkpoints), and how a run resumes from them."""
