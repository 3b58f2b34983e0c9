"""Load tests of any OpenAI-compatible server, over the wire alone.

Imports nothing from ``serve_app``: what is measured is what a client sees.

====================  =========================================================
``benchmark.py``      locustfile: mixed traffic at an open-loop rate, or a trace
``long_context.py``   locustfile: cost and retrieval against prompt length
``shapes.py``         locustfile: steps, spike and ramp, beside ``benchmark.py``
``user.py``           the Locust user behind both
``client.py``         one streamed request over geventhttpclient
``stream.py``         what a request is, what its stream showed (pure)
``prompts.py``        prompts of exact token lengths (pure but for two look-ups)
``traffic.py``        mixes, published lengths, traces (pure)
``run.py``            one run: options, records, files, drain, client CPU
``summary.py``        the tables and the verdict (pure)
``drive.py``          the same without Locust's runner
``compare.py``        ratios of two targets and their confidence (pure)
``rates.py``          command: the benchmark at several rates
``ab.py``             command: two servers in ABBA order
``report.py``         command: runs as one HTML page and PNGs
``plots.py``          its figures
``kv_usage.py``       the server's KV-cache use, sampled while a run goes
``null_server.py``    an instant fake server
``floor.py``          the client's own floor, measured with it
====================  =========================================================
"""
