"""A canary on live traffic: put on trial, judged, promoted or rolled back.

state.py       the legal transitions, as builders of ledger records
progress.py    where a rollout stands, for people
counters.py    what is counted about each version, by buckets of users
bounds.py      bounds that hold however often one looks
questions.py   what is asked about a canary, each with such bounds
analysis.py    pure: counters -> Measurement
policy.py      pure: Measurement, step -> Decision
view.py        what replicas have to know of a rollout
reports.py     the replicas' counts, put together
shadow.py      the same of what shadow scoring found
controller.py  the actor that follows, judges and decides
notify.py      tells a webhook of each transition
watch.py       tells the metrics what the ledger says
"""
