"""The tables and the picture of README.md and docs/, made from the code and from what was measured.

::

    python -m benchmarks.tables              write them anew: `make tables`
    python -m benchmarks.tables --check      name those that are not what they should be

A table stands on a page between two comments, `<!-- NAME: begin -->` and `<!-- NAME: end -->`, by its name in
`contents.TABLES`. Nobody writes a number by hand, so none can go stale.
"""
