"""Steps that make or change weights by gradient descent, all on `learning/loop.py`."""
