"""The device's part of decoding: a state with a row for each slot, and the programs on it.

A slot decodes one request. ``state`` is what the device remembers, with the ``settings`` of the requests as
arrays. ``prompts`` reads a prompt in prefill chunks into pages, as a ``prefix``. ``answers`` starts an answer
in a slot, decodes a chunk for all slots, and ends a slot; ``speculate`` decodes a chunk with drafts.
``device`` dispatches these programs, and ``rehearsal`` compiles them in advance. All settings are arrays, and
all shapes depend on the engine alone, so requests come and go without a compilation. States and caches are
donated: use the returned ones.

Texts that share nothing have one page each, with the number of their slot. The cache of all slots is then
contiguous, and needs no page table.
"""
