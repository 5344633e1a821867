"""One Ray node of a cluster on this machine: the command `ray`, on loopback alone.

python -m raymill.cluster.node start --head ...
"""

from __future__ import annotations

from raymill.ray_internals import run_on_loopback

if __name__ == "__main__":
    run_on_loopback()
