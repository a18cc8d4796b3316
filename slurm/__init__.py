"""Cluster: submits a run to Slurm, keeps it alive, shows its status. See `python -m slurm --help`."""
