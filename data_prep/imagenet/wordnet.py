"""The form of WordNet ids, by which ImageNet names its classes."""

from __future__ import annotations

import re

WNID = re.compile(r"n\d{8}")
"""A WordNet id, such as n01440764."""
