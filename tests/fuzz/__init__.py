"""Random networks as data, and what must hold for each of them; ``tests/test_fuzz.py`` runs them."""
