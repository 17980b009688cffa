"""What there is to train on: found in the root, compared with the ledger, made into a plan.

layout.py    where everything lies below the root
schema.py    the columns of events and items
discover.py  lists what is there
plan.py      pure: found x consumed -> UpdatePlan
"""
