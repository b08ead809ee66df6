"""Prefect flows, one for each stage and one for all of them."""
