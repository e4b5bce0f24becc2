"""Masks against their rivals on small tasks: `python -m benchmarks.glue`.

Every method is judged alike. Its rate is tuned by the search's own proxies and once more at the
final length, on rows that choose; its numbers come from fresh seeds on rows that no choice has
seen. All fine-tunes are units of one ledger: what is there is not done again, and several
processes may share one.
"""
