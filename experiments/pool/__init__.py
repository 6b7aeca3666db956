"""Many independent jobs: on this machine, on SLURM, on Ray."""
