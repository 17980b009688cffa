"""The only source of truth: an append-only log of records, and the state that it folds to.

records.py    what a record can say; codec.py and seal.py, how it is written
log.py        one record an object, appended by put-if-absent
reader.py     reads records, far ones in parallel
state.py      what is consumed, committed, spent and rolled out: the pure fold of the records
rules.py      which record may come next; fold.py, how it changes the state
snapshots.py  the state as of a record, so that loading is cheap
lease.py      one updater at a time
verify.py     is every record as it was written; explain.py, what it means
"""
