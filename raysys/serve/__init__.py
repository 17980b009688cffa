"""Live ranking: one replica holds stable and canary, splits users, and takes what came of it.

schema.py       what the HTTP API takes and gives
router.py       which version answers a user
request_id.py   signed ids that join feedback to its request
ranker.py       the versions in memory
shelf.py        what is made of a version besides its model: index, filters, rules
index.py        the nearest items of a version, exact or by a graph
candidates.py   which items are ranked: named by the caller, or found
rules.py        what the shop wants of rankings whatever the model says
answer.py       ranks what was selected with one version, and writes the answer
checks.py       tells the caller's mistake from a version's fault
tally.py        what a replica counts for the rollout
impressions.py  what was shown, as rows
feedback.py     impressions and feedback become event files
shadow.py       how alike stable and canary rank, after the answer
metrics.py      what replicas and controller tell Prometheus
service.py      split, fallback and counting, without HTTP and without Ray
follower.py     follows the controller, loads versions, sends counts
replica.py      all of that as one thing that starts and stops
app.py          the HTTP API and the Serve application
"""
