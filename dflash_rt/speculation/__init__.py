"""The number of rows that the next step verifies.

- ``width``: the choice, from costs and from the drafts accepted so far.
- ``width_cost``: the cost of a step, measured; ``width_cache``: stored in the bundle.
- ``width_correction``: costs, corrected by requests.
"""
