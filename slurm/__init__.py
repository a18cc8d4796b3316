"""The cluster: submit a run to Slurm, keep it alive, show it. `python -m slurm --help`."""
