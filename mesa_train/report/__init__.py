"""Report measurements: tables for the terminal, charts, an HTML page and rows on disk."""
