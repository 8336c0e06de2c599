"""Continuous batching: requests enter and leave the slots of the device between decode chunks.

``scheduler`` is the decode loop on the host. It moves a ``job`` from the queue to a slot, dispatches work,
and gives the results, which are ``in_flight`` meanwhile, to the job's receiver. ``rows`` is the storage of
texts that share nothing.
"""
