"""Quality against bits: methods and settings over texts and problems, to a table, JSON and a figure."""
