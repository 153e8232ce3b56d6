"""``styleforge bench``: time this backend and its peers in one run, interleaved, checked first.

``network`` times whole networks, ``layers`` each kind of convolution in one, ``instance_norm`` one operation
against the bytes it must move. All check every peer against float64 before the first timing, and return rows
(``rows``): plain dictionaries with everything needed to read a number later. ``peers`` says what is
compared, ``timing`` and ``replays`` how a number is taken, ``work`` and ``ceilings`` give the floor;
``roofline`` draws the rows of ``layers``.
"""
