"""What there is to train on: found in the root, compared with the ledger, made into a plan.

layout.py    where everything lies below the root
schema.py    the columns of events and items
discover.py  lists what is there
changes.py   pure: what becomes of late, rewritten, vanished and empty ones
plan.py      pure: found x consumed -> UpdatePlan
periods.py   pure: which stretches of time an update's partitions make
"""
