"""Drawing images of any size with a trained R2ID.

From command to picture, each step hands its result to the next and none goes back:
``Checkpoint.open`` finds the run's newest checkpoint · ``Sampler.load`` builds from it the R2ID and
the codec that it names, and verifies their weights · ``grids`` and ``files`` choose conditions and
seeds, check the memory, let the sampler draw, and write PNG files or shards.
"""

from r2id.sampling.sampler import Sampler

__all__ = ["Sampler"]
