"""One fair comparison of recipes: what is run, whether it may be compared, and the runs themselves."""
