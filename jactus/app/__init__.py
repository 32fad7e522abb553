"""The command line and what it writes, on top of the package: a model's folder, its card, its record and its page.

`record` is what the rest hand to each other: what one run did, as one JSON file beside the model.
"""
