"""Prepare datasets: read published image sets, and write their records to shards.

``readers.py`` lists the datasets; ``prepare.py`` writes a shard set (r2id.data.manifest) from one.
"""
