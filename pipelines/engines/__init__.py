"""Where a Beam job runs: this machine, a worker pool, a Dask cluster, Dataflow, any other Beam runner."""
