"""Prepare datasets: readers of published image sets, and the sharding of their records.

``readers.py`` lists the datasets; ``prepare.py`` writes a shard set from one (r2id.data.manifest).
"""
