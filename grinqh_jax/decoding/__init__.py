"""Decoding: prefill and decode steps, the dial, sampling, the decode loop, and the library's ``Generator``.

From the outside in:

``generator`` turns a ``Request`` into a ``generation``, which runs in the caller's thread, as ``texts`` do.
``batching`` is the decode loop on the host, continuous batching: what the device does next for which job.
``slots`` are the state of all texts on the device, in ``paged_cache``, and the programs on it.
``speculation`` drafts tokens, and verifies them in one decode step.
``engine`` has the functions on a model and a cache, which a serving stack can call directly.
``dial`` turns a request's bits into thresholds and corrects them; ``sampling`` chooses tokens.

A storage decides where keys and values are and what is reused: ``prompt_cache`` for a conversation,
``batching.rows`` for texts that share nothing, ``serving.shared_pages`` for an engine of many requests.
``programs`` compiles several programs at once, and ``statistics`` reports the bits that were read.
"""
