"""Readers of published image sets, and the sharding of their records."""
