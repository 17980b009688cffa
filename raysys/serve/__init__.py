"""Live ranking: one replica holds stable and canary, splits users, and takes what came of it.

schema.py      what the HTTP API takes and gives
router.py      which version answers a user
request_id.py  signed ids that join feedback to its request
ranker.py      the versions in memory
check.py       tries a version, in a process of its own
check_process.py  starts that process, and ends it
queries.py     encodes the queries that wait together
isolated.py    a canary that answers in another process
tally.py       what a replica counts for the rollout
feedback.py    impressions and feedback become event files
metrics.py     what a replica tells Prometheus
service.py     rank and feedback, without HTTP and without Ray
follower.py    follows the controller, loads versions, sends counts
replica.py     all of that as one thing that starts and stops
app.py         the HTTP API and the Serve application
"""
