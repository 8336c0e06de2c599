"""Decoding: prefill and decode steps, the dial, sampling, the decode loop, and the library's ``Generator``.

From the outside in: ``generator`` turns a ``Request`` into a ``generation``, which runs in the caller's
thread, as ``texts`` do. ``scheduler`` is the decode loop on the host: it decides what the device does next
for a ``job``. A storage decides where keys and values are and what is reused: ``prompt_cache`` for a
conversation, ``rows`` for texts that share nothing. ``device`` dispatches, and ``programs`` compiles, the
functions of ``decode_state`` on arrays, among them the ``settings`` of requests and the pages of
``paged_cache``. ``engine`` has the functions on a model and a cache, which a serving stack can call directly.
``dial`` turns a request's bits into thresholds and corrects them; ``statistics`` reports the bits that were
read.
"""
