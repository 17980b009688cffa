"""raysys keeps a shop's ranker fresh, privately and safely, on one Ray cluster.

Read the folders in the order in which data flows: ledger, partitions, ingest, privacy, model,
train, evaluate, registry, rollout, serve. `update.py` ties them together.
"""

__version__ = "0.1.0"
