"""What attention plans cost in quality, and what they save.

``command``  ``local-attention quality``: its options, its checks, its report
``grid``     the plans to measure, and one engine's job; pure
``results``  one engine after the other, and what is kept of each
``run``      one plan on one vLLM engine; the process that ``results`` starts
``verdict``  what each plan loses against the reference, and which to take; pure
``picture``  the verdict's table and picture
"""
