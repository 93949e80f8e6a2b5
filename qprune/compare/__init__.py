"""Search methods and baselines on the same data, network, budgets and seeds: one table, one figure.

`run.run` fills the cells of the comparison (method × budget × seed), by several processes if asked, and writes its folder.
"""
