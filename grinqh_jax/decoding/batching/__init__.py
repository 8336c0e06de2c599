"""Continuous batching: requests enter and leave the slots of the device between decode chunks.

``scheduler`` is the decode loop on the host. It moves a ``job`` from the queue to a slot, and results from
the device to the job's receiver. ``rows`` is the storage of texts that share nothing.
"""
