"""Tables of the rows in docs/results. Each table is a function that makes Markdown of rows.

`scripts/bench/make_tables.py` writes the tables between the markers in the documents.
"""
