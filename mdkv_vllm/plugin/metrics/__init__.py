"""What the server counts about compression, and how the numbers reach ``/metrics``.

Numbers are made in the engine's processes, ``/metrics`` is answered by the API servers'. They
meet in the files that prometheus_client has for servers of several processes:

    scheduler, workers -> recorder.py -> *.db files -> MultiProcessCollector -> /metrics

Every value is written when it changes and read when it is asked for, so a scrape of any API
server sees all engines as they are.
"""
