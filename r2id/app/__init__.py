"""The page in the browser: ``r2id app RUN``.

``actions`` does what the page asks for, without a browser; ``page`` lays out what is seen and
serves it.
"""
