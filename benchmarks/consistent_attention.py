"""Consistent self-attention against two published formulations of it, at SDXL's width on this machine's CPU.

    python3 benchmarks/consistent_attention.py [--json PATH] [--seconds 170] [--threads N]

Prepares the environment like scripts/test.py, then measures in a process of its own (consistent_attention_measure.py).
Prints a table and writes the numbers to benchmarks/results/consistent_attention.json. Needs 8 GB of free memory and
five to ten minutes.
"""

import sys

from unet3d import main

if __name__ == "__main__":
    sys.exit(main(__doc__.splitlines()[0], {"consistent_attention": "consistent_attention_measure.py"}))
