"""Decoding: prefill and decode steps, the dial, sampling, and the library's ``Generator``.

From the outside in: ``generator`` turns a ``Request`` into text, ``batch`` schedules prefill and decode
chunks on the host, and ``engine`` runs them on the device. ``dial`` turns a request's bits into thresholds
and corrects them; ``statistics`` reports the bits that were read.
"""
