"""Methods side by side: processes that measure them one by one, and what can be counted without running."""
