"""Where the random numbers of training come from: each decision is seeded by the number of the sample it is made for.

So a run does not depend on how many processes and workers share it, nor on having been interrupted.
"""

import hashlib


def seed_of(seed: int, sample: int, purpose: str) -> int:
    """Seed of one kind of decision about one sample.

    Args:
        seed: of the run.
        sample: number of the sample, counted over the whole run, or of whatever else is decided about.
        purpose: name of the decision; different ones are independent of each other.

    Returns:
        0 .. 2^63 - 1, from the SHA-256 of the three.
    """
    digest = hashlib.sha256(f"{seed}/{sample}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
