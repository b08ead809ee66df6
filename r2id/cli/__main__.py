"""``python -m r2id.cli``."""

from r2id.cli import main

main()
