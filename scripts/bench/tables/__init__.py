"""Tables of the rows in docs/results: each a function from the folder of rows and the words of a marker to
Markdown. `scripts/bench/make_tables.py` puts them where they belong."""
