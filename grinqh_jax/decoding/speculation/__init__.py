"""Speculation: a drafter guesses the next tokens of a text, and one decode step verifies them together.

``drafter`` is the protocol of drafters: ``lookup`` copies what followed the same tokens earlier in the text,
and ``model_drafter`` asks a model. ``chunk`` is the decode loop on the device: it drafts, reads the last
token and the drafts graded in one step, and keeps the drafts that ``acceptance`` accepts. ``block_dial`` sets
the thresholds, so that a text does not depend on the number of drafts. ``draft_length`` decides on the host,
between chunks, how many tokens are drafted. ``setting`` parses ``--speculate``.
"""
