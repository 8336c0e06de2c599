"""Serving: many requests at once on one model, with a paged KV cache and shared prefixes.

From the outside in: ``engine`` takes requests from any thread, ``answer`` is the text that they become,
``scheduler`` decides what the device does next for a ``job``, ``device`` dispatches it, ``decode_state`` is
the device's part, pure functions on arrays, among them the ``settings`` of requests, ``paged_cache`` stores
keys and values in pages, and ``pages`` assigns the pages on the host.
"""
