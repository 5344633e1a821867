"""A network that others have trained, taught something else."""
