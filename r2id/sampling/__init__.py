"""From seeds to images of any size: the sampler, what it is told, and files of what it draws."""

from r2id.sampling.sampler import Sampler

__all__ = ["Sampler"]
