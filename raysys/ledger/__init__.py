"""The only source of truth: an append-only log of records, and the state that it folds to.

records.py  what a record can say
log.py      one record an object, appended by put-if-absent
state.py    the pure fold: what is consumed, committed, spent and rolled out
lease.py    one updater at a time
"""
