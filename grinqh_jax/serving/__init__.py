"""Serving: many requests at once on one model, with shared prefixes.

``engine`` takes requests from any thread and runs the decode loop of ``decoding``. ``answer`` is the text
that a request becomes. ``shared_pages`` stores texts with the same leading tokens in the same pages, and
``pages`` is its bookkeeping on the host.
"""
