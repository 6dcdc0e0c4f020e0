"""What `python -m offload.serve` is made of: requests that are checked, answers as they come, routes, metrics."""
