"""Serving: many requests at once on one model, with a paged KV cache and shared prefixes.

From the outside in: ``engine`` takes requests from any thread, ``answer`` is the text that they become,
``scheduler`` decides what the device does next for each ``job``, ``decode_state`` has the device's part as
pure functions, ``paged_cache`` stores keys and values in pages, and ``pages`` assigns the pages on the host.
"""
