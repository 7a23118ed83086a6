"""How long a test waits for another process before it takes that for hung.

No test asserts a time. The limit only ends what would never end, so it holds on a machine that is ten times slower
than the two cores on which the longest of these processes takes about a minute, and busy besides.
"""

HUNG_S = 3600
