"""The page in the browser: ``r2id app RUN``.

``actions`` does what the page asks for, without a browser; ``tabs`` lays out what is seen,
and ``page`` serves it.
"""
