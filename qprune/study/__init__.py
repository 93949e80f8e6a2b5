"""Grids of configurations times seeds: are heterogeneous networks better than homogeneous ones of equal cost, beyond the noise of training?

The question of Zur et al. (1904.09872), who split the filters of one layer over several bit widths in every possible way. `run.run` trains
every point of such a grid and writes the folder of the study; the trials can be shared out between processes and machines.
"""
