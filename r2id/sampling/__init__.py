"""Drawing images of any size with a trained R2ID.

From command to picture, each step hands its result to the next:

1. ``open_trained`` finds the newest checkpoint of a run, or reads an exported file.
2. ``Sampler.load`` builds the R2ID and its codec from it, and verifies their weights.
3. ``draw_grids`` (grids.py: a few samples at many sizes) or ``draw_many`` (files.py: many samples
   of one size) chooses conditions and seeds, checks that everything fits into memory, has the
   sampler draw, and writes PNG files or shards.

``reconstruction`` does the same for pictures that an RIAE encodes and decodes.
"""

from r2id.sampling.sampler import Sampler

__all__ = ["Sampler"]
